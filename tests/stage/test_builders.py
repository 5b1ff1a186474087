"""Every builder's graph computes what the reference of its operator does: outputs, statistics and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BlockCase, Case, ConcatConvCase, StageCase, TransitionCase
from torch import Tensor

import csp_kernels as csp
from csp_kernels.reference.stage import stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.partial_transition import partial_transition, transition
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.two_way_dense_block import two_way_dense_block


def pooled(case: Any) -> dict[str, Any]:
    return {"fusion": case.fusion, "pool": case.pool is not None}


def of_case(case: Case) -> Graph:
    """The same by a builder."""
    if isinstance(case, ConcatConvCase):
        act, slope = case.options.get("act", "relu"), case.options.get("negative_slope", 0.0)
        return concat_conv(case.channels, case.options.get("splits", [case.out]), act, slope)
    if isinstance(case, TransitionCase):
        return partial_transition(case.part, case.dense, case.mid, case.out, order=case.order, **pooled(case))
    assert isinstance(case, BlockCase)
    widths = [case.width] * case.layers
    if isinstance(case, StageCase):
        sizes = case.channels, case.part, case.growth, widths, case.mid, case.out
        return csp_stage(*sizes, layer=case.layer, **pooled(case))
    if case.layer == "pre":
        return dense_block(case.layers, case.channels, case.growth, case.width)
    return (post_dense_block if case.layer == "post" else two_way_dense_block)(case.channels, case.growth, widths)


class DenseCase(BlockCase):
    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        return where.dense_block(*inputs, params, running, frozen=self.flags)


CASES: dict[str, Case] = {
    "concat": ConcatConvCase(),
    "concat, splits": ConcatConvCase(options={"splits": [9, 8], "act": "leaky_relu", "negative_slope": 0.2}),
    **{f"concat, {act}": ConcatConvCase(options={"act": act}) for act in ("silu", "mish", "hardswish", "identity")},
    "pre": DenseCase(layer="pre", layers=3),
    "post": BlockCase(layers=3),
    "two_way": BlockCase(layer="two_way"),
    **{
        f"partial {order} {fusion} {pool} {part}": TransitionCase(order=order, fusion=fusion, pool=pool, part=part)
        for order in ("pre", "post")
        for fusion in ("csp", "first", "last")
        for pool in ("avg", None)
        for part in (0, 12)
    },
    **{
        f"stage {layer} {fusion}": StageCase(layer=layer, fusion=fusion)
        for layer in ("pre", "post", "two_way")
        for fusion in ("csp", "first", "last")
    },
    "stage without bypass": StageCase(part=0, pool=None),
}


@pytest.mark.parametrize("frozen", [(), (True, False)], ids=["training", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_the_reference_does(name: str, frozen: tuple[bool, ...]) -> None:
    case = CASES[name]
    case = type(case)(**{**vars(case), "dtype": torch.float64, "frozen": frozen})
    leaves, running = case.leaves(), case.running()
    graph = of_case(case)
    assert graph.inputs == tuple(case.inputs.values())
    assert list(graph.norms) == case.norms
    leaves = {key: t.requires_grad_() for key, t in leaves.items()}
    expected, _ = case(csp.reference, leaves, running)
    values = list(leaves.values())
    inputs, params = values[: len(case.inputs)], values[len(case.inputs) :]
    found, stats = stage(graph, inputs, params, running, frozen=case.flags)
    given = [torch.randn_like(y) for y in expected]
    assert [y.shape for y in found] == [y.shape for y in expected]
    for y, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(ys, values, given) for ys in (found, expected))
    for key, g, exact in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    frozen_channels = [f for channels, f in zip(case.norms, case.flags, strict=True) for _ in range(channels)]
    assert stats.shape == (2, sum(case.norms)) and (stats[1] > 0).tolist() == [not f for f in frozen_channels]


def test_statistics_are_those_of_the_operator() -> None:
    """In the order of the norms, for a block of the order convolution, norm."""
    case = BlockCase(layers=2, dtype=torch.float64)
    leaves = case.leaves()
    _, expected = case(csp.reference, leaves, [])
    _, stats = stage(of_case(case), [leaves.pop("x")], list(leaves.values()))
    torch.testing.assert_close(stats, expected, rtol=1e-12, atol=1e-12)


def test_dropout_follows_the_seed() -> None:
    case = DenseCase(layer="pre", layers=2, dtype=torch.float64)
    leaves = case.leaves()
    x, params, seed = leaves.pop("x"), list(leaves.values()), torch.tensor(77)
    expected, _ = csp.reference.dense_block(x, params, drop_rate=0.3, seed=seed)
    (found,), _ = stage(dense_block(2, 24, 12, 20, 0.3), [x], params, seed=seed)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[:, 24:] == 0).double().mean() > 0.2


@pytest.mark.parametrize("pool", [True, False])
def test_transition(pool: bool) -> None:
    module = csp.reference.Transition(24, 10, pool="avg" if pool else None).double()
    x = torch.randn(2, 24, 7, 6, dtype=torch.float64)
    graph = transition(24, 10, pool)
    (found,), _ = stage(graph, [x], list(module.parameters()))
    torch.testing.assert_close(found, module(x), rtol=1e-12, atol=1e-12)
    assert [item.name for item in graph.order] == ["norm", "conv"]


def test_parameters_are_named_as_in_the_modules() -> None:
    """Of the layers that have the same parameters in the same order."""
    for module, graph in (
        (csp.reference.DenseBlock(2, 8, 4, 3), dense_block(2, 8, 4, 12)),
        (csp.reference.PostDenseBlock(2, 8, 4, 3), post_dense_block(8, 4, [12, 12])),
        (csp.reference.TwoWayDenseBlock(2, 8, 4, 1), two_way_dense_block(8, 4, [4, 4])),
        (csp.reference.CSPDenseStage(16, 10, 2, 4, 3), csp_stage(16, 8, 4, [12, 12], 8, 10)),
        (
            csp.reference.CSPDenseStage(16, 10, 2, 4, 3, layer="post"),
            csp_stage(16, 8, 4, [12] * 2, 16, 10, layer="post"),
        ),
    ):
        names = [key for key, _ in module.named_parameters()]
        kinds = {"conv": ["weight"], "norm": ["weight", "bias"]}
        ours = [f"{item.name}.{kind}" for item in graph.order for kind in kinds[item.kind]]
        assert ours == names
        shapes = [p.shape[0] for p in module.parameters() if p.dim() == 1][::2]
        assert list(graph.norms) == shapes
