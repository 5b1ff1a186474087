"""YOLOv5's cross stage partial block, C3, and the bottleneck that it shares with its successors (ultralytics)."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph, Read

NAMES = ("conv", "bn")  # of the children of a convolution with norm and activation


def c3(
    in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = True, hidden: int = 0, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """y = cv3([m(cv1(x)), cv2(x)]), m: `blocks` bottlenecks of a 1x1 and a 3x3; hidden: channels of both parts, 0: half
    of out_channels. Parameters: cv1.conv, cv1.bn, cv2.*, m.{i}.cv1.*, m.{i}.cv2.*, cv3.*."""
    build = Builder(in_channels)
    hidden = hidden or out_channels // 2
    build.write([add_c3(build, build.read(0), out_channels, hidden, blocks, (1, 3), shortcut, act, slope)])
    return build.graph()


def add_c3(
    build: Builder, x: Read, out: int, hidden: int, blocks: int, kernels: Sequence[int], shortcut: bool, act: str,
    slope: float, prefix: str = "",
) -> Read:  # fmt: skip
    """How what c3 gives is read; kernels: of each bottleneck."""
    y, bypass = (
        conv_norm(build, [x], hidden, 1, act, slope, prefix=f"{prefix}cv{i}.", names=NAMES) for i in (1, 2)
    )  # fmt: skip
    for i in range(blocks):
        y = add_bottleneck(build, y, kernels, shortcut, act, slope, f"{prefix}m.{i}.")
    return conv_norm(build, [y, bypass], out, 1, act, slope, prefix=f"{prefix}cv3.", names=NAMES)


def add_bottleneck(
    build: Builder, x: Read, kernels: Sequence[int], shortcut: bool, act: str, slope: float, prefix: str
) -> Read:
    """How cv2(cv1(x)) is read, or with a shortcut x + cv2(cv1(x)), all of the channels of x."""
    y = conv_norm(build, [x], x.channels, kernels[0], act, slope, prefix=f"{prefix}cv1.", names=NAMES)
    y = conv_norm(build, [y], x.channels, kernels[1], act, slope, prefix=f"{prefix}cv2.", names=NAMES)
    return build.read(build.sum([y, x])) if shortcut else y
