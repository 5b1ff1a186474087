"""Sums of terms that are read through norms and activations, and their gradient."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import activate, launch
from csp_kernels.kernels.activate import IDENTITY, Activation
from csp_kernels.kernels.launch import Correction, Norm, blocks
from csp_kernels.kernels.statistics import check_statistics, merge, store_tile_statistics

PIXELS = 64  # of a program


@dataclass(frozen=True)
class Term:
    """act(norm(x)); x [P, N] view, norm None: act(x)."""

    x: Tensor
    norm: Norm | None = None
    act: Activation = IDENTITY


@dataclass(frozen=True)
class After:
    """What follows a product in inference: act(norm(product)) + residual. norm: without its relu."""

    norm: Norm
    act: Activation = IDENTITY
    residual: Term | None = None


@triton.jit
def plus(
    total, x, pitch, mean, scale, shift, row, n, N, ok,
    ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """total [rows, n] + the term."""
    value = tl.load(x + row * pitch + n[None, :], ok, 0.0).to(ACC)
    if mean is not None:
        m = tl.load(mean + n, n < N, 0.0)[None, :]
        s = tl.load(scale + n, n < N, 0.0)[None, :]
        t = tl.load(shift + n, n < N, 0.0)[None, :]
        value = (value - m) * s + t
    return total + activate.value(value, ACT, NEGATIVE)


@triton.jit
def _sum(
    before, x0, pitch0, mean0, scale0, shift0, x1, pitch1, mean1, scale1, shift1, row, n, N, ok,
    UNIT: tl.constexpr, ACT0: tl.constexpr, NEGATIVE0: tl.constexpr, ACT1: tl.constexpr, NEGATIVE1: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[rows, n] of the terms that are there, and of the sum of others, before [P, N] contiguous."""
    total = tl.zeros((row.shape[0], n.shape[0]), ACC)
    if before is not None:
        total = tl.load(before + row * N + n[None, :], ok, 0.0)
    if x0 is not None:
        total = plus(total, x0, pitch0 * UNIT, mean0, scale0, shift0, row, n, N, ok, ACT0, NEGATIVE0, ACC)
    if x1 is not None:
        total = plus(total, x1, pitch1 * UNIT, mean1, scale1, shift1, row, n, N, ok, ACT1, NEGATIVE1, ACC)
    return total


@triton.jit
def _forward(
    before, x0, pitch0, mean0, scale0, shift0, x1, pitch1, mean1, scale1, shift1, out, out_pitch, partials, P, N, tiles,
    UNIT: tl.constexpr, ACT0: tl.constexpr, NEGATIVE0: tl.constexpr, ACT1: tl.constexpr, NEGATIVE1: tl.constexpr,
    ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    N = N * UNIT
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tile * BP + tl.arange(0, BP)
    row = p.to(tl.int64)[:, None]
    ok = (p < P)[:, None] & (n < N)[None, :]
    total = _sum(
        before, x0, pitch0, mean0, scale0, shift0, x1, pitch1, mean1, scale1, shift1, row, n, N, ok,
        UNIT, ACT0, NEGATIVE0, ACT1, NEGATIVE1, ACC,
    )  # fmt: skip
    y = activate.value(total, ACT, NEGATIVE).to(out.dtype.element_ty)
    tl.store(out + row * (out_pitch * UNIT) + n[None, :], y, ok)
    if partials is not None:  # of what was stored
        store_tile_statistics(y, ok, tl.minimum(P - tile * BP, BP), partials, tile, tiles, n, N, N, 0, ACC)


@triton.jit
def _backward(
    d, d_pitch, y, y_pitch, c_mean, slope, offset,
    before, x0, pitch0, mean0, scale0, shift0, x1, pitch1, mean1, scale1, shift1, out, out_pitch, P, N,
    UNIT: tl.constexpr, ACT0: tl.constexpr, NEGATIVE0: tl.constexpr, ACT1: tl.constexpr, NEGATIVE1: tl.constexpr,
    ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    N = N * UNIT
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = (tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP))[:, None]
    ok = (row < P) & (n < N)[None, :]
    value = tl.load(d + row * (d_pitch * UNIT) + n[None, :], ok, 0.0).to(ACC)
    if c_mean is not None:
        m = tl.load(c_mean + n, n < N, 0.0)[None, :]
        s = tl.load(slope + n, n < N, 0.0)[None, :]
        t = tl.load(offset + n, n < N, 0.0)[None, :]
        owed = (tl.load(y + row * (y_pitch * UNIT) + n[None, :], ok, 0.0).to(ACC) - m) * s + t
        value = value - tl.where(s == 0.0, t, owed)  # where nothing is owed, NaN in y is not seen
    if ACT != 0:
        total = _sum(
            before, x0, pitch0, mean0, scale0, shift0, x1, pitch1, mean1, scale1, shift1, row, n, N, ok,
            UNIT, ACT0, NEGATIVE0, ACT1, NEGATIVE1, ACC,
        )  # fmt: skip
        value = activate.gradient(value, total, ACT, NEGATIVE)
    tl.store(out + row * (out_pitch * UNIT) + n[None, :], value.to(out.dtype.element_ty), ok)


def argument(term: Term | None, unit: int) -> tuple[Any, ...]:
    if term is None:
        return None, 0, None, None, None
    norm = term.norm
    vectors = (norm.mean, norm.scale, norm.shift) if norm else (None, None, None)
    return term.x, term.x.stride(0) // unit, *vectors


def _acts(first: Term | None, second: Term | None, act: Activation) -> dict[str, Any]:
    made: dict[str, Any] = {"ACT": act.code, "NEGATIVE": act.negative_slope}
    for i, term in enumerate((first, second)):
        own = IDENTITY if term is None else term.act
        made |= {f"ACT{i}": own.code, f"NEGATIVE{i}": own.negative_slope}
    return made


def tensors_after(after: After | None, unit: int) -> tuple[Any, ...]:
    """Arguments out_mean to residual_shift of a product."""
    norm = after.norm if after else None
    vectors = (norm.mean, norm.scale, norm.shift) if norm else (None, None, None)
    return *vectors, *argument(after.residual if after else None, unit)


def acts_after(after: After | None) -> dict[str, Any]:
    """Arguments ACT to RESIDUAL_NEGATIVE of a product."""
    act = after.act if after else IDENTITY
    other = after.residual.act if after and after.residual else IDENTITY
    made: dict[str, Any] = {"ACT": act.code, "NEGATIVE": act.negative_slope}
    return made | {"RESIDUAL_ACT": other.code, "RESIDUAL_NEGATIVE": other.negative_slope}


def _check(terms: Sequence[Term], out: Tensor) -> None:
    for x in (out, *(term.x for term in terms)):
        launch.check_view(x, "terms")
        if x.shape != out.shape:
            raise ValueError(f"terms: got {tuple(x.shape)}, expected {tuple(out.shape)}")


def _unit(out: Tensor, *others: Tensor | None) -> int:
    return launch.unit(out.shape[1], out.stride(0), *(t.stride(0) for t in others if t is not None))


def _tile(channels: int) -> tuple[int, int]:
    """Pixels and channels of a program."""
    return PIXELS, launch.power(channels, 16, 64)


def _all_but_two(terms: Sequence[Term], like: Tensor) -> tuple[Tensor | None, Sequence[Term]]:
    """The sum of terms that are too many for a kernel, in scratch memory, and the others."""
    before: Tensor | None = None
    while len(terms) > 2:
        to = like.new_empty(like.shape, dtype=launch.sum_dtype(like.dtype))
        _add(before, terms[:2], IDENTITY, to, None, like.dtype)
        before, terms = to, terms[2:]
    return before, terms


def add(terms: Sequence[Term], act: Activation, out: Tensor, statistics: Tensor | None = None) -> None:
    """out [P, N] view = act(sum of the terms); statistics [2, N] float64 view: takes its mean and biased variance."""
    _check(terms, out)
    if statistics is not None:
        check_statistics(statistics, out.shape[1])
    before, rest = _all_but_two(terms, out)
    _add(before, rest, act, out, statistics, out.dtype)


def _add(
    before: Tensor | None, terms: Sequence[Term], act: Activation, out: Tensor, statistics: Tensor | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """dtype: of the terms; out of part of the sum has that of sums."""
    (pixels, n), (bp, bn) = out.shape, _tile(out.shape[1])
    first, second = [*terms, None, None][:2]
    u, tiles = _unit(out, *(term.x for term in terms)), blocks(pixels, bp)
    partials = None if statistics is None else out.new_empty((2, tiles, n), dtype=torch.float64)
    _forward[(tiles, blocks(n, bn))](
        before, *argument(first, u), *argument(second, u), out, out.stride(0) // u, partials, pixels, n // u, tiles,
        UNIT=u, **_acts(first, second, act), ACC=launch.sum_type(dtype), BP=bp, BN=bn, num_warps=4,
    )  # fmt: skip
    if statistics is not None and partials is not None:
        merge(partials, pixels, bp, statistics)


def check_after(after: After | None, out: Tensor, more: bool) -> None:
    """more: statistics or dropout."""
    if after is None:
        return
    if more:
        raise ValueError("statistics and dropout are of a product that nothing follows")
    if after.residual is not None:
        _check([after.residual], out)


def apply_after(out: Tensor, after: After | None) -> None:
    """To the product that out [P, N] view holds."""
    if after is not None:
        more = [after.residual] if after.residual else []
        add([Term(out, after.norm, after.act), *more], IDENTITY, out)


def backward(
    d: Tensor, y: Tensor | None, correction: Correction | None, terms: Sequence[Term], act: Activation, out: Tensor
) -> None:
    """out [P, N] view = (d - ((y - mean) * slope + offset)) * act'(sum of the terms): what each term of act(sum) has as
    its gradient. d [P, N] view: the gradient of y [P, N] view, which was act(sum), without what the correction takes
    off; None, None: nothing is taken off. Without an activation the terms are not read."""
    if act.code == IDENTITY.code:
        terms = []
    _check(terms, out)
    if (y is None) != (correction is None):
        raise ValueError("y and correction go together")
    before, rest = _all_but_two(terms, out)
    (pixels, n), (bp, bn) = out.shape, _tile(out.shape[1])
    first, second = [*rest, None, None][:2]
    u = _unit(out, d, y, *(term.x for term in rest))
    vectors = (correction.mean, correction.slope, correction.offset) if correction else (None, None, None)
    _backward[(blocks(pixels, bp), blocks(n, bn))](
        d, d.stride(0) // u, y, 0 if y is None else y.stride(0) // u, *vectors, before, *argument(first, u),
        *argument(second, u), out, out.stride(0) // u, pixels, n // u,
        UNIT=u, **_acts(first, second, act), ACC=launch.sum_type(d.dtype), BP=bp, BN=bn, num_warps=4,
    )  # fmt: skip
