"""Stages of every builder, and of joins that none has, by the operators on the device against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import stage_cases as cases
import torch
from stage_cases import GRAPHS, Arguments, Case, arguments, twin
from tolerances import error

import csp_kernels as csp
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.program import Wanted
from csp_kernels.stage.text import encode
from csp_kernels.vocabulary import RECOMPUTE

OPS = torch.ops.csp_kernels
names = pytest.mark.parametrize("name", GRAPHS)
SIZES = {"narrow": (3, 4, 2), "many pixels": (2, 37, 29), "small maps": (16, 2, 2)}


@pytest.fixture
def operators(device: str) -> cases.Operators:
    return cases.Operators(OPS.stage.default, OPS.stage_backward.default, padding=device == "cuda")


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training(name: str, dtype: torch.dtype, operators: cases.Operators) -> None:
    cases.compare(operators, Case(GRAPHS[name], dtype=dtype))


@names
@pytest.mark.parametrize("frozen", [(True,), (True, False), (False, True), (False, False, True)], ids=str)
def test_frozen_norms(name: str, frozen: tuple[bool, ...], operators: cases.Operators) -> None:
    cases.compare(operators, Case(GRAPHS[name], frozen))


@names
@pytest.mark.parametrize("size", SIZES)
def test_sizes(name: str, size: str, operators: cases.Operators) -> None:
    cases.compare(operators, Case(GRAPHS[name], size=SIZES[size]))


@names
def test_large_mean(name: str, operators: cases.Operators) -> None:
    case = Case(GRAPHS[name], dtype=torch.float32, mean=1000.0, std=0.01, size=(2, 9, 8))
    cases.all_together(operators, case)


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [(True,), (False,), (True, False)], ids=["frozen", "not", "some"])
def test_inference(name: str, dtype: torch.dtype, frozen: tuple[bool, ...], operators: cases.Operators) -> None:
    cases.compare_inference(operators, Case(GRAPHS[name], frozen, dtype=dtype))


@names
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_recompute(name: str, recompute: str, operators: cases.Operators) -> None:
    case = Case(GRAPHS[name], (False, False, True))
    a = arguments(case)
    kept, again = (cases.run(operators, c, a) for c in (case, replace(case, recompute=recompute)))
    assert cases.same_but_for_rounding(again.tensors, kept.tensors)


@names
def test_gradients_of_inputs_alone(name: str, operators: cases.Operators) -> None:
    case = Case(GRAPHS[name], (False, True))
    a = arguments(case)
    wanted = Wanted.all(case.graph).inputs
    full, some = (cases.run(operators, c, a) for c in (case, replace(case, wanted=Wanted(wanted))))
    assert len(some.gradients) == len(wanted)
    assert cases.same_but_for_rounding(some.gradients, full.gradients[: len(wanted)])


@names
def test_repeats_bitwise(name: str, operators: cases.Operators) -> None:
    case = Case(GRAPHS[name], dtype=torch.bfloat16)
    a = arguments(case)
    first, second = (cases.run(operators, case, a).tensors for _ in range(2))
    assert all(map(torch.equal, first, second))


@names
def test_reads_slices_and_channels_last_weights(name: str, operators: cases.Operators, device: str) -> None:
    """Gradients too where Triton reads them: the C++ operator takes packed ones."""
    case = Case(GRAPHS[name])
    a = arguments(case)
    first, second = (cases.run(operators, case, b).tensors for b in (a, cases.from_slices(a, device == "cuda")))
    assert cases.same_but_for_rounding(second, first)


@names
def test_empty_batch(name: str, operators: cases.Operators) -> None:
    full = Case(GRAPHS[name])
    a = arguments(full)
    a = Arguments([t[:0] for t in a.inputs], a.params, a.running, [g[:0] for g in a.grads])
    assert not any(t.any() for t in cases.run(operators, replace(full, size=(0, 5, 4)), a).tensors)


@pytest.mark.parametrize("graph", [GRAPHS["dropout"], cases.joins(16)], ids=["dropout", "joins"])
def test_opcheck(graph: Graph) -> None:
    """Widths without padding: opcheck compares what two runs have left there."""
    case = Case(graph, (True, False))
    a = arguments(case)
    given = [a.inputs, a.params, a.running, cases.seed(), encode(case.program), case.eps, 2]
    torch.library.opcheck(OPS.stage.default, given)


@pytest.mark.parametrize("name", ["dense", "two_way", "partial, csp, post, pool", "concat, silu", "joins"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_through_autograd(name: str, layout: torch.memory_format) -> None:
    """csp.ops.stage, and a gradient that is missing: of every output but the first."""
    case = Case(GRAPHS[name], (False, True))
    a = arguments(case)
    a.grads[1:] = [torch.zeros_like(g) for g in a.grads[1:]]
    exact = twin(case, a, True)
    count = len(a.inputs)
    leaves = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in (*a.inputs, *a.params)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    outputs, _ = csp.ops.stage(
        case.graph, leaves[:count], leaves[count:], a.running, frozen=case.flags, eps=case.eps
    )  # fmt: skip
    found = torch.autograd.grad(outputs[0], leaves, a.grads[0], materialize_grads=True)
    assert all(y.is_contiguous(memory_format=layout) for y in outputs)
    assert cases.same_but_for_rounding(outputs, exact.outputs)
    for t, other in zip(found, exact.gradients, strict=True):
        assert error(t, other) <= 1e-12 if other.any() else not t.any()


def test_dropout_drops_what_the_reference_does(operators: cases.Operators) -> None:
    case = Case(GRAPHS["dropout"], dtype=torch.float32)
    a = arguments(case)
    mine, theirs = (r.outputs[0][:, 12:] == 0 for r in (cases.run(operators, case, a), twin(case, a, False)))
    assert torch.equal(mine, theirs) and 0.2 < mine.float().mean().item() < 0.6
