"""The CSP stage in Triton, interpreted on CPU tensors: against the reference in float64, called in place of the
compiled operator, and beside that on the same arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from cases import StageCase
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import csp_stage as kernels

OPS = torch.ops.csp_kernels
LAYERS, FUSIONS = ["pre", "post", "two_way"], ["csp", "first", "last"]
# of two good implementations, relative in the 2-norm
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
pytestmark = pytest.mark.usefixtures("native")


@dataclass(frozen=True)
class Case(StageCase):
    size: tuple[int, int, int] = (2, 5, 4)
    channels: int = 12
    part: int = 5
    growth: int = 6
    width: int = 8
    mid: int = 9
    out: int = 11


F64 = Case(dtype=torch.float64)
ONE = replace(F64, layers=1)
ODD = replace(ONE, size=(1, 7, 5), channels=9, part=3, growth=6, width=5, mid=3, out=5)
CASES = {}
for _layer in LAYERS:
    _pre = _layer == "pre"
    CASES |= {
        f"{_layer}, csp": replace(F64, layer=_layer),
        f"{_layer}, first": replace(ONE, layer=_layer, fusion="first"),
        f"{_layer}, last": replace(ONE, layer=_layer, fusion="last"),
        f"{_layer}, float32, no pool": Case(layer=_layer, pool=None, layers=1),
        f"{_layer}, bfloat16": Case(layer=_layer, dtype=torch.bfloat16, layers=1),
        f"{_layer}, float16, first": Case(layer=_layer, dtype=torch.float16, fusion="first", layers=1),
        f"{_layer}, odd": replace(ODD, layer=_layer, fusion="first" if _pre else "csp"),
        f"{_layer}, no bypass": replace(ONE, layer=_layer, part=0, fusion="csp" if _pre else "first", pool=None),
        f"{_layer}, recompute": replace(F64, layer=_layer, options={"recompute": "bottleneck"}, fusion="last"),
        f"{_layer}, frozen": replace(ONE, layer=_layer, frozen=(True,)),
        f"{_layer}, some frozen": replace(F64, layer=_layer, frozen=(True, False, False)),
    }
# statistics of the features that only the transition needs; of all but the transition
CASES["pre, only the transition"] = replace(F64, frozen=(True, True, True, True, False), fusion="first")
CASES["pre, all but the transition"] = replace(F64, frozen=(False, False, False, False, True), fusion="first")


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, triton: None) -> None:
    case = CASES[name]
    if case.dtype.itemsize == 2 or cases.too_large(case, cases.measure(case, [0])):
        cases.compare(case)


@pytest.mark.parametrize("layer", LAYERS)
def test_large_mean(layer: str, triton: None) -> None:
    """Much of float32 is lost whoever computes: all tensors together, no more than in the naive form."""
    case = Case(layer=layer, mean=1000.0, std=0.01, size=(2, 9, 8), layers=1)
    pairs = [pair for errors in cases.measure(case, range(2)).values() for pair in errors]
    mine, naive = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    assert mine <= limit(naive, case.dtype, case.reduction)


Arguments = list[Any]  # of the operator, without keep and keep_bottleneck


def arguments(case: Case) -> Arguments:
    x, *params = case.leaves().values()
    x = x.contiguous(memory_format=torch.channels_last)
    eps = [10.0 ** -(3 + i % 3) for i in range(len(case.flags))]
    kind = LAYERS.index(case.layer), FUSIONS.index(case.fusion), case.pool is not None
    return [x, params, case.running(), [int(f) for f in case.flags], eps, case.part, *kind, 2]


def same(mine: list[Tensor], expected: list[Tensor]) -> bool:
    """Bitwise; NaN is NaN: padding."""
    return all(torch.equal(t.nan_to_num(7.0), u.nan_to_num(7.0)) for t, u in zip(mine, expected, strict=True))


def gradient(y: Tensor) -> Tensor:
    return torch.randn(y.shape).to(y.dtype).contiguous(memory_format=torch.channels_last)


def run(forward: Any, backward: Any, a: Arguments, keep_bottleneck: bool = True) -> list[Tensor]:
    """y, statistics, gradients of x and params."""
    torch.manual_seed(1)
    y, *kept, stats = forward(*a, True, keep_bottleneck)
    given = [gradient(y), a[0], *kept, stats]
    tensors = [t for t in given if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    gradients = backward(*given, *a[1:])
    assert same(tensors, before)  # read only
    return [y, stats, *gradients]


def triton_run(a: Arguments, keep_bottleneck: bool = True) -> list[Tensor]:
    return run(kernels.forward, kernels.backward, a, keep_bottleneck)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{layer}, {kind}" for layer in LAYERS for kind in ("csp", "bfloat16", "some frozen")),
        "pre, only the transition",
    ],
)
def test_against_the_compiled_operator(name: str) -> None:
    """On the same arguments; and the layout of everything. In 16 bits up to the gradient of x, and with no ReLU that
    changes sides by rounding."""
    case = replace(CASES[name], kinks=CASES[name].dtype.itemsize > 2)
    a = arguments(case)
    mine, theirs = triton_run(a), run(OPS.csp_stage, OPS.csp_stage_backward, a)
    for t, u in zip(mine, theirs, strict=True):
        assert t.shape == u.shape and t.dtype == u.dtype and t.stride() == u.stride()
    names = ["y", "stats", "x", *case.shapes]
    scales = cases.scales(dict(zip(names, theirs, strict=True)))
    count = len(names) if case.kinks else names.index("x") + 1
    errors = {k: error(t, u, scales[k]) for k, t, u in list(zip(names, mine, theirs, strict=True))[:count]}
    if any(case.flags):
        del errors["stats"]
    assert all(e <= CLOSE[case.dtype] for e in errors.values()), errors  # max() would skip a NaN


@pytest.mark.parametrize("layer", LAYERS)
def test_recompute(layer: str) -> None:
    a = arguments(Case(layer=layer, size=(1, 3, 4), dtype=torch.bfloat16))
    assert same(triton_run(a, False), triton_run(a))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_keeps_what_the_compiled_operator_does(layer: str, fusion: str) -> None:
    a = arguments(Case(layer=layer, fusion=fusion, size=(0, 2, 3)))
    b = arguments(Case(layer=layer, fusion=fusion, size=(1, 2, 3), layers=1))
    for given, keep in ((a, (False, False)), (a, (True, False)), (b, (True, True))):
        for mine, theirs in zip(kernels.forward(*given, *keep), OPS.csp_stage(*given, *keep), strict=True):
            both = [[t] if isinstance(t, Tensor) else t for t in (mine, theirs)]
            assert [(t.shape, t.stride()) for t in both[0]] == [(t.shape, t.stride()) for t in both[1]]


@pytest.mark.parametrize("layer", LAYERS)
def test_inference(layer: str, triton: None) -> None:
    cases.check_inference(Case(layer=layer, frozen=(True,), dtype=torch.bfloat16))


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer: str, triton: None) -> None:
    small = {"channels": 3, "part": 1, "growth": 2, "width": 2, "mid": 2, "out": 2, "size": (2, 2, 3), "layers": 1}
    case = Case(dtype=torch.float64, layer=layer, **small)
    leaves, running = case.leaves(), case.running()

    flat = torch.cat([t.flatten() for t in leaves.values()]).requires_grad_()  # at once: in few calls

    def function(flat: Tensor) -> Any:
        parts = flat.split([t.numel() for t in leaves.values()])
        return case(csp.ops, {k: p.view_as(t) for (k, t), p in zip(leaves.items(), parts, strict=True)}, running)[0]

    assert torch.autograd.gradcheck(function, flat, fast_mode=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_layouts(layer: str, triton: None) -> None:
    cases.check_layout(Case(dtype=torch.float64, layer=layer, layers=1), "slice of NHWC")


@pytest.mark.parametrize("layer", LAYERS)
def test_empty_batch(layer: str) -> None:
    y, stats, *gradients = triton_run(arguments(Case(layer=layer, size=(0, 5, 4))))
    assert y.shape == (0, 11, 2, 2) and not stats.any() and not any(g.any() for g in gradients)
