"""A 1x1 convolution over inputs side by side that are never concatenated: forward, and both gradients. Each input is
read in place, normalised, activated and averaged on load. Products have the pixels as columns: that makes sums over
pixels cheap."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import activate, elementwise, launch, tune
from csp_kernels.kernels.activate import Activation
from csp_kernels.kernels.elementwise import After, check_after
from csp_kernels.kernels.launch import Case, Correction, Geometry, Norm, Tile, blocks
from csp_kernels.kernels.statistics import check_statistics, merge, store_tile_statistics, total


@dataclass(frozen=True)
class Segment:
    """One input. x [P, K] view; norm None: read as it is; g [P, K] view: takes the gradient of x (with a norm: scale *
    dn, what the norm owes is the caller's), added if add; None: not wanted. source [P, K] view, with add: what it is
    added to, None: g itself. sums [2, K] view: those of its norm are added to it, None: backward returns them. wanted:
    whether backward has anything to find out but the weight's gradient."""

    x: Tensor
    norm: Norm | None = None
    g: Tensor | None = None
    add: bool = False
    source: Tensor | None = None
    sums: Tensor | None = None
    wanted: bool = True

    @property
    def only_read(self) -> bool:
        """Backward has no gradient of it and no sums."""
        return not self.wanted or (self.norm is None and self.g is None)


@dataclass(frozen=True)
class ActivationGradient:
    """dz = d * act'(norm(z)) * norm.scale + (z - norm.mean) * slope + offset on load, d being the gradient of the
    activated output; slope and offset None: zero, statistics were fixed."""

    norm: Norm
    act: Activation
    slope: Tensor | None = None
    offset: Tensor | None = None


@triton.jit
def _source(p, H, W, POOL: tl.constexpr, STRIDE: tl.constexpr):
    """The first pixel of the map behind each output pixel."""
    q = p.to(tl.int64)
    if POOL or STRIDE > 1:  # a stride also reads the last row and column of an odd map
        h = (H + STRIDE - 1) // 2
        w = (W + STRIDE - 1) // 2
        q = (q // (h * w) * H + q // w % h * 2) * W + q % w * 2
    return q


@triton.jit
def _read(x, pitch, row, row_ok, k, K, mean, scale, shift, W, POOL: tl.constexpr, ACC: tl.constexpr):
    """[rows, k] of what the product reads, in ACC; zero outside."""
    ok = row_ok[:, None] & (k < K)[None, :]
    total = tl.zeros((row.shape[0], k.shape[0]), ACC)
    for tap in tl.static_range(4 if POOL else 1):
        at = row + (tap // 2) * tl.cast(W, tl.int64) + tap % 2
        a = tl.load(x + at[:, None] * pitch + k[None, :], mask=ok, other=0.0).to(ACC)
        if mean is not None:
            m = tl.load(mean + k, mask=k < K, other=0.0)
            s = tl.load(scale + k, mask=k < K, other=0.0)
            t = tl.load(shift + k, mask=k < K, other=0.0)
            a = activate.relu((a - m[None, :]) * s[None, :] + t[None, :])
        total += a
    return total * 0.25 if POOL else total


@triton.jit
def _multiply(
    acc, x, pitch, K, mean, scale, shift, weight, w_pitch, n, N, source, row_ok, W,
    POOL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [n, pixels] += weight [O, K] * relu(norm(x)) [pixels, K] transposed."""
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        ok = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight + n.to(tl.int64)[:, None] * w_pitch + k[None, :], mask=ok, other=0.0)
        a = _read(x, pitch, source, row_ok, k, K, mean, scale, shift, W, POOL, ACC)
        element = x.dtype.element_ty
        acc = tl.dot(w.to(element), tl.trans(a.to(element)), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _forward(
    x0, pitch0, K0, mean0, scale0, shift0, weight0, x1, pitch1, K1, mean1, scale1, shift1, weight1,
    w_pitch, before, out, out_pitch, out_mean, out_scale, out_shift,
    residual, residual_pitch, residual_mean, residual_scale, residual_shift, partials, P, N, H, W, tiles,
    UNIT: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr,
    RESIDUAL_ACT: tl.constexpr, RESIDUAL_NEGATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BN)
    tile = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    p = tile * BP + tl.arange(0, BP)
    row_ok = p < P
    source = _source(p, H, W, POOL, STRIDE)
    ok = (n < N)[:, None] & row_ok[None, :]
    acc = tl.zeros((BN, BP), ACC)
    if before is not None:
        acc = tl.load(before + p.to(tl.int64)[None, :] * N + n[:, None], mask=ok, other=0.0)
    acc = _multiply(
        acc, x0, pitch0 * UNIT, K0 * UNIT, mean0, scale0, shift0, weight0, w_pitch * UNIT, n, N, source, row_ok, W,
        POOL, ACC, PRECISION, BK, STAGES,
    )  # fmt: skip
    if x1 is not None:
        acc = _multiply(
            acc, x1, pitch1 * UNIT, K1 * UNIT, mean1, scale1, shift1, weight1, w_pitch * UNIT, n, N, source, row_ok, W,
            POOL, ACC, PRECISION, BK, STAGES,
        )  # fmt: skip
    if out_mean is not None:
        m = tl.load(out_mean + n, mask=n < N, other=0.0)[:, None]
        s = tl.load(out_scale + n, mask=n < N, other=0.0)[:, None]
        t = tl.load(out_shift + n, mask=n < N, other=0.0)[:, None]
        acc = activate.value((acc - m) * s + t, ACT, NEGATIVE)
    if residual is not None:
        acc = tl.trans(
            elementwise.plus(
                tl.trans(acc), residual, tl.cast(residual_pitch, tl.int64) * UNIT, residual_mean, residual_scale,
                residual_shift, p.to(tl.int64)[:, None], n, N, tl.trans(ok), RESIDUAL_ACT, RESIDUAL_NEGATIVE, ACC,
            )
        )  # fmt: skip
    z = acc.to(out.dtype.element_ty)
    tl.store(out + p.to(tl.int64)[None, :] * (out_pitch * UNIT) + n[:, None], z, mask=ok)
    if partials is not None:  # of what was stored
        store_tile_statistics(z, ok, tl.minimum(P - tile * BP, BP), partials, tile, tiles, n, N, N, 1, ACC)


@triton.jit
def _row(x, n, N):
    return tl.load(x + n, mask=n < N, other=0.0)[None, :]


@triton.jit
def _output_gradient(
    d, d_pitch, z, z_pitch, mean, scale, shift, slope, offset, p, p_ok, n, N,
    ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz [pixels, n]; zero outside. scale None: no activation followed."""
    ok = p_ok[:, None] & (n < N)[None, :]
    q = p.to(tl.int64)[:, None]
    value = tl.load(d + q * d_pitch + n[None, :], mask=ok, other=0.0).to(ACC)
    if z is not None:
        centred = tl.load(z + q * z_pitch + n[None, :], mask=ok, other=0.0).to(ACC) - _row(mean, n, N)
        if scale is not None:
            s = _row(scale, n, N)
            value = activate.gradient(value, centred * s + _row(shift, n, N), ACT, NEGATIVE) * s
        if slope is not None:
            value = tl.where(p_ok[:, None], value + (centred * _row(slope, n, N) + _row(offset, n, N)), 0.0)
    return value


@triton.jit
def _dgrad(
    x, pitch, K, mean, scale, shift, g, g_pitch, source, source_pitch, weight, w_pitch,
    d, d_pitch, z, z_pitch, z_mean, z_scale, z_shift, slope, offset, sums, P, N, H, W,
    UNIT: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one segment, and sums [tiles, 2, K]. BK: its channels, BN: of the gradient at a time."""
    K = K * UNIT
    columns = tl.cdiv(K, BK)  # the fast axis: d and z stay in cache
    tile = tl.program_id(0) // columns
    k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    p = tile * BP + tl.arange(0, BP)
    p_ok = p < P
    element = x.dtype.element_ty
    da = tl.zeros((BK, BP), ACC)
    for n0 in tl.range(0, N, BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)
        ok = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight + n.to(tl.int64)[:, None] * (w_pitch * UNIT) + k[None, :], mask=ok, other=0.0)
        dz = _output_gradient(
            d, d_pitch * UNIT, z, z_pitch * UNIT, z_mean, z_scale, z_shift, slope, offset, p, p_ok, n, N,
            ACT, NEGATIVE, ACC,
        )  # fmt: skip
        da = tl.dot(tl.trans(w.to(element)), tl.trans(dz.to(element)), da, input_precision=PRECISION, out_dtype=ACC)
    if POOL:
        da = da * 0.25
    row = _source(p, H, W, POOL, STRIDE)
    ok = (k < K)[:, None] & p_ok[None, :]
    dbeta = tl.zeros((BK,), ACC)
    dgamma = tl.zeros((BK,), ACC)
    for tap in tl.static_range(4 if POOL else 1):
        at = row + (tap // 2) * tl.cast(W, tl.int64) + tap % 2
        dx = da
        if mean is not None:
            m = tl.load(mean + k, mask=k < K, other=0.0)[:, None]
            s = tl.load(scale + k, mask=k < K, other=0.0)[:, None]
            t = tl.load(shift + k, mask=k < K, other=0.0)[:, None]
            centred = tl.load(x + at[None, :] * (pitch * UNIT) + k[:, None], mask=ok, other=0.0).to(ACC) - m
            dn = tl.where(ok, activate.relu_gradient(da, centred * s + t), 0.0)
            dbeta += tl.sum(dn, 1)
            dgamma += tl.sum(dn * centred, 1)
            dx = dn * s
        if g is not None:
            if source is not None:
                dx += tl.load(source + at[None, :] * (source_pitch * UNIT) + k[:, None], mask=ok, other=0.0).to(ACC)
            tl.store(g + at[None, :] * (g_pitch * UNIT) + k[:, None], dx.to(g.dtype.element_ty), mask=ok)
    if mean is not None:
        to = sums + tile.to(tl.int64) * 2 * K + k
        tl.store(to, dbeta, mask=k < K)
        tl.store(to + K, dgamma, mask=k < K)


@triton.jit
def _wgrad(
    x, pitch, K, mean, scale, shift, d, d_pitch, z, z_pitch, z_mean, z_scale, z_shift, slope, offset, partials,
    P, N, H, W, chunk,
    UNIT: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [splits, O, K] of dweight of one segment; a split has `chunk` pixels."""
    K = K * UNIT
    columns = tl.cdiv(K, BK)
    rows = tl.cdiv(N, BN)
    k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    n = tl.program_id(0) // columns % rows * BN + tl.arange(0, BN)
    split = tl.program_id(0) // (columns * rows)
    element = x.dtype.element_ty
    acc = tl.zeros((BN, BK), ACC)
    for p0 in tl.range(split * chunk, tl.minimum(P, split * chunk + chunk), BP, num_stages=STAGES):
        p = p0 + tl.arange(0, BP)
        p_ok = p < P
        dz = _output_gradient(
            d, d_pitch * UNIT, z, z_pitch * UNIT, z_mean, z_scale, z_shift, slope, offset, p, p_ok, n, N,
            ACT, NEGATIVE, ACC,
        )  # fmt: skip
        a = _read(x, pitch * UNIT, _source(p, H, W, POOL, STRIDE), p_ok, k, K, mean, scale, shift, W, POOL, ACC)
        acc = tl.dot(tl.trans(dz.to(element)), a.to(element), acc, input_precision=PRECISION, out_dtype=ACC)
    to = partials + (split.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    tl.store(to, acc, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _one_pass(
    x, pitch, K, mean, scale, shift, g, g_pitch, source, source_pitch, weight, w_pitch,
    d, d_pitch, z, z_pitch, z_mean, z_scale, z_shift, slope, offset, partials, sums, P, N, chunk,
    UNIT: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both gradients of one segment that is not pooled: partials [splits, O, K] of dweight, sums [splits, 2, K]; a
    split has `chunk` pixels, a multiple of BP. BN: all of O."""
    K = K * UNIT
    columns = tl.cdiv(K, BK)  # the fast axis: d and z stay in cache
    k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    split = tl.program_id(0) // columns
    n = tl.arange(0, BN)
    element = x.dtype.element_ty
    ok = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(weight + n.to(tl.int64)[:, None] * (w_pitch * UNIT) + k[None, :], mask=ok, other=0.0)
    w = tl.trans(w.to(element))
    if mean is not None:
        m = tl.load(mean + k, mask=k < K, other=0.0)[:, None]
        s = tl.load(scale + k, mask=k < K, other=0.0)[:, None]
        t = tl.load(shift + k, mask=k < K, other=0.0)[:, None]
    acc = tl.zeros((BK, BN), ACC)
    dbeta = tl.zeros((BK,), ACC)
    dgamma = tl.zeros((BK,), ACC)
    for p0 in tl.range(split * chunk, tl.minimum(P, split * chunk + chunk), BP, num_stages=STAGES):
        p = p0 + tl.arange(0, BP)
        p_ok = p < P
        q = p.to(tl.int64)[None, :]
        inside = (k < K)[:, None] & p_ok[None, :]
        dz = _output_gradient(
            d, d_pitch * UNIT, z, z_pitch * UNIT, z_mean, z_scale, z_shift, slope, offset, p, p_ok, n, N,
            ACT, NEGATIVE, ACC,
        ).to(element)  # fmt: skip
        a = tl.load(x + q * (pitch * UNIT) + k[:, None], mask=inside, other=0.0)
        dx = tl.dot(w, tl.trans(dz), input_precision=PRECISION, out_dtype=ACC)  # zero outside
        if mean is not None:
            centred = a.to(ACC) - m
            pre = centred * s + t
            dn = activate.relu_gradient(dx, pre)
            dbeta += tl.sum(dn, 1)
            dgamma += tl.sum(dn * centred, 1)
            dx = dn * s
            a = activate.relu(pre).to(element)
        acc = tl.dot(a, dz, acc, input_precision=PRECISION, out_dtype=ACC)
        if g is not None:
            if source is not None:
                dx += tl.load(source + q * (source_pitch * UNIT) + k[:, None], mask=inside, other=0.0).to(ACC)
            tl.store(g + q * (g_pitch * UNIT) + k[:, None], dx.to(g.dtype.element_ty), mask=inside)
    to = partials + (split.to(tl.int64) * N + n)[None, :] * K + k[:, None]
    tl.store(to, acc, mask=(k < K)[:, None] & (n < N)[None, :])
    if mean is not None:
        to = sums + split.to(tl.int64) * 2 * K + k
        tl.store(to, dbeta, mask=k < K)
        tl.store(to + K, dgamma, mask=k < K)


def _norm(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (norm.mean, norm.scale, norm.shift) if norm else (None, None, None)


def _act(act: Activation | None) -> dict[str, Any]:
    return {"ACT": act.code, "NEGATIVE": act.negative_slope} if act else {"ACT": 0, "NEGATIVE": 0.0}


def _columns(segments: Sequence[Segment], weight: Tensor) -> list[int]:
    """Where each segment's columns of the weight begin."""
    columns = [0]
    for s in segments:
        columns.append(columns[-1] + s.x.shape[1])
    launch.check_view(weight, "weight")
    if columns[-1] != weight.shape[1]:
        raise ValueError(f"segments of {columns[-1]} channels, a weight of {weight.shape[1]}")
    return columns


def _check(segments: Sequence[Segment], geometry: Geometry) -> None:
    for s in segments:
        launch.check_view(s.x, "x")
        if s.x.shape[0] != geometry.pixels or s.x.dtype != segments[0].x.dtype:
            raise ValueError(f"x: expected {geometry.pixels} pixels of one type, got {s.x.dtype} {tuple(s.x.shape)}")
        for t, name in ((s.g, "g"), (s.source, "source")):
            if t is not None:
                launch.check_view(t, name)
                if t.shape != s.x.shape:
                    raise ValueError(f"{name}: expected {tuple(s.x.shape)}, got {tuple(t.shape)}")
        if s.source is not None and not (s.add and s.g is not None):
            raise ValueError("source: nothing is added to it")
        if s.sums is not None and s.sums.shape != (2, s.x.shape[1]):
            raise ValueError(f"sums: expected {(2, s.x.shape[1])}, got {tuple(s.sums.shape)}")


def forward(
    segments: Sequence[Segment],
    weight: Tensor,
    out: Tensor,
    geometry: Geometry,
    precision: str = "ieee",
    statistics: Tensor | None = None,
    after: After | None = None,
) -> None:
    """out [P', O] view = sum over segments of relu(norm(x)) * weight[:, its columns]^T, weight [O, sum K]; statistics
    [2, O] float64 view: takes out's mean and biased variance; after, without statistics: what follows the sum."""
    columns = _columns(segments, weight)
    _check(segments, geometry)
    launch.check_view(out, "out")
    pixels, outputs, dtype = geometry.outputs, weight.shape[0], segments[0].x.dtype
    if out.shape != (pixels, outputs):
        raise ValueError(f"out: expected {(pixels, outputs)}, got {tuple(out.shape)}")
    if statistics is not None:
        check_statistics(statistics, outputs)
    check_after(after, out, statistics is not None)
    case = Case.of(segments[0].x, precision, geometry)

    def run(tile: Tile) -> Tensor | None:
        """Partial statistics."""
        tiles = blocks(pixels, tile.pixels)
        partials = out.new_empty((2, tiles, outputs), dtype=torch.float64) if statistics is not None else None
        before = None
        for i in range(0, len(segments), 2):  # more than two: the sum so far in scratch memory
            last = i + 2 >= len(segments)
            to = out if last else out.new_empty((pixels, outputs), dtype=launch.sum_dtype(dtype))
            first, second = segments[i], segments[i + 1] if i + 1 < len(segments) else None
            x0, k0, pitch0 = first.x, first.x.shape[1], first.x.stride(0)
            x1, k1, pitch1 = (second.x, second.x.shape[1], second.x.stride(0)) if second else (None, 0, 0)
            follows = after if last else None
            residual = follows.residual if follows else None
            u = launch.unit(
                pitch0, k0, pitch1, k1, weight.stride(0), to.stride(0), residual.x.stride(0) if residual else 0
            )
            _forward[(tiles * blocks(outputs, tile.outputs),)](
                x0, pitch0 // u, k0 // u, *_norm(first.norm), weight[:, columns[i] :],
                x1, pitch1 // u, k1 // u, *_norm(second.norm if second else None),
                weight[:, columns[i + 1] :] if second else None, weight.stride(0) // u, before, to, to.stride(0) // u,
                *elementwise.tensors_after(follows, u), partials if last else None,
                pixels, outputs, geometry.h, geometry.w, tiles,
                UNIT=u, POOL=geometry.pool, STRIDE=geometry.stride, **elementwise.acts_after(follows),
                ACC=launch.sum_type(dtype), PRECISION=precision,
                BP=tile.pixels, BN=tile.outputs, BK=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
            before = to
        return partials

    key = *_key(case, pixels), *(s.x.shape[1] for s in segments), outputs, statistics is not None
    tile = tune.choose("mix.forward", key, launch.forward_tiles(case, outputs), run)
    partials = run(tile)
    if statistics is not None and partials is not None:
        merge(partials, pixels, tile.pixels, statistics)


def _key(case: Case, pixels: int) -> tuple[Any, ...]:
    """Of what a configuration is chosen for, with its channels."""
    size = triton.next_power_of_2(pixels), case.pool, case.stride
    return str(case.dtype), case.precision, *size, case.activated, case.unit


def _added_to(s: Segment) -> Tensor | None:
    """What g is added to."""
    return s.g if s.add and s.source is None else s.source


def _clear_border(s: Segment, geometry: Geometry) -> None:
    """The last row and column of an odd map belong to no average: no gradient."""
    if s.g is None or (s.add and s.source is None):
        return
    images = [t.unflatten(0, (geometry.n, geometry.h, geometry.w)) for t in (s.g, s.source) if t is not None]
    for axis, size in ((1, geometry.h), (2, geometry.w)):
        if size % 2:
            g, *source = (t.select(axis, -1) for t in images)
            g.copy_(source[0]) if source else g.zero_()


def _beside_stride(s: Segment, geometry: Geometry) -> Segment:
    """The pixels that a stride leaves out have no gradient of it: made ready, what is read is then added."""
    if geometry.stride == 1 or s.g is None:
        return s
    source = _added_to(s)
    if source is None:
        s.g.zero_()
    elif source is not s.g:
        s.g.copy_(source)
    return replace(s, add=True, source=None)


@dataclass(frozen=True)
class _Gradient:
    """Of the output: d, and what is needed to make dz of it. Strides of what is not there are 0."""

    d: Tensor
    z: Tensor | None
    vectors: tuple[Tensor | None, ...]  # mean, scale, shift, slope, offset
    act: Activation | None

    @staticmethod
    def of(d: Tensor, z: Tensor | None, correction: Correction | ActivationGradient | None) -> _Gradient:
        if z is None or correction is None:
            return _Gradient(d, None, (None,) * 5, None)
        if isinstance(correction, Correction):
            return _Gradient(d, z, (correction.mean, None, None, correction.slope, correction.offset), None)
        return _Gradient(d, z, (*_norm(correction.norm), correction.slope, correction.offset), correction.act)

    def arguments(self, unit: int) -> tuple[Any, ...]:
        return self.d, self.d.stride(0) // unit, self.z, _pitch(self.z) // unit, *self.vectors


def _pitch(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def backward(
    segments: Sequence[Segment],
    d: Tensor,
    z: Tensor | None,
    correction: Correction | ActivationGradient | None,
    weight: Tensor,
    geometry: Geometry,
    precision: str = "ieee",
    weights: bool = True,
) -> tuple[Tensor, Tensor]:
    """d [P', O] view; z [P', O] view and correction: what dz is computed from, else dz = d. Writes (or adds to) the
    segments' g. Returns dweight [O, sum K] (no rows if not weights) and sums [2, sum K] of dn and dn * (x - mean), zero
    where there is no norm (no columns if every norm's segment has its own); float32 (float64 for float64)."""
    columns = _columns(segments, weight)
    _check(segments, geometry)
    pixels, outputs, dtype = geometry.outputs, weight.shape[0], segments[0].x.dtype
    for t, name in ((d, "d"), (z, "z")):
        if t is not None:
            launch.check_view(t, name)
            if t.shape != (pixels, outputs):
                raise ValueError(f"{name}: expected {(pixels, outputs)}, got {tuple(t.shape)}")
    if (z is None) != (correction is None):
        raise ValueError("z and correction go together")
    gradient = _Gradient.of(d, z, correction)
    dweight = weight.new_empty((outputs if weights else 0, weight.shape[1]), dtype=launch.sum_dtype(dtype))
    gathers = any(s.norm is not None and s.sums is None and not s.only_read for s in segments)
    sums = weight.new_zeros((2, weight.shape[1] if gathers else 0), dtype=launch.sum_dtype(dtype))
    for s, c0, c1 in zip(segments, columns, columns[1:], strict=False):
        w, dw = weight[:, c0:c1], dweight[:, c0:c1]
        u = launch.unit(*map(_pitch, (s.x, s.g, _added_to(s), w, d, z)), c1 - c0)
        case = Case.of(s.x, precision, geometry, gradient.act is not None, u)
        own = s if s.sums is not None or not gathers else replace(s, sums=sums[:, c0:c1])
        if weights and s.only_read:
            _segment_wgrad(own, gradient, geometry, case, dw)
        elif weights:
            _segment_both(own, gradient, w, geometry, case, dw)
        elif not s.only_read:
            _segment_dgrad(own, gradient, w, geometry, case)
    return dweight, sums


def _segment_both(
    s: Segment, gradient: _Gradient, weight: Tensor, geometry: Geometry, case: Case, dweight: Tensor
) -> None:
    """In one pass over x or in two."""

    def run(tile: Tile | None, to: Segment) -> None:
        if tile is not None:
            return _segment_one_pass(to, gradient, weight, tile, case, dweight)
        _segment_wgrad(to, gradient, geometry, case, dweight)
        _segment_dgrad(to, gradient, weight, geometry, case)

    outputs, k = weight.shape
    key = *_key(case, geometry.outputs), k, outputs, s.norm is not None, s.add
    tiles = launch.one_pass_tiles(case, k, outputs)
    run(tune.choose("mix.backward", key, tiles, lambda tile: run(tile, _aside(s))), s)


def _aside(s: Segment) -> Segment:
    """The same work, its result in scratch memory."""
    s = s if s.sums is None else replace(s, sums=torch.empty_like(s.sums))
    return s if s.g is None else replace(s, g=torch.empty_like(s.g), source=_added_to(s))


def _segment_one_pass(s: Segment, gradient: _Gradient, weight: Tensor, tile: Tile, case: Case, dweight: Tensor) -> None:
    (pixels, k), outputs, source, u = s.x.shape, weight.shape[0], _added_to(s), case.unit
    programs = blocks(k, tile.depth)
    chunk = launch.chunk(pixels, tile.pixels, programs)
    splits = blocks(pixels, chunk)
    partials = dweight.new_empty((splits, outputs, k))
    partial_sums = dweight.new_empty((splits, 2, k)) if s.norm else None
    _one_pass[(programs * splits,)](
        s.x, s.x.stride(0) // u, k // u, *_norm(s.norm), s.g, _pitch(s.g) // u, source, _pitch(source) // u,
        weight, weight.stride(0) // u, *gradient.arguments(u), partials, partial_sums, pixels, outputs, chunk,
        UNIT=u, **_act(gradient.act), ACC=launch.sum_type(case.dtype), PRECISION=case.precision,
        BP=tile.pixels, BN=tile.outputs, BK=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    total(partials, dweight)
    if partial_sums is not None and s.sums is not None:
        total(partial_sums, s.sums, add=True)


def _segment_dgrad(s: Segment, gradient: _Gradient, weight: Tensor, geometry: Geometry, case: Case) -> None:
    s = _beside_stride(s, geometry)
    pixels, (outputs, k), source, u = geometry.outputs, weight.shape, _added_to(s), case.unit

    def run(tile: Tile, g: Tensor | None) -> Tensor | None:
        """Partial sums."""
        tiles = blocks(pixels, tile.pixels)
        partials = weight.new_empty((tiles, 2, k), dtype=launch.sum_dtype(case.dtype)) if s.norm else None
        _dgrad[(tiles * blocks(k, tile.outputs),)](
            s.x, s.x.stride(0) // u, k // u, *_norm(s.norm), g, _pitch(g) // u, source, _pitch(source) // u,
            weight, weight.stride(0) // u, *gradient.arguments(u), partials,
            pixels, outputs, geometry.h, geometry.w,
            UNIT=u, POOL=geometry.pool, STRIDE=geometry.stride, **_act(gradient.act),
            ACC=launch.sum_type(case.dtype), PRECISION=case.precision,
            BP=tile.pixels, BN=tile.depth, BK=tile.outputs, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return partials

    key = *_key(case, pixels), k, outputs, s.norm is not None, s.add
    tiles = launch.dgrad_tiles(case, k)
    partials = run(tune.choose("mix.dgrad", key, tiles, lambda tile: run(tile, _aside(s).g)), s.g)
    if partials is not None and s.sums is not None:
        total(partials, s.sums, add=True)
    if geometry.pool:
        _clear_border(s, geometry)


def _segment_wgrad(s: Segment, gradient: _Gradient, geometry: Geometry, case: Case, dweight: Tensor) -> None:
    pixels, (outputs, k), u = geometry.outputs, dweight.shape, case.unit

    def run(tile: Tile) -> Tensor:
        """Partial sums."""
        programs = blocks(k, tile.depth) * blocks(outputs, tile.outputs)
        chunk = launch.chunk(pixels, tile.pixels, programs)
        splits = blocks(pixels, chunk)
        partials = dweight.new_empty((splits, outputs, k))
        _wgrad[(programs * splits,)](
            s.x, s.x.stride(0) // u, k // u, *_norm(s.norm), *gradient.arguments(u),
            partials, pixels, outputs, geometry.h, geometry.w, chunk,
            UNIT=u, POOL=geometry.pool, STRIDE=geometry.stride, **_act(gradient.act),
            ACC=launch.sum_type(case.dtype), PRECISION=case.precision,
            BP=tile.pixels, BN=tile.outputs, BK=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return partials

    key = *_key(case, pixels), k, outputs, s.norm is not None
    total(run(tune.choose("mix.wgrad", key, launch.wgrad_tiles(case, k, outputs), run)), dweight)
