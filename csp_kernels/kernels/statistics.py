"""Batch statistics: of tiles where a tensor is produced or copied, merged by Chan's formula. And sums over programs."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import launch


@triton.jit
def store_tile_statistics(stored, ok, count, partials, tile, tiles, n, end, N, AXIS: tl.constexpr, ACC: tl.constexpr):
    """Mean and M2 along AXIS (pixels) of a tile as it was stored -> partials [2, tiles, N] float64; n: its channels,
    those before `end`. The mean in two steps, the second relative to the first: nothing is lost when it is large."""
    x, count = stored.to(ACC), count.to(ACC)
    rough = tl.sum(tl.where(ok, x * 0.00390625, 0.0), AXIS) / (count * 0.00390625)  # 2^-8: the sum stays finite
    d = tl.where(ok, x - tl.expand_dims(rough, AXIS), 0.0)
    rest = (tl.sum(d, AXIS) / count).to(tl.float64)
    m2 = tl.sum(d * d, AXIS).to(tl.float64)
    if x.dtype == tl.float32 and stored.dtype != tl.float16:  # squares that float32 cannot hold, in units of 2^144
        e = d * 2.117582368135751e-22  # 2^-72
        units = tl.sum(e * e, AXIS).to(tl.float64)
        units = tl.where(units == float("inf"), float("nan"), units)  # nor a deviation
        m2 = tl.where(m2 == float("inf"), units * 2.2300745198530623e43, m2)
    to = partials + tile.to(tl.int64) * N + n
    tl.store(to, rough.to(tl.float64) + rest, mask=n < end)
    tl.store(to + tl.cast(tiles, tl.int64) * N, m2 - count * rest * rest, mask=n < end)


@triton.jit
def _merge(partials, out, out_pitch, P, tiles, N, SIZE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < N
    rows = tl.arange(0, BT)
    total = tl.zeros((BN,), tl.float64)
    for t0 in tl.range(0, tiles, BT):
        t = t0 + rows
        count = tl.minimum(P - t * SIZE, SIZE)
        inside = (t < tiles)[:, None] & ok[None, :]
        mean = tl.load(partials + t.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0.0)
        total += tl.sum(mean * count.to(tl.float64)[:, None], 0)
    centre = total / P
    m2 = tl.zeros((BN,), tl.float64)
    for t0 in tl.range(0, tiles, BT):
        t = t0 + rows
        count = tl.minimum(P - t * SIZE, SIZE)
        inside = (t < tiles)[:, None] & ok[None, :]
        at = partials + t.to(tl.int64)[:, None] * N + n[None, :]
        d = tl.where(inside, tl.load(at, mask=inside, other=0.0) - centre[None, :], 0.0)
        squares = tl.load(at + tl.cast(tiles, tl.int64) * N, mask=inside, other=0.0)
        m2 += tl.sum(squares + d * d * count.to(tl.float64)[:, None], 0)
    tl.store(out + n, centre, mask=ok)
    var = tl.where(m2 <= 0.0, 0.0, m2 / P)  # NaN stays NaN
    tl.store(out + tl.cast(out_pitch, tl.int64) + n, var, mask=ok)


def merge(partials: Tensor, pixels: int, size: int, statistics: Tensor) -> None:
    """partials [2, tiles, N] float64, mean and M2 of tiles of `size` pixels -> statistics [2, N] float64, mean and
    biased variance."""
    _, tiles, n = partials.shape
    check_statistics(statistics, n)
    bt, bn = 16 if tiles <= 64 else 128, 16
    _merge[(launch.blocks(n, bn),)](
        partials, statistics, statistics.stride(0), pixels, tiles, n, SIZE=size, BT=bt, BN=bn, num_warps=4
    )


def check_statistics(statistics: Tensor, n: int) -> None:
    if statistics.dtype != torch.float64 or statistics.shape != (2, n) or (n > 1 and statistics.stride(1) != 1):
        raise ValueError(f"statistics: expected float64 [2, {n}], got {statistics.dtype} {tuple(statistics.shape)}")


@triton.jit
def _copy_split(
    x, x_pitch, out, out_pitch, partials, P, N, tiles,
    UNIT: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    N = N * UNIT
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tile * BP + tl.arange(0, BP)
    row = p.to(tl.int64)[:, None]
    ok = (p < P)[:, None] & (n < N)[None, :]
    value = tl.load(x + row * (x_pitch * UNIT) + n[None, :], mask=ok, other=0.0)
    if out is not None:
        tl.store(out + row * (out_pitch * UNIT) + n[None, :], value, mask=ok)
    if partials is not None:
        store_tile_statistics(value, ok, tl.minimum(P - tile * BP, BP), partials, tile, tiles, n, N, N, 0, ACC)


def copy_split(x: Tensor, out: Tensor | None, statistics: Tensor | None) -> None:
    """x [P, C] view -> out [P, C] view; its mean and biased variance -> statistics [2, C] float64, in the same pass."""
    launch.check_view(x, "x")
    pixels, n = x.shape
    if out is not None:
        launch.check_view(out, "out")
        assert out.shape == x.shape and out.dtype == x.dtype
    if out is None and statistics is None:
        return
    bp, bn = 128, launch.power(n, 16, 64)
    tiles, u = launch.blocks(pixels, bp), launch.unit(n, x.stride(0), out.stride(0) if out is not None else 0)
    partials = x.new_empty((2, tiles, n), dtype=torch.float64) if statistics is not None else None
    _copy_split[(tiles, launch.blocks(n, bn))](
        x, x.stride(0) // u, out, out.stride(0) // u if out is not None else 0, partials, pixels, n // u, tiles,
        UNIT=u, ACC=launch.sum_type(x.dtype), BP=bp, BN=bn, num_warps=4,
    )  # fmt: skip
    if statistics is not None and partials is not None:
        merge(partials, pixels, bp, statistics)


@triton.jit
def _total(partials, out, out_pitch, parts, rows, N, ADD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros((BN,), tl.float64)
    for t0 in tl.range(0, parts, BT):
        t = t0 + tl.arange(0, BT)
        at = partials + (t.to(tl.int64) * rows + row)[:, None] * N + n[None, :]
        sums += tl.sum(tl.load(at, mask=(t < parts)[:, None] & (n < N)[None, :], other=0.0).to(tl.float64), 0)
    to = out + row.to(tl.int64) * out_pitch + n
    if ADD:
        sums += tl.load(to, mask=n < N, other=0.0).to(tl.float64)
    tl.store(to, sums.to(out.dtype.element_ty), mask=n < N)


def total(partials: Tensor, out: Tensor, add: bool = False) -> None:
    """partials [parts, rows, N], contiguous -> out [rows, N] view: their sum, in order, in float64; add: to out."""
    parts, rows, n = partials.shape
    launch.check_view(out, "out")
    bt, bn = (16, 64) if parts <= 64 else (256, 16)  # few variants to compile
    _total[(launch.blocks(n, bn), rows)](
        partials, out, out.stride(0), parts, rows, N=n, ADD=add, BT=bt, BN=bn, num_warps=4
    )
