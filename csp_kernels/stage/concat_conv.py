"""A 1x1 convolution, batch norm and activation over tensors side by side (CSPNet, arXiv 1911.11929, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder
from csp_kernels.stage.graph import Graph


def concat_conv(
    in_channels: Sequence[int], out_channels: Sequence[int], act: str = "relu", slope: float = 0.0
) -> Graph:
    """Inputs of these channels -> outputs of these channels, slices of one convolution."""
    build = Builder(*in_channels)
    z = build.conv([build.read(i) for i in range(len(in_channels))], sum(out_channels), name="conv")
    norm, start = build.norm(sum(out_channels), "norm"), 0
    for channels in out_channels:
        build.write([build.read(z, norm, act, slope, start=start, stop=start + channels)])
        start += channels
    return build.graph()
