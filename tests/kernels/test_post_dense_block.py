"""The post-activation and the two-way dense block in Triton, interpreted on CPU tensors: against the reference in
float64, called in place of the compiled operator, and beside that on the same arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from cases import BlockCase, Shape
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import post_dense_block as kernels

OPS = torch.ops.csp_kernels
# of two good implementations, relative in the 2-norm
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
pytestmark = pytest.mark.usefixtures("native")


@dataclass(frozen=True)
class Case(BlockCase):
    size: tuple[int, int, int] = (2, 5, 4)
    channels: int = 12
    growth: int = 8
    width: int = 16
    widths: tuple[int, ...] = ()  # of each layer, where they differ

    @property
    def shapes(self) -> dict[str, Shape]:
        shapes = super().shapes
        for i, width in enumerate(self.widths):  # those of a block that has this width, from layer i
            shapes |= {k: v for k, v in replace(self, widths=(), width=width).shapes.items() if k.startswith(f"{i}.")}
        return shapes


TWO = Case(layer="two_way")
CASES = {
    "post": Case(layers=3, growth=4),
    "post, float64": Case(dtype=torch.float64, frozen=(False, True, True)),
    "post, bfloat16": Case(dtype=torch.bfloat16),
    "post, float16": Case(dtype=torch.float16),
    "post, odd widths": Case(channels=5, growth=3, width=11, size=(1, 3, 7)),
    "post, frozen": Case(frozen=(True,)),
    "two_way": replace(TWO, growth=4),
    "two_way, widths": replace(TWO, widths=(5, 18), dtype=torch.float64),
    "two_way, bfloat16": replace(TWO, dtype=torch.bfloat16, layers=1),
    "two_way, float16": replace(TWO, dtype=torch.float16, layers=1),
    "two_way, odd widths": replace(TWO, channels=5, growth=6, width=11, size=(1, 3, 7), dtype=torch.float64),
    "two_way, frozen": replace(TWO, frozen=(True,), layers=1),
    "two_way, some frozen": replace(TWO, frozen=(True, False, False), dtype=torch.float64),
    "two_way, others frozen": replace(TWO, frozen=(False, False, False, True), dtype=torch.float64, layers=1),
}
layers = pytest.mark.parametrize("layer", ["post", "two_way"])


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, triton: None) -> None:
    case = CASES[name]
    if case.dtype.itemsize == 2 or cases.too_large(case, cases.measure(case, [0])):
        cases.compare(case)


@layers
def test_large_mean(layer: str, triton: None) -> None:
    """Much of float32 is lost whoever computes: all tensors together, no more than in the naive form."""
    case = Case(layer=layer, mean=1000.0, std=0.01, size=(2, 9, 8), growth=4, width=8, layers=1)
    pairs = [pair for errors in cases.measure(case, range(2)).values() for pair in errors]
    mine, naive = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    assert mine <= limit(naive, case.dtype, case.reduction)


Arguments = list[Any]  # of the operator: x, params, running, frozen, eps, two_way, winograd


def arguments(case: Case) -> Arguments:
    x, *params = case.leaves().values()
    x = x.contiguous(memory_format=torch.channels_last)
    eps = [10.0 ** -(3 + i % 3) for i in range(len(case.flags))]
    return [x, params, case.running(), [int(f) for f in case.flags], eps, case.layer == "two_way", 2]


def gradient(y: Tensor) -> Tensor:
    return torch.randn(y.shape).to(y.dtype).contiguous(memory_format=torch.channels_last)


def run(forward: Any, backward: Any, a: Arguments, grad: Tensor | None = None, keep: bool = True) -> list[Tensor]:
    """y, features, statistics, gradients of x and params."""
    torch.manual_seed(1)
    y, features, z, middle, stats = forward(*a, True)
    kept = (z, middle) if keep else ([], [])
    given = gradient(y) if grad is None else grad, a[0], features, *kept, stats
    before = [t.clone() for t in given if isinstance(t, Tensor)]
    gradients = backward(*given, *a[1:])
    assert all(map(torch.equal, before, [t for t in given if isinstance(t, Tensor)]))  # read only
    return [y, features, stats, *gradients]


def triton_run(a: Arguments, **options: Any) -> list[Tensor]:
    return run(kernels.forward, kernels.backward, a, **options)


@pytest.mark.parametrize("name", CASES)
def test_against_the_compiled_operator(name: str) -> None:
    """On the same arguments; and the layout of everything. In 16 bits up to the gradient of x, and with no ReLU that
    changes sides by rounding."""
    case = replace(CASES[name], kinks=CASES[name].dtype.itemsize > 2)
    a = arguments(case)
    mine, theirs = triton_run(a), run(OPS.post_dense_block, OPS.post_dense_block_backward, a)
    for t, u in zip(mine, theirs, strict=True):
        assert t.shape == u.shape and t.dtype == u.dtype and t.stride() == u.stride()
    names = ["y", "features", "stats", "x", *case.shapes]
    scales = cases.scales(dict(zip(names, theirs, strict=True)))
    count = len(names) if case.kinks else names.index("x") + 1
    errors = {k: error(t, u, scales[k]) for k, t, u in list(zip(names, mine, theirs, strict=True))[:count]}
    if any(case.flags):
        del errors["stats"]
    assert all(e <= CLOSE[case.dtype] for e in errors.values()), errors  # max() would skip a NaN


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute(layer: str, dtype: torch.dtype) -> None:
    a = arguments(Case(layer=layer, dtype=dtype, widths=(5, 18), frozen=(False, False, True), size=(1, 3, 4)))
    for mine, expected in zip(triton_run(a, keep=False), triton_run(a), strict=True):
        assert torch.equal(mine, expected)


@layers
def test_keeps_what_the_compiled_operator_does(layer: str) -> None:
    a = arguments(Case(layer=layer, widths=(5, 18)))
    for keep in (True, False):
        for mine, theirs in zip(kernels.forward(*a, keep), OPS.post_dense_block(*a, keep), strict=True):
            both = [[t] if isinstance(t, Tensor) else t for t in (mine, theirs)]
            assert [t.shape for t in both[0]] == [t.shape for t in both[1]]


@layers
def test_gradcheck(layer: str, triton: None) -> None:
    small = {"channels": 2, "growth": 2, "width": 2, "size": (2, 2, 3), "layers": 1 if layer == "two_way" else 2}
    case = Case(dtype=torch.float64, layer=layer, **small)
    leaves, running = case.leaves(), case.running()

    flat = torch.cat([t.flatten() for t in leaves.values()]).requires_grad_()  # at once: in few calls

    def function(flat: Tensor) -> Any:
        parts = flat.split([t.numel() for t in leaves.values()])
        return case(csp.ops, {k: p.view_as(t) for (k, t), p in zip(leaves.items(), parts, strict=True)}, running)[0]

    assert torch.autograd.gradcheck(function, flat, fast_mode=True)


@layers
def test_layouts(layer: str, triton: None) -> None:
    cases.check_layout(Case(dtype=torch.float64, layer=layer, layers=1), "slice of NHWC")


@layers
def test_channels_last_weights(layer: str) -> None:
    a = arguments(Case(layer=layer, layers=1))
    turned = [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in a[1]]
    first, second = triton_run(a), triton_run([a[0], turned, *a[2:]])
    for p, mine, expected in zip([*first[:3], a[0], *turned], second, first, strict=True):
        assert torch.equal(mine, expected) and mine.stride() == p.stride()


@layers
def test_repeats_bitwise(layer: str) -> None:
    a = arguments(Case(layer=layer, layers=1, dtype=torch.bfloat16))
    assert all(map(torch.equal, triton_run(a), triton_run(a)))


@layers
def test_empty_batch(layer: str) -> None:
    a = arguments(Case(layer=layer, size=(0, 5, 4)))
    y, _, stats, *gradients = triton_run(a)
    assert y.shape == (0, 28, 5, 4) and not stats.any() and not any(g.any() for g in gradients)


@layers
def test_precision(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 where less than float32's precision was asked for."""
    seen: list[str] = []
    launchers = [(kernels.mix, n) for n in ("forward", "backward")]
    for module, name in [*launchers, *((kernels.conv3x3, n) for n in ("forward", "dgrad", "wgrad"))]:
        launch = getattr(module, name)

        def record(*given: Any, launch: Any = launch) -> Any:
            seen.extend(a for a in given if isinstance(a, str))
            return launch(*given)

        monkeypatch.setattr(module, name, record)
    a = arguments(Case(layer=layer, layers=1))
    for winograd, precision in ((4, "tf32"), (2, "ieee")):
        triton_run([*a[:-1], winograd], keep=False)
        assert seen == [precision] * (6 if layer == "post" else 13)
        seen.clear()
