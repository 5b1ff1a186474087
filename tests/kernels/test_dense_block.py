"""The dense block in Triton, interpreted on CPU tensors: against the compiled operator and the reference in float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import dense_block as kernels

OPS = torch.ops.csp_kernels
needs_native = pytest.mark.usefixtures("native")
# of two good implementations, relative in the 2-norm
CLOSE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Case:
    layers: int = 2
    channels: int = 12
    growth: int = 8
    width: int = 16
    size: tuple[int, int, int] = (2, 5, 4)  # N, H, W
    dtype: torch.dtype = torch.float32
    frozen: tuple[bool, ...] = (False,)  # repeated over the norms
    drop_rate: float = 0.0
    keep: bool = True
    mean: float = 0.0
    std: float = 1.0

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def total(self) -> int:
        return self.channels + self.layers * self.growth

    @property
    def flags(self) -> list[int]:
        return [int(self.frozen[i % len(self.frozen)]) for i in range(2 * self.layers)]


class Arguments(NamedTuple):
    """Of the operator, in its order."""

    x: Tensor
    params: list[Tensor]
    running: list[Tensor]
    frozen: list[int]
    eps: list[float]
    seed: Tensor | None
    drop_rate: float
    keep_bottleneck: bool
    winograd: int


def image(channels: int, case: Case) -> Tensor:
    n, h, w = case.size
    return torch.randn(n, channels, h, w).to(case.dtype).contiguous(memory_format=torch.channels_last)


def arguments(case: Case) -> Arguments:
    params: list[Tensor] = []
    running: list[Tensor] = []
    for i, flag in enumerate(case.flags):
        k = case.width if i % 2 else case.channels + i // 2 * case.growth
        shape = (case.growth, case.width, 3, 3) if i % 2 else (case.width, k, 1, 1)
        fan = shape[1] * shape[2] * shape[3]
        params += [torch.rand(k) + 0.5, torch.randn(k) * 0.3, torch.randn(shape) / fan**0.5]
        running += [torch.randn(k) * 0.2, torch.rand(k) + 0.5] if flag else []
    x = image(case.channels, case) * case.std + case.mean
    seed = torch.tensor([0x1234567890ABCDE]) if case.drop_rate else None
    cast = [t.to(case.wide) for t in params], [t.to(case.wide) for t in running]
    return Arguments(x, *cast, case.flags, [1e-5, 1e-3] * case.layers, seed, case.drop_rate, case.keep, 2)


class Result(NamedTuple):
    y: Tensor
    z: list[Tensor]
    stats: Tensor
    gradients: list[Tensor]  # of x and params


def run(forward: Callable[..., Any], backward: Callable[..., Any], case: Case, a: Arguments, grad: Tensor) -> Result:
    y, z, stats = forward(*a)
    kept = [t.clone() for t in z]
    if forward is kernels.forward:
        for t in kept:
            t[:, case.width :] = torch.nan  # what the rows are padded with
    _, params, running, frozen, eps, seed, drop_rate, _, winograd = a
    before = y.clone(), grad.clone(), stats.clone()
    given = grad, y, kept, stats, params, running, frozen, eps, seed, drop_rate, case.channels, winograd
    gradients = backward(*given)
    assert all(torch.equal(t, u) for t, u in zip((y, grad, stats), before, strict=True))  # read only
    return Result(y, [t[:, : case.width] for t in z], stats, gradients)


def triton(case: Case, a: Arguments, grad: Tensor) -> Result:
    return run(kernels.forward, kernels.backward, case, a, grad)


def compiled(case: Case, a: Arguments, grad: Tensor) -> Result:
    return run(OPS.dense_block, OPS.dense_block_backward, case, a, grad)


def reference(case: Case, a: Arguments, grad: Tensor, wide: bool = False) -> Result:
    """wide: in float64."""
    dtypes = (torch.float64,) * 2 if wide else (case.dtype, case.wide)
    leaves = [t.to(dtypes[min(i, 1)]).requires_grad_() for i, t in enumerate((a.x, *a.params))]
    running, frozen = [t.to(dtypes[1]) for t in a.running], [bool(f) for f in a.frozen]
    y, stats = csp.reference.dense_block(leaves[0], leaves[1:], running, frozen=frozen, eps=a.eps)
    return Result(y.detach(), [], stats, list(torch.autograd.grad(y, leaves, grad.to(y.dtype))))


def errors(got: Result, expected: Result, case: Case) -> list[float]:
    """Of y, stats where all are needed, z, and each gradient; in 16 bits, where ReLUs change sides, all gradients'
    root mean square. A norm's bias gradient can vanish by cancellation, so it counts with its weight's."""
    values = [error(got.y, expected.y)]
    values += [] if any(case.flags) else [error(got.stats, expected.stats)]
    values += [error(z, other) for z, other in zip(got.z, expected.z, strict=False)]
    sizes = [g.double().norm().item() for g in expected.gradients]
    scales = [max(size, sizes[i - 1] if i > 0 and i % 3 == 2 else 0.0) for i, size in enumerate(sizes)]
    each = [error(*t) for t in zip(got.gradients, expected.gradients, scales, strict=True)]
    return values + (each if case.dtype.itemsize > 2 else [statistics.fmean(e * e for e in each) ** 0.5])


CASES = {
    "training": Case(),
    "three layers": Case(layers=3),
    "float64": Case(dtype=torch.float64),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16, layers=3),
    "odd widths": Case(channels=5, growth=3, width=11, size=(1, 3, 7)),
    "frozen": Case(frozen=(True,)),
    "first frozen": Case(frozen=(True, False)),
    "second frozen": Case(frozen=(False, True), dtype=torch.bfloat16),
    "some frozen": Case(frozen=(False, False, True), layers=3),
    "recompute": Case(keep=False),
    "recompute bfloat16": Case(keep=False, dtype=torch.bfloat16),
    "dropout": Case(drop_rate=0.4),
    "dropout recompute": Case(drop_rate=0.4, keep=False, dtype=torch.bfloat16),
    "large mean": Case(mean=1000.0, std=0.01),
    "one pixel wide": Case(size=(3, 4, 1)),
}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.drop_rate])
def test_against_the_reference(name: str) -> None:
    """Within twice the error of the naive form in the same dtype; in 16 bits by the median of three seeds."""
    case, runs = CASES[name], []
    for seed in range(3 if case.dtype.itemsize == 2 else 1):
        torch.manual_seed(seed)
        given = case, arguments(case), image(case.total, case)
        mine, exact, naive = triton(*given), reference(*given, wide=True), reference(*given)
        assert torch.equal(mine.y[:, : case.channels], given[1].x)
        runs.append((errors(mine._replace(z=[]), exact, case), errors(naive, exact, case)))
    ours, others = ([statistics.median(e) for e in zip(*r, strict=True)] for r in zip(*runs, strict=True))
    for i, (got, other) in enumerate(zip(ours, others, strict=True)):
        bound = limit(other, case.dtype, max(9 * case.width, case.total))
        assert got <= bound, f"tensor {i}: error {got:.2e}, allowed {bound:.2e}"


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_against_the_compiled_operator(name: str) -> None:
    """z, statistics, the mask of dropout, the layout of everything."""
    case = CASES[name]
    given = case, arguments(case), image(case.total, case)
    mine, theirs = triton(*given), compiled(*given)
    got, expected = ([r.y, *r.z, r.stats, *r.gradients] for r in (mine, theirs))
    for t, u in zip(got, expected, strict=True):
        assert t.shape == u.shape and t.dtype == u.dtype and t.stride() == u.stride()
    allowed = CLOSE[case.dtype] * (20 if case.mean else 1)
    assert all(e <= allowed for e in errors(mine, theirs, case))  # max() would skip a NaN


@needs_native
def test_dropout_drops_the_same_elements() -> None:
    case = CASES["dropout"]
    a = arguments(case)
    mine, theirs = (f(*a)[0][:, case.channels :] == 0 for f in (kernels.forward, OPS.dense_block))
    assert torch.equal(mine, theirs) and 0.2 < mine.float().mean().item() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, frozen=(True,))
    a = arguments(case)
    y = kernels.inference(a.x, a.params, a.running, a.eps, a.winograd)
    exact = reference(case, a, image(case.total, case), wide=True)
    assert error(y, exact.y) <= CLOSE[dtype]
    assert torch.equal(y, kernels.forward(*a)[0])


def test_reads_a_slice_and_channels_last_weights() -> None:
    """x with pixels further apart than its channels; conv weights as channels_last models have them."""
    case = Case()
    a, grad = arguments(case), image(case.total, case)
    wide = torch.full((2, case.channels + 7, 5, 4), torch.nan).contiguous(memory_format=torch.channels_last)
    wide[:, 3 : 3 + case.channels] = a.x
    turned = [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in a.params]
    b = a._replace(x=wide[:, 3 : 3 + case.channels], params=turned)
    first, second = (triton(case, given, grad) for given in (a, b))
    assert torch.equal(first.y, second.y) and torch.equal(first.stats, second.stats)
    for p, mine, expected in zip([a.x, *turned], second.gradients, first.gradients, strict=True):
        assert torch.equal(mine, expected) and mine.stride() == p.stride()


def test_repeats_bitwise() -> None:
    case = replace(CASES["dropout"], dtype=torch.bfloat16)
    a, grad = arguments(case), image(case.total, case)
    first, second = (triton(case, a, grad) for _ in range(2))
    for t, u in zip([first.y, *first.gradients], [second.y, *second.gradients], strict=True):
        assert torch.equal(t, u)


def test_empty_batch() -> None:
    case = Case(size=(0, 5, 4))
    y, z, stats, gradients = triton(case, arguments(case), image(case.total, case))
    assert y.shape == (0, case.total, 5, 4) and len(z) == case.layers and not stats.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype, winograd", [(torch.float32, 4), (torch.float32, 2), (torch.bfloat16, 4)])
def test_precision(dtype: torch.dtype, winograd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 where less than float32's precision was asked for."""
    case, seen = Case(layers=1, dtype=dtype, keep=False), []
    launchers = [(kernels.mix, n) for n in ("forward", "backward")]
    launchers += [(kernels.conv3x3, n) for n in ("forward", "dgrad", "wgrad")]
    for module, name in launchers:
        launch = getattr(module, name)

        def record(*given: Any, launch: Any = launch) -> Any:
            seen.extend(a for a in given if isinstance(a, str))
            return launch(*given)

        monkeypatch.setattr(module, name, record)
    triton(case, arguments(case)._replace(winograd=winograd), image(case.total, case))
    assert seen == ["tf32" if winograd == 4 and dtype == torch.float32 else "ieee"] * 6
