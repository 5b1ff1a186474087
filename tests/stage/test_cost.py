"""Costs of programs: FLOPs and traffic counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csp_kernels.stage.build import Builder, through_norm
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.cost import Cost, costs
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.stage.partial_transition import partial_transition
from csp_kernels.stage.program import Wanted

SIZE = 2, 9, 10


def flops(graph: Graph, recompute: str = "none", wanted: Wanted | None = None) -> list[int]:
    """Forward, backward."""
    program = compile_stage(graph, (False,) * len(graph.norms), wanted or Wanted.all(graph), recompute)
    return [sum(cost.flops for cost in part) for part in costs(program, *SIZE)]


def products(graph: Graph) -> int:
    """Of a graph that does not pool, by hand."""
    convs = [node for node in graph.nodes if isinstance(node, Conv)]
    pixels = SIZE[0] * SIZE[1] * SIZE[2]
    return sum(2 * pixels * node.in_channels * node.out_channels * node.kernel**2 for node in convs)


@pytest.mark.parametrize("kind", ["pre", "post", "two_way"])
def test_recomputed_products_count_again(kind: str) -> None:
    """Of the dense layers all but the last one of each branch."""
    graph = csp_stage(9, 4, 4, [6, 6], 7, 10, layer=kind, pool=False)
    assert flops(graph) == [products(graph), 2 * products(graph)]
    grown = {read.value for read in graph.nodes[-2].reads} | {graph.value(len(graph.nodes) - 2 + i) for i in (0, 1)}
    again = [node for i, node in enumerate(graph.nodes) if graph.value(i) not in grown]
    extra = products(replace(graph, nodes=tuple(again)))
    assert flops(graph, "bottleneck") == [products(graph), 2 * products(graph) + extra] and extra > 0


def test_unwanted_gradients_are_left_out() -> None:
    graph = concat_conv([5, 7], [6, 3])
    forward, backward = flops(graph, wanted=Wanted((0,), (0,), (0,)))
    assert (forward, backward) == (products(graph), products(graph) + products(graph) * 5 // 12)


def test_a_product_behind_averages_sees_a_quarter() -> None:
    """Of odd sizes less: the last row is left out."""
    graph = partial_transition(4, 8, 5, 9, order="pre")
    t, u = (2 * 5 * 8, 2 * 9 * (4 + 5))
    assert flops(graph)[0] == SIZE[0] * (t * 9 * 10 + u * 4 * 5)


def test_traffic_of_a_dense_layer() -> None:
    """Numbers a pixel: x is copied and read again; backward, the gradient of x is read and written where it lies."""
    graph = dense_block(1, 8, 4, 6)
    program = compile_stage(graph, (False, False), Wanted.all(graph))
    forward, backward = costs(program, 1, 1, 1)
    assert [step for step in forward if step != Cost()] == [
        Cost(0, 8, 8),  # copy, with statistics
        Cost(2 * 8 * 6, 8, 6),
        Cost(2 * 6 * 4 * 9, 6, 4),
    ]
    assert [step for step in backward if step != Cost()] == [
        Cost(0, 12, 12),  # dy
        Cost(2 * 2 * 6 * 4 * 9, 4 + 6, 6),  # the slice's gradient, from which nothing is taken off, and the bottleneck
        Cost(2 * 2 * 8 * 6, 2 * 6 + 8 + 8, 8),  # the bottleneck's with the bottleneck; x, and its gradient
        Cost(0, 2 * 8, 8),
    ]


def test_traffic_of_a_sum_and_of_halves() -> None:
    """A residual block of stride 2 behind a 3x3, whose input wants no gradient; then averages."""
    build = Builder(4)
    a = build.conv([build.read(0)], 6, 3, stride=2)
    b = build.conv(through_norm(build, [build.read(a)]), 6, 3, groups=2)
    total = build.sum([build.read(a), build.read(b)], "relu")
    build.write([build.read(total)], pool=True)
    graph = build.graph()
    program = compile_stage(graph, (True,), Wanted((), (0, 1), ()))
    forward, backward = costs(program, 1, 7, 8)  # 56 pixels, 4 x 4 behind the stride, 2 x 2 averaged
    assert [step for step in forward if step != Cost()] == [
        Cost(2 * 16 * 6 * 4 * 9, 56 * 4, 16 * 6),
        Cost(2 * 16 * 6 * 3 * 9, 16 * 6, 16 * 6),
        Cost(0, 2 * 16 * 6, 16 * 6),
        Cost(0, 16 * 6, 4 * 6),
    ]
    assert [step for step in backward if step != Cost()] == [
        Cost(0, 4 * 6, 16 * 6),
        Cost(0, 3 * 16 * 6, 2 * 16 * 6),  # its gradient and both terms, for the ReLU
        Cost(2 * 2 * 16 * 6 * 3 * 9, 3 * 16 * 6, 16 * 6),  # added to that of the first 3x3
        Cost(2 * 16 * 6 * 4 * 9, 16 * 6 + 56 * 4, 0),  # the weight's gradient alone
    ]
