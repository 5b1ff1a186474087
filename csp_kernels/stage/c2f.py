"""YOLOv8's cross stage partial block, C2f, YOLO11's C3k2 and the plain C2 (ultralytics)."""

from __future__ import annotations

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.c3 import NAMES, add_bottleneck, add_c3
from csp_kernels.stage.graph import Graph, Read


def c2f(
    in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = False, hidden: int = 0, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """a, b = halves of cv1(x); b0 = b, b(i+1) = m.i(bi), two 3x3 each; y = cv2([a, b0, b1, ...]); hidden: channels of a
    half, 0: half of out_channels. Parameters: cv1.conv, cv1.bn, m.{i}.cv1.*, m.{i}.cv2.*, cv2.*."""
    build = Builder(in_channels)
    parts = _halves(build, hidden or out_channels // 2, act, slope)
    for i in range(blocks):
        parts.append(add_bottleneck(build, parts[-1], (3, 3), shortcut, act, slope, f"m.{i}."))
    build.write([conv_norm(build, parts, out_channels, 1, act, slope, prefix="cv2.", names=NAMES)])
    return build.graph()


def c3k2(
    in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = True, hidden: int = 0, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """c2f with a C3 of two bottlenecks of two 3x3 (C3k) in place of each bottleneck. Parameters: as c2f's, m.{i}.* as
    those of c3."""
    build = Builder(in_channels)
    parts = _halves(build, hidden or out_channels // 2, act, slope)
    for i in range(blocks):
        width = parts[-1].channels
        y = add_c3(build, parts[-1], width, width // 2, 2, (3, 3), shortcut, act, slope, f"m.{i}.")
        parts.append(y)
    build.write([conv_norm(build, parts, out_channels, 1, act, slope, prefix="cv2.", names=NAMES)])
    return build.graph()


def c2(
    in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = True, hidden: int = 0, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """a, b = halves of cv1(x); y = cv2([m(a), b]), m: `blocks` bottlenecks of two 3x3. Parameters: as c2f's."""
    build = Builder(in_channels)
    a, b = _halves(build, hidden or out_channels // 2, act, slope)
    for i in range(blocks):
        a = add_bottleneck(build, a, (3, 3), shortcut, act, slope, f"m.{i}.")
    build.write([conv_norm(build, [a, b], out_channels, 1, act, slope, prefix="cv2.", names=NAMES)])
    return build.graph()


def _halves(build: Builder, hidden: int, act: str, slope: float) -> list[Read]:
    """Of one 1x1."""
    both = conv_norm(build, [build.read(0)], 2 * hidden, 1, act, slope, prefix="cv1.", names=NAMES)
    ends = ((0, hidden), (hidden, 2 * hidden))
    return [build.read(both.value, both.norm, act, slope, start=start, stop=stop) for start, stop in ends]
