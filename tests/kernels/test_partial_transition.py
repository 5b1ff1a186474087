"""The partial transition in Triton, interpreted on CPU tensors: called in place of the compiled operator, against the
reference in float64, and beside the compiled operator on the same arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import TransitionCase
from tolerances import error
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import partial_transition as kernels
from csp_kernels.kernels.launch import Geometry, Norm, pixels_of
from csp_kernels.ops._node import padded
from csp_kernels.ops.partial_transition import FUSIONS, raw_sizes

OPS = torch.ops.csp_kernels
# of two good implementations, relative in the 2-norm
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
pytestmark = pytest.mark.usefixtures("native")


def Case(**given: Any) -> TransitionCase:
    return TransitionCase(**{"size": (2, 5, 7), "part": 5, "dense": 12, "mid": 9, "out": 11, **given})


KINDS = {
    f"{fusion}, {order}, {pool}": Case(fusion=fusion, order=order, pool=pool)
    for fusion in ("csp", "first", "last")
    for order in ("post", "pre")
    for pool in ("avg", None)
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_reference(kind: str, dtype: torch.dtype, triton: None) -> None:
    case = replace(KINDS[kind], dtype=dtype, kinks=dtype.itemsize > 2)
    if cases.too_large(case, cases.measure(case, [0])):
        cases.compare(case)


@kinds
@pytest.mark.parametrize("mode", ["large mean", "no bypass", "16 channels", "even maps"])
def test_more_against_the_reference(kind: str, mode: str, triton: None) -> None:
    case = {
        "large mean": replace(KINDS[kind], mean=1000.0, std=0.01, size=(2, 9, 8)),
        "no bypass": replace(KINDS[kind], part=0, dtype=torch.float64),
        "16 channels": replace(KINDS[kind], part=16, dense=32, mid=16, out=16, size=(1, 3, 4)),
        "even maps": replace(KINDS[kind], size=(3, 4, 2), dtype=torch.float64),
    }[mode]
    if cases.too_large(case, cases.measure(case, [0])):
        cases.compare(case)


@kinds
@pytest.mark.parametrize("frozen", [(True,), (True, False), (False, True)], ids=["all", "t", "u"])
def test_frozen_norms(kind: str, frozen: tuple[bool, ...], triton: None) -> None:
    case = replace(KINDS[kind], dtype=torch.float64, frozen=frozen)
    failures = cases.too_large(case, cases.measure(case, [0]))
    assert not failures, failures


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(kind: str, dtype: torch.dtype, triton: None) -> None:
    cases.check_inference(replace(KINDS[kind], dtype=dtype, frozen=(True,)))


def arguments(case: TransitionCase) -> list[Any]:
    """Of the operator: part, dense, params, running, frozen, eps, fusion, post, pool."""
    part, dense, *params = [*([] if case.part else [None]), *case.leaves().values()]
    part, dense = (None if x is None else x.contiguous(memory_format=torch.channels_last) for x in (part, dense))
    flags = [int(f) for f in case.flags]
    eps = [1e-5, 1e-3][: len(flags)]
    options = FUSIONS.index(case.fusion), case.order == "post", case.pool is not None
    return [part, dense, params, case.running(), flags, eps, *options]


def gradient(y: Tensor) -> Tensor:
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return values.to(y.dtype).contiguous(memory_format=torch.channels_last)


def run(forward: Any, backward: Any, a: list[Any]) -> list[Tensor]:
    """y, statistics, gradients of part, dense and params."""
    y, raw_t, raw_u, stats = forward(*a, True)
    assert (raw_t.numel(), raw_u.numel()) == raw_sizes(a[1], a[2], *a[6:])
    if forward is kernels.forward:
        for raw, weight in ((raw_t, a[2][2]), (raw_u, a[2][-1])):
            raw.view(-1, padded(weight.shape[0]))[:, weight.shape[0] :] = torch.nan  # what the rows are padded with
    grad = gradient(y)
    read = [raw_t.nan_to_num(), raw_u.nan_to_num(), stats.clone(), grad.clone(), a[1].clone()]
    gradients = backward(grad, *a[:4], raw_t, raw_u, stats, *a[4:])
    assert all(map(torch.equal, read, [raw_t.nan_to_num(), raw_u.nan_to_num(), stats, grad, a[1]]))
    return [y, stats, *gradients]


def triton_run(a: list[Any]) -> list[Tensor]:
    return run(kernels.forward, kernels.backward, a)


@kinds
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_against_the_compiled_operator(kind: str, dtype: torch.dtype) -> None:
    """On the same arguments; and the layout of everything. In 16 bits with no ReLU that changes sides by rounding."""
    case = replace(KINDS[kind], dtype=dtype, kinks=dtype.itemsize > 2, part=0 if dtype == torch.float64 else 5)
    a = arguments(case)
    mine, theirs = triton_run(a), run(OPS.partial_transition, OPS.partial_transition_backward, a)
    for t, u in zip(mine, theirs, strict=True):
        assert t.shape == u.shape and t.dtype == u.dtype and t.stride() == u.stride()
    names = ["y", "stats", "part", "dense", *case.shapes]
    scales = cases.scales(dict(zip(names, theirs, strict=True)))
    errors = {k: error(t, u, scales[k]) for k, t, u in zip(names, mine, theirs, strict=True)}
    assert all(e <= CLOSE[dtype] for e in errors.values()), errors


@kinds
def test_nothing_is_kept_unless_asked(kind: str) -> None:
    a = arguments(KINDS[kind])
    (y, *kept, stats), (expected, _, _, other) = kernels.forward(*a, False), kernels.forward(*a, True)
    assert torch.equal(y, expected) and torch.equal(stats, other) and not any(t.numel() for t in kept)


@pytest.mark.parametrize("fusion", ["first", "csp", "last"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_gradcheck(fusion: str, order: str, triton: None) -> None:
    small = {"part": 2, "dense": 3, "mid": 2, "out": 2, "size": (2, 2, 3)}
    case = Case(dtype=torch.float64, fusion=fusion, order=order, **small)
    leaves, running = case.leaves(), case.running()

    def function(*tensors: Tensor) -> Any:
        return case(csp.ops, dict(zip(leaves, tensors, strict=True)), running)[0]

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves.values()], fast_mode=True)


@pytest.mark.parametrize("kind", ["csp, post, avg", "first, pre, avg", "last, post, avg"])
def test_layouts(kind: str, triton: None) -> None:
    cases.check_layout(replace(KINDS[kind], dtype=torch.float64), "slice of NHWC")


@pytest.mark.parametrize("kind", ["csp, post, avg", "csp, pre, avg", "first, pre, None", "last, post, None"])
def test_repeats_bitwise(kind: str) -> None:
    a = arguments(replace(KINDS[kind], dtype=torch.bfloat16))
    assert all(map(torch.equal, triton_run(a), triton_run(a)))


@kinds
def test_empty_batch(kind: str) -> None:
    a = arguments(replace(KINDS[kind], size=(0, 6, 5)))
    y, stats, *gradients = triton_run(a)
    assert y.shape[0] == 0 and not stats.any() and not any(g.any() for g in gradients)


# --- the transition inside of a stage ---


@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
@pytest.mark.parametrize("bypass", [True, False])
def test_grown_slices(fusion: str, bypass: bool, buffers: Any) -> None:
    """Post-activation layers: the dense part is what entered them and, raw, what they added."""
    case = Case(fusion=fusion, dense=8, part=5 if bypass else 0)
    part, dense, params, running, *options = arguments(replace(case, dense=8 + 6))
    raw = pixels_of(dense)[:, 8:]
    affine = Norm(torch.randn(6) * 0.2, torch.rand(6) + 0.5, torch.randn(6) * 0.3)
    centred = raw - affine.mean
    pre = centred * affine.scale + affine.shift
    images = dense.clone(memory_format=torch.channels_last)
    pixels_of(images)[:, 8:] = pre.relu()
    a = [part, images, params, running, *options]
    y, stats, *expected = triton_run(a)

    out = [None if part is None else buffers.empty(70, 5, torch.float32)]
    out += [buffers.empty(70, n, torch.float32) for n in (8, 6)]
    at = [None if part is None else buffers.put(pixels_of(part)), buffers.put(pixels_of(dense)[:, :8])]
    again = torch.zeros_like(stats)
    grown = kernels.Grown(buffers.put(raw), affine)
    call = kernels.PartialTransition(*at, grown, params, running, *options, Geometry(*case.size), again, "ieee")
    kept = [torch.empty(size) for size in raw_sizes(dense, params, *options[2:])]
    got = buffers.empty(*pixels_of(y).shape, torch.float32)
    call.forward(got, *kept)
    gradients, sums = call.backward(buffers.put(pixels_of(gradient(y))), *kept, *out)
    wanted = pixels_of(expected[1])
    dn = torch.where(pre > 0, wanted[:, 8:], 0.0)
    pairs = [(got, pixels_of(y)), (again, stats), (out[1], wanted[:, :8]), (out[2], dn * affine.scale)]
    pairs += [(sums, torch.stack((dn.sum(0), (dn * centred).sum(0))))]
    pairs += [(g, e.flatten(1) if e.dim() == 4 else e) for g, e in zip(gradients, expected[2:], strict=True)]
    pairs += [] if part is None else [(out[0], pixels_of(expected[0]))]
    assert all(error(*pair) <= 1e-5 for pair in pairs)


@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_owed_is_left_to_the_dense_block(fusion: str, frozen: bool) -> None:
    """Pre-activation layers: they know the dense part's statistics, and pay."""
    case = Case(fusion=fusion, order="pre", dtype=torch.float64, frozen=(frozen,))
    part, dense, params, running, *options = arguments(case)
    y, stats, *expected = triton_run([part, dense, params, running, *options])

    views, again = [pixels_of(part), pixels_of(dense)], torch.zeros_like(stats)
    known = torch.stack((views[1].mean(0), views[1].var(0, correction=0)))
    call = kernels.PartialTransition(
        *views, None, params, running, *options, Geometry(*case.size), again, "ieee", None if frozen else known
    )
    kept = [dense.new_empty(size) for size in raw_sizes(dense, params, *options[2:])]
    got, out = torch.empty_like(pixels_of(y)), [torch.empty_like(v) for v in views]
    owed = torch.full((2, 20), 0.5, dtype=torch.float64)
    call.forward(got, *kept)
    gradients, sums = call.backward(pixels_of(gradient(y)), *kept, *out, None, owed[:, 4:16])
    mean, slope = owed[:, 4:16] - 0.5
    at = case.part if fusion == "first" else 0
    assert frozen or torch.equal(again[:, at : at + 12], known)  # not computed once more
    assert sums is None and (owed[:, :4] == 0.5).all() and (owed[:, 16:] == 0.5).all()
    paid = out[1] - mean - (views[1] - known[0]) * slope
    pairs = [(got, pixels_of(y)), (again, stats), (out[0], pixels_of(expected[0])), (paid, pixels_of(expected[1]))]
    pairs += [(g, e.flatten(1) if e.dim() == 4 else e) for g, e in zip(gradients, expected[2:], strict=True)]
    assert all(error(*pair) <= 1e-12 for pair in pairs)
