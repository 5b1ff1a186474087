"""The cross stage partial dense stage (CSPNet, arXiv 1911.11929, Eq. 4, Fig. 2b): split, dense layers, transitions."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder
from csp_kernels.stage.dense_block import add_dense_layers
from csp_kernels.stage.graph import Graph, Read
from csp_kernels.stage.partial_transition import add_partial_transition
from csp_kernels.stage.post_dense_block import add_post_dense_layers
from csp_kernels.stage.two_way_dense_block import add_two_way_dense_layers


def csp_stage(
    in_channels: int, part: int, growth_rate: int, bottlenecks: Sequence[int], mid: int, out: int, *,
    layer: str = "pre", fusion: str = "csp", pool: bool = True,
) -> Graph:  # fmt: skip
    """x [in_channels] -> y [out]: its first `part` channels bypass the dense layers. bottlenecks: one a layer."""
    build = Builder(in_channels)
    bypass = [build.read(0, stop=part)] if part else []
    dense = _dense(build, build.read(0, start=part), growth_rate, bottlenecks, layer)
    order = "pre" if layer == "pre" else "post"
    add_partial_transition(build, bypass, dense, mid, out, fusion=fusion, order=order, pool=pool, prefix="transition.")
    return build.graph()


def _dense(build: Builder, x: Read, growth_rate: int, bottlenecks: Sequence[int], layer: str) -> list[Read]:
    if layer == "pre":  # every layer reads x through a norm of its own: beside the features it is one segment with them
        x = build.read(build.sum([x]))
        return add_dense_layers(build, [x], len(bottlenecks), growth_rate, bottlenecks[0], prefix="dense.")
    add = add_post_dense_layers if layer == "post" else add_two_way_dense_layers
    return add(build, [x], growth_rate, bottlenecks, prefix="dense.")
