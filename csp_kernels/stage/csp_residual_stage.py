"""The cross stage partial stage of residual blocks: CSPResNet, CSPResNeXt, CSPDarkNet (arXiv 1911.11929, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph, Read
from csp_kernels.stage.residual_block import add_residual_block


def csp_residual_stage(
    channels: int, part: int, main: int, width: int, mid: int, out: int, blocks: int, block: str = "bottleneck",
    groups: int = 1, down: int = 0, split_acts: Sequence[str] = (), order: str = "main_first",
    act: str = "leaky_relu", slope: float = 0.1,
) -> Graph:  # fmt: skip
    """x -> y [out]: a part of x bypasses `blocks` residual blocks (add_residual_block) of `width` channels.

    down: channels of x, which a 3x3 with stride 2, norm and activation make `channels` of; 0: x has those already; -1:
    x is what that 3x3 gave, and is read through the norm and the activation. split_acts: of the 1x1 that gives both
    parts, bypass first, or of two 1x1; (): x is sliced instead. order: "main_first" or "part_first", in which the last
    1x1 reads them. Parameters: down.*, split.*, blocks.{i}.*, t_a.*, t_b.*.
    """
    build = Builder(down if down > 0 else channels)
    x = build.read(0)
    if down > 0:
        x = build.read(build.conv([x], channels, 3, stride=2, groups=groups, name="down.conv"))
    if down:
        x = build.read(x.value, build.norm(channels, "down.norm"), act, slope)
    bypass, y = _split(build, x, part, main, split_acts, slope)
    reads = [y]
    for i in range(blocks):
        reads = add_residual_block(
            build, reads, width, mid, block=block, groups=groups, act=act, slope=slope, prefix=f"blocks.{i}."
        )  # fmt: skip
    y = conv_norm(build, reads, width, 1, act, slope, prefix="t_a.")
    last = [y, bypass] if order == "main_first" else [bypass, y]
    build.write([conv_norm(build, last, out, 1, act, slope, prefix="t_b.")])
    return build.graph()


def _split(build: Builder, x: Read, part: int, main: int, acts: Sequence[str], slope: float) -> tuple[Read, Read]:
    """The bypass and the main part."""
    if not acts:
        value, norm, act = x.value, x.norm, x.act
        return build.read(value, norm, act, x.slope, stop=part), build.read(value, norm, act, x.slope, start=part)
    if len(acts) == 2:
        widths = zip((part, main), acts, strict=True)
        first, second = (conv_norm(build, [x], n, 1, a, slope, prefix=f"split.{i}.") for i, (n, a) in enumerate(widths))
        return first, second
    both = conv_norm(build, [x], part + main, 1, acts[0], slope, prefix="split.")
    value, norm = both.value, both.norm
    first = build.read(value, norm, both.act, slope, stop=part)
    return first, build.read(value, norm, both.act, slope, start=part)
