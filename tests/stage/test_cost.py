"""Costs of programs: FLOPs as the operators' formulas count them, and traffic counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from random_graphs import arguments

from csp_kernels.ops.flops import FORMULAS
from csp_kernels.ops.partial_transition import FUSIONS
from csp_kernels.stage.build import Builder, through_norm
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.cost import Cost, costs
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.stage.partial_transition import partial_transition
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.program import Wanted
from csp_kernels.stage.two_way_dense_block import two_way_dense_block

SIZE = 2, 9, 10


def flops(graph: Graph, recompute: str = "none", wanted: Wanted | None = None) -> list[int]:
    """Forward, backward."""
    program = compile_stage(graph, (False,) * len(graph.norms), wanted or Wanted.all(graph), recompute)
    return [sum(cost.flops for cost in part) for part in costs(program, *SIZE)]


def formulas(name: str, graph: Graph, **given: Any) -> list[int]:
    """Of the operator, by shapes."""
    _, params, _ = arguments(graph, (False,) * len(graph.norms))
    shapes = [tuple(p.shape) for p in params]
    x, y = ((SIZE[0], c, *SIZE[1:]) for c in (graph.inputs[0], graph.outputs[0].channels))
    a = SimpleNamespace(params=shapes, x=x, y=y, z=[x], **given)
    return [FORMULAS[name](a), FORMULAS[f"{name}_backward"](a)]


def test_dense_blocks() -> None:
    for name, graph, two_way in (
        ("dense_block", dense_block(3, 8, 4, 6), 0),
        ("post_dense_block", post_dense_block(8, 4, [6, 5]), 0),
        ("post_dense_block", two_way_dense_block(8, 4, [6, 5]), 1),
    ):
        assert flops(graph) == formulas(name, graph, two_way=two_way)


def test_concat_conv() -> None:
    graph = concat_conv([5, 7], [6, 3])
    inputs = [(SIZE[0], c, *SIZE[1:]) for c in graph.inputs]
    for flags in ((True, True), (True, False)):
        a = SimpleNamespace(inputs=inputs, weight=(9, 12, 1, 1), wanted=flags)
        expected = [FORMULAS["concat_conv"](a), FORMULAS["concat_conv_backward"](a)]
        wanted = Wanted(tuple(i for i in range(2) if flags[i]), (0,), (0,))
        assert flops(graph, wanted=wanted) == expected


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_transitions(order: str, fusion: str, pool: bool) -> None:
    graph = partial_transition(4, 8, 5, 9, fusion=fusion, order=order, pool=pool)
    dense = (SIZE[0], 8, *SIZE[1:])
    given = {"dense": dense, "fusion": FUSIONS.index(fusion), "post": order == "post", "pool": pool}
    assert flops(graph) == formulas("partial_transition", graph, **given)


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("kind", ["pre", "post", "two_way"])
def test_stages(kind: str, recompute: str) -> None:
    graph = csp_stage(9, 4, 4, [6, 6], 7, 10, layer=kind)
    given = {"layer": ["pre", "post", "two_way"].index(kind), "fusion": FUSIONS.index("csp"), "pool": True}
    forward, backward = formulas("csp_stage", graph, **given)
    dense = [node for node in graph.nodes[:-2] if isinstance(node, Conv) and node.kernel == 1]
    again = sum(2 * 2 * 9 * 10 * node.in_channels * node.out_channels for node in dense)
    assert flops(graph, recompute) == [forward, backward + again * (recompute == "bottleneck")]


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
