"""Maxima over windows of pixels, and their gradient: of equal values the first, NaN before numbers, as PyTorch's."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import launch
from csp_kernels.kernels.launch import Geometry, blocks
from csp_kernels.kernels.statistics import check_statistics, merge, store_tile_statistics

PIXELS = 32  # of a program


@triton.jit
def _largest(
    x, x_pitch, out, out_pitch, positions, partials, P, N, H, W, tiles,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [P, N]: of SIZE x SIZE pixels around each STRIDE-th of x, an even SIZE from each; positions [P, N]: which it
    is. P: of out."""
    N = N * UNIT
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tile * BP + tl.arange(0, BP)
    rows, columns = (H + STRIDE - 1) // STRIDE, (W + STRIDE - 1) // STRIDE
    row = p.to(tl.int64)
    before: tl.constexpr = (SIZE - 1) // 2
    top, left = p // columns % rows * STRIDE - before, p % columns * STRIDE - before
    first = (row // (columns * rows) * H + top) * W + left
    largest = tl.full((BP, BN), float("-inf"), ACC)
    position = tl.full((BP, BN), -1, tl.int32)
    for tap in tl.range(0, SIZE * SIZE):
        h, w = top + tap // SIZE, left + tap % SIZE
        inside = (p < P) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = (first + tap // SIZE * W + tap % SIZE)[:, None] * (x_pitch * UNIT) + n[None, :]
        value = tl.load(x + at, inside[:, None] & (n < N)[None, :], float("-inf")).to(ACC)
        larger = inside[:, None] & ((value > largest) | (value != value) | (position < 0))
        largest = tl.where(larger, value, largest)
        position = tl.where(larger, tap, position)
    ok = (p < P)[:, None] & (n < N)[None, :]
    if positions is not None:
        tl.store(positions + row[:, None] * N + n[None, :], position.to(positions.dtype.element_ty), ok)
    if out is not None:
        y = largest.to(out.dtype.element_ty)
        tl.store(out + row[:, None] * (out_pitch * UNIT) + n[None, :], y, ok)
        if partials is not None:
            store_tile_statistics(y, ok, tl.minimum(P - tile * BP, BP), partials, tile, tiles, n, N, N, 0, ACC)


@triton.jit
def _backward(
    d, d_pitch, positions, out, out_pitch, P, N, H, W,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [P, N]: the sum of what comes to the windows whose largest a pixel is. P: pixels."""
    N = N * UNIT
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    rows, columns = (H + STRIDE - 1) // STRIDE, (W + STRIDE - 1) // STRIDE
    row = p.to(tl.int64)
    h, w = p // W % H, p % W
    before: tl.constexpr = (SIZE - 1) // 2
    after: tl.constexpr = SIZE // 2
    each: tl.constexpr = (SIZE + STRIDE - 1) // STRIDE  # windows of a row that a pixel can be in
    # The first that reaches it, (h - after) / STRIDE rounded up, without dividing what is negative.
    up: tl.constexpr = STRIDE * after - after + STRIDE - 1
    top, left = (h + up) // STRIDE - after, (w + up) // STRIDE - after
    first = row // (H * tl.cast(W, tl.int64)) * rows * columns
    total = tl.zeros((BP, BN), ACC)
    for i in tl.range(0, each * each):
        y, x = top + i // each, left + i % each
        inside = (p < P) & (y >= 0) & (y < rows) & (y * STRIDE <= h + before)
        inside = inside & (x >= 0) & (x < columns) & (x * STRIDE <= w + before)
        ok = inside[:, None] & (n < N)[None, :]
        window = (first + y * columns + x)[:, None]
        here = tl.load(positions + window * N + n[None, :], ok, -1)
        value = tl.load(d + window * (d_pitch * UNIT) + n[None, :], ok, 0.0).to(ACC)
        tap = (h - y * STRIDE + before) * SIZE + w - x * STRIDE + before
        total += tl.where(ok & (here == tap[:, None]), value, 0.0)
    at = row[:, None] * (out_pitch * UNIT) + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (p < P)[:, None] & (n < N)[None, :])


def _check(name: str, x: Tensor, pixels: int, channels: int) -> None:
    launch.check_view(x, name)
    if x.shape != (pixels, channels):
        raise ValueError(f"{name}: expected {(pixels, channels)}, got {tuple(x.shape)}")


def _block(channels: int) -> int:
    """Channels of a program."""
    return launch.power(channels, 16, 64)


def forward(x: Tensor, out: Tensor, geometry: Geometry, size: int, statistics: Tensor | None = None) -> None:
    """out [P', N] view = the maxima of x [P, N] view over size x size pixels, an odd size, around each pixel, with
    stride 2 around each second one of each second row, or over 2x2 from it (size 2); statistics [2, N] float64 view:
    takes its mean and biased variance."""
    channels = x.shape[1]
    _check("x", x, geometry.pixels, channels)
    _check("out", out, geometry.outputs, channels)
    partials = None
    if statistics is not None:
        check_statistics(statistics, channels)
        partials = x.new_empty((2, blocks(geometry.outputs, PIXELS), channels), dtype=torch.float64)
    _run(x, out, None, partials, geometry, size)
    if statistics is not None and partials is not None:
        merge(partials, geometry.outputs, PIXELS, statistics)


def _run(
    x: Tensor, out: Tensor | None, positions: Tensor | None, partials: Tensor | None, geometry: Geometry, size: int
) -> None:  # fmt: skip
    pixels, channels, pitch = geometry.outputs, x.shape[1], 0 if out is None else out.stride(0)
    u, tiles, block = launch.unit(channels, x.stride(0), pitch), blocks(pixels, PIXELS), _block(channels)
    _largest[(tiles, blocks(channels, block))](
        x, x.stride(0) // u, out, pitch // u, positions, partials, pixels, channels // u, geometry.h, geometry.w, tiles,
        SIZE=size, STRIDE=geometry.stride, UNIT=u, ACC=launch.sum_type(x.dtype), BP=PIXELS, BN=block, num_warps=4,
    )  # fmt: skip


def positions_of(x: Tensor, geometry: Geometry, size: int) -> Tensor:
    """[P', N]: of each maximum of x [P, N] view, where it is in its window, row by row."""
    _check("x", x, geometry.pixels, x.shape[1])
    dtype = torch.int16 if size * size <= 1 << 15 else torch.int32
    positions = x.new_empty((geometry.outputs, x.shape[1]), dtype=dtype)
    _run(x, None, positions, None, geometry, size)
    return positions


def backward(d: Tensor, positions: Tensor, out: Tensor, geometry: Geometry, size: int) -> None:
    """out [P, N] view = the gradient of what forward reads, d [P', N] view being that of what it gives."""
    pixels, channels = geometry.pixels, d.shape[1]
    _check("d", d, geometry.outputs, channels)
    _check("positions", positions, geometry.outputs, channels)
    _check("out", out, pixels, channels)
    u, block = launch.unit(channels, d.stride(0), out.stride(0)), _block(channels)
    _backward[(blocks(pixels, PIXELS), blocks(channels, block))](
        d, d.stride(0) // u, positions, out, out.stride(0) // u, pixels, channels // u, geometry.h, geometry.w,
        SIZE=size, STRIDE=geometry.stride, UNIT=u, ACC=launch.sum_type(d.dtype), BP=PIXELS, BN=block, num_warps=4,
    )  # fmt: skip
