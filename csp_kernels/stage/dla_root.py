"""The aggregation node of deep layer aggregation (DLA, arXiv 1707.06484, Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder
from csp_kernels.stage.graph import Graph


def dla_root(
    in_channels: Sequence[int], out_channels: int, shortcut: bool = False, act: str = "relu", slope: float = 0.0
) -> Graph:
    """y = act(bn(conv(inputs side by side))), a 1x1; with a shortcut the first input is added in front of act.
    Parameters, as timm names them: conv, bn."""
    build = Builder(*in_channels)
    inputs = [build.read(i) for i in range(len(in_channels))]
    value = build.conv(inputs, out_channels, name="conv")
    norm = build.norm(out_channels, "bn")
    if not shortcut:
        build.write([build.read(value, norm, act, slope)])
    else:
        build.write([build.read(build.sum([build.read(value, norm), inputs[0]]), None, act, slope)])
    return build.graph()
