"""Stages in Triton, interpreted on CPU tensors: programs of every builder, of joins that none has, and of random
graphs, against the reference in float64."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stage_cases as cases
import torch
from stage_cases import GRAPHS, KINDS, Case, Result, arguments, order_of, twin
from tolerances import error

import csp_kernels as csp
from csp_kernels.kernels import conv3x3, mix
from csp_kernels.kernels import stage as kernels
from csp_kernels.ops._node import TRITON_ALONE
from csp_kernels.stage.build import Builder
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.program import Bottleneck, Product, Wanted
from csp_kernels.vocabulary import RECOMPUTE

sys.path.insert(0, str(Path(__file__).parents[1] / "stage"))

from random_graphs import RandomGraph, some

TRITON = cases.Operators(kernels.forward, kernels.backward)
names = pytest.mark.parametrize("name", GRAPHS)
kinds = pytest.mark.parametrize("name", KINDS)


def compare(case: Case) -> None:
    cases.compare(TRITON, case)


def triton(case: Case, a: cases.Arguments, winograd: int = 2) -> Result:
    return cases.run(TRITON, case, a, winograd)


# --- against the reference ---


@names
def test_in_float64(name: str) -> None:
    compare(Case(GRAPHS[name]))


@names
def test_in_float32(name: str) -> None:
    compare(Case(GRAPHS[name], dtype=torch.float32))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    compare(Case(GRAPHS[name], dtype=dtype))


@kinds
@pytest.mark.parametrize("frozen", [(True,), (True, False), (False, True), (False, False, True)], ids=str)
def test_frozen_norms(name: str, frozen: tuple[bool, ...]) -> None:
    compare(Case(GRAPHS[name], frozen))


@names
def test_large_mean(name: str) -> None:
    cases.all_together(TRITON, Case(GRAPHS[name], dtype=torch.float32, mean=1000.0, std=0.01, size=(2, 9, 8)))


def test_large_means_are_subtracted_as_they_are() -> None:
    """A norm holds what float32 loses of its mean: else what it gives is off by 0.3 % of a standard deviation."""
    build = Builder(6)
    build.write([build.read(0, build.norm(6))])
    case = Case(build.graph(), dtype=torch.float32, mean=1000.0, std=0.01)
    a = arguments(case)
    assert error(triton(case, a).outputs[0], twin(case, a, True).outputs[0]) < 1e-5


SIZES = {"narrow": (3, 4, 2), "even": (3, 4, 6), "many pixels": (1, 19, 17), "small maps": (16, 2, 2)}


@kinds
@pytest.mark.parametrize("size", SIZES)
def test_sizes(name: str, size: str) -> None:
    compare(Case(GRAPHS[name], size=SIZES[size]))


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [(True,), (False,), (True, False)], ids=["frozen", "not", "some"])
def test_inference(name: str, dtype: torch.dtype, frozen: tuple[bool, ...]) -> None:
    """Without gradients: norms folded into products, bottlenecks, nothing kept."""
    cases.compare_inference(TRITON, Case(GRAPHS[name], frozen, dtype=dtype))


def test_inference_has_what_is_folded() -> None:
    """The programs of test_inference have both forms of what only inference has."""
    steps = [compile_stage(GRAPHS[n], (True,) * len(GRAPHS[n].norms)).forward for n in ("dense", "partial, csp, post")]
    assert any(isinstance(step, Bottleneck) for step in steps[0])
    assert any(isinstance(step, Product) and step.act != "identity" for step in steps[1])


def test_terms_of_a_sum_have_gradients_of_their_own() -> None:
    """Both begin as the sum's; the 3x3 behind the second then adds to the first's while it reads its own."""
    build = Builder(8)
    first = build.conv([build.read(0)], 8, 3)
    second = build.conv([build.read(first)], 8, 3)
    total = build.sum([build.read(first), build.read(second)])
    build.write([build.read(total, build.norm(8), "relu")])
    compare(Case(build.graph()))


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = RandomGraph(rng, native=True).graph
    wanted = Wanted.all(graph)
    if rng.random() < 0.5:
        wanted = Wanted(some(rng, wanted.inputs), some(rng, wanted.nodes), some(rng, wanted.norms))
    frozen = tuple(rng.random() < 0.3 for _ in graph.norms) or (False,)
    return Case(graph, frozen, rng.choice(RECOMPUTE), size=(2, 6, 5), wanted=wanted)


@pytest.mark.parametrize("seed", range(130))
def test_random_graphs(seed: int) -> None:
    case = random_case(seed)
    a = arguments(case)
    got, exact = triton(case, a), twin(case, a, True)
    scale = max([1.0, *(g.abs().max().item() for g in exact.gradients)])
    for t, other in zip([*got.outputs, got.stats], [*exact.outputs, exact.stats], strict=True):
        torch.testing.assert_close(t, other, rtol=1e-9, atol=1e-9)
    for g, other in zip(got.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(g, other, rtol=1e-8, atol=1e-9 * scale)


# --- what is kept, wanted, dropped ---


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize("name", ["dropout", "post", "two_way", "stage, pre, csp", "stage, post, last", "joins"])
def test_recompute(name: str, recompute: str) -> None:
    """Bitwise what is computed without it; where values are together in memory decides in which order they are summed,
    so up to rounding."""
    case = Case(GRAPHS[name], (False, False, True))
    a = arguments(case)
    kept, again = triton(case, a), triton(replace(case, recompute=recompute), a)
    assert cases.same_but_for_rounding(again.tensors, kept.tensors)


@kinds
def test_unwanted_gradients(name: str) -> None:
    """Of everything in turn: the others as ever."""
    case = Case(GRAPHS[name], (False, True))
    a = arguments(case)
    full = triton(case, a)
    everything = Wanted.all(case.graph)
    halves = [Wanted((), everything.nodes[::2], everything.norms[1::2]), Wanted(everything.inputs, (), ())]
    halves += [Wanted((), (), everything.norms), Wanted((), everything.nodes, ())]
    order = sorted(order_of(case, case.program))
    for wanted in halves:
        some_wanted = replace(case, wanted=wanted)
        got = triton(some_wanted, a)
        for number, g in zip(sorted(order_of(some_wanted, some_wanted.program)), got.gradients, strict=True):
            assert error(g, full.gradients[order.index(number)]) <= 1e-12


def test_dropout_drops_what_the_reference_does() -> None:
    case = Case(GRAPHS["dropout"], dtype=torch.float32)
    a = arguments(case)
    mine, theirs = (r.outputs[0][:, 12:] == 0 for r in (triton(case, a), twin(case, a, False)))
    assert torch.equal(mine, theirs) and 0.2 < mine.float().mean().item() < 0.6


# --- memory ---


@pytest.mark.parametrize("name", ["concat, one input", "dense", "partial, csp, post, pool", "two_way", "joins"])
def test_reads_slices_and_channels_last_weights(name: str) -> None:
    case = Case(GRAPHS[name], dtype=torch.float32)
    a = arguments(case)
    first, second = triton(case, a), triton(case, cases.from_slices(a))
    assert all(map(torch.equal, first.tensors, second.tensors))


@kinds
def test_repeats_bitwise(name: str) -> None:
    case = Case(GRAPHS[name], dtype=torch.bfloat16)
    a = arguments(case)
    assert all(map(torch.equal, triton(case, a).tensors, triton(case, a).tensors))


@kinds
def test_empty_batch(name: str) -> None:
    full = Case(GRAPHS[name])
    case, a = replace(full, size=(0, 5, 4)), arguments(full)
    a = replace(a, inputs=[t[:0] for t in a.inputs], grads=[g[:0] for g in a.grads])
    got = triton(case, a)
    assert not any(t.any() for t in got.tensors)


@pytest.mark.parametrize(
    ("dtype", "winograd", "expected"),
    [
        (torch.float32, 4, "tf32"),
        (torch.float32, 4 + TRITON_ALONE, "tf32"),
        (torch.float32, 2, "ieee"),
        (torch.float32, 2 + TRITON_ALONE, "ieee"),
        (torch.bfloat16, 4, "ieee"),
        (torch.float64, 2, "ieee"),
    ],
    ids=str,
)
def test_precision(dtype: torch.dtype, winograd: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 where less than float32's precision was asked for."""
    case, seen = Case(GRAPHS["dense"], dtype=dtype, recompute="bottleneck"), []
    launchers = [(mix, n) for n in ("forward", "backward")] + [(conv3x3, n) for n in ("forward", "dgrad", "wgrad")]
    for module, name in launchers:
        launch = getattr(module, name)

        def record(*given: Any, launch: Any = launch) -> Any:
            seen.extend(g for g in given if isinstance(g, str))
            return launch(*given)

        monkeypatch.setattr(module, name, record)
    triton(case, arguments(case), winograd)
    assert seen == [expected] * 12  # two layers: forward, once more the 1x1, and both gradients of each


# --- through csp.ops ---


def test_a_missing_gradient_counts_as_zero(operators: None) -> None:
    """Of an output that the loss does not read; an input that backward does not need."""
    case = Case(GRAPHS["concat, three inputs, two outputs"])
    a = arguments(case)
    results = []
    for run in (csp.ops.stage, cases.reference):
        leaves = [t.detach().requires_grad_() for t in (*a.inputs, *a.params)]
        outputs, _ = run(case.graph, leaves[:3], leaves[3:], eps=case.eps)
        results.append(torch.autograd.grad(outputs[1].square().sum(), leaves))
    assert all(error(t, u) <= 1e-12 for t, u in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["concat, silu", "dense", "two_way", "partial, csp, post, pool", "joins"])
def test_through_autograd(name: str, operators: None) -> None:
    """What autograd keeps, and gives back as memory that nobody reads, is enough; in any memory format."""
    case = Case(GRAPHS[name], (False, True))
    a = arguments(case)
    a.inputs = [t.contiguous() for t in a.inputs]
    exact = twin(case, a, True)
    leaves = [t.detach().requires_grad_() for t in (*a.inputs, *a.params)]
    count = len(a.inputs)
    outputs, _ = csp.ops.stage(
        case.graph, leaves[:count], leaves[count:], a.running, frozen=case.flags, eps=case.eps
    )  # fmt: skip
    found = torch.autograd.grad(outputs, leaves, a.grads)
    assert all(y.is_contiguous() for y in outputs)
    assert all(
        error(t, u) <= 1e-12 for t, u in zip([*outputs, *found], [*exact.outputs, *exact.gradients], strict=True)
    )
