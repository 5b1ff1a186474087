"""The 3x3 convolution, padding 1: forward, and both gradients. An implicit product over taps and channels: its input is
read through norm and ReLU or as it is, its output is a channel slice. The portable form: where that of the compiled
library (kernels/cuda.py) takes a layer, which reads through norm and ReLU, it runs instead.

P = N * H * W pixels, b channels enter, g leave. Weights are packed as [9, b, g] in the type of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import activate, cuda, launch, tune
from csp_kernels.kernels.launch import Correction, Geometry, Norm, Tile, blocks, power
from csp_kernels.kernels.statistics import check_statistics, merge, store_tile_statistics, total


@dataclass(frozen=True)
class Dropout:
    """The mask of csrc/cpu/tile/conv3x3.h: a hash of seed, layer, pixel and channel. seed: [1] int64, on the device."""

    rate: float
    seed: Tensor
    layer: int

    @property
    def threshold(self) -> int:
        return int(self.rate * 4294967295.0)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.rate) if self.rate < 1 else 0.0


@triton.jit
def _drop(x, pixel, n, seed, layer, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [pixels, n], each element either scaled or zero."""
    s = tl.load(seed).to(tl.uint64)
    key = (s ^ (s >> 32)).to(tl.uint32) * 0x9E3779B9 + tl.cast(layer, tl.uint32) * 0x85EBCA6B
    index = (pixel.to(tl.int64)[:, None] * 4096 + n[None, :]).to(tl.uint64)
    h = index.to(tl.uint32) ^ ((index >> 32).to(tl.uint32) * 0x27D4EB2F) ^ key
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return tl.where(h >= tl.full((), THRESHOLD, tl.uint32), x * SCALE, 0.0)


@triton.jit
def _inside(p, P, H, W):  # type: ignore[no-untyped-def]
    """Bit t: tap t of pixel p reads the image, not its padding."""
    w = p % W
    h = p // W % H
    across = tl.where(w > 0, 1, 0) | 2 | tl.where(w < W - 1, 4, 0)
    bits = tl.where(h > 0, across, 0) | (across << 3) | tl.where(h < H - 1, across << 6, 0)
    return tl.where(p < P, bits, 0)


@triton.jit
def _activation(rows, ok, k, K, mean, scale, shift, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, k] of relu(norm(z)), of z without a norm; zero where not ok: the padding is of what the convolution
    reads."""
    z = tl.load(rows + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0).to(ACC)
    if mean is not None:
        m = tl.load(mean + k, mask=k < K, other=0.0)
        s = tl.load(scale + k, mask=k < K, other=0.0)
        t = tl.load(shift + k, mask=k < K, other=0.0)
        z = tl.where(ok[:, None], activate.relu((z - m[None, :]) * s[None, :] + t[None, :]), 0.0)
    return z


@triton.jit
def _slice_gradient(  # type: ignore[no-untyped-def]
    features, gradient, ok, n, N, mean, slope, offset, pixel, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dY [rows, n] = dropout(G - ((F - mean) * slope + offset)), zero where not ok; mean None: nothing is owed.
    features, gradient: rows."""
    inside = ok[:, None] & (n < N)[None, :]
    d = tl.load(gradient + n[None, :], mask=inside, other=0.0).to(ACC)
    if mean is not None:
        f = tl.load(features + n[None, :], mask=inside, other=0.0).to(ACC)
        m = tl.load(mean + n, mask=n < N, other=0.0)
        s = tl.load(slope + n, mask=n < N, other=0.0)
        t = tl.load(offset + n, mask=n < N, other=0.0)
        owed = (f - m[None, :]) * s[None, :] + t[None, :]
        d = d - tl.where((s == 0.0)[None, :], t[None, :], owed)  # where nothing is owed, NaN in F is not seen
    if seed is not None:
        d = _drop(d, pixel, n, seed, layer, THRESHOLD, SCALE)
    return tl.where(ok[:, None], d, 0.0)


@triton.jit(do_not_specialize=["layer"])
def _forward(  # type: ignore[no-untyped-def]
    z, z_pitch, K, mean, scale, shift, weight, out, out_pitch, N, partials, P, H, W, tiles, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, UK: tl.constexpr, UN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """STEPS: of BK channels. One loop over taps and steps, which is what gets pipelined."""
    K, z_pitch = K * UK, tl.cast(z_pitch, tl.int64) * UK
    N, out_pitch = N * UN, tl.cast(out_pitch, tl.int64) * UN
    columns = tl.cdiv(N, BN)
    tile = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    p = tile * BP + tl.arange(0, BP)
    bits = _inside(p, P, H, W)
    rows = z + p.to(tl.int64)[:, None] * z_pitch
    acc = tl.zeros((BP, BN), ACC)
    for i in tl.range(0, 9 * STEPS, num_stages=STAGES):
        tap = i // STEPS
        k = i % STEPS * BK + tl.arange(0, BK)
        ok = ((bits >> tap) & 1) != 0
        at = (tap // 3 - 1) * W + tap % 3 - 1
        a = _activation(rows + at * z_pitch, ok, k, K, mean, scale, shift, ACC)
        w_ok = (k < K)[:, None] & (n < N)[None, :]
        w = tl.load(weight + (tap * K + k)[:, None] * N + n[None, :], mask=w_ok, other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
    if seed is not None:
        acc = _drop(acc, p, n, seed, layer, THRESHOLD, SCALE)
    y = acc.to(out.dtype.element_ty)
    ok = (p < P)[:, None] & (n < N)[None, :]
    tl.store(out + p.to(tl.int64)[:, None] * out_pitch + n[None, :], y, mask=ok)
    if partials is not None:  # of what was stored
        store_tile_statistics(y, ok, tl.minimum(P - tile * BP, BP), partials, tile, tiles, n, N, 0, ACC)


@triton.jit(do_not_specialize=["layer"])
def _dgrad(  # type: ignore[no-untyped-def]
    features, f_pitch, gradient, g_pitch, N, c_mean, slope, offset, weight, z, z_pitch, K, mean, scale, shift, out,
    out_pitch, source, source_pitch, sums, P, H, W, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, UK: tl.constexpr, UN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [P, K], added to source, and sums [tiles, 2, K]. STEPS: of BN channels. The product's columns are pixels:
    cheap sums."""
    K, z_pitch, out_pitch = K * UK, tl.cast(z_pitch, tl.int64) * UK, tl.cast(out_pitch, tl.int64) * UK
    N, f_pitch, g_pitch = N * UN, tl.cast(f_pitch, tl.int64) * UN, tl.cast(g_pitch, tl.int64) * UN
    columns = tl.cdiv(K, BK)
    tile = tl.program_id(0) // columns
    k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    p = tile * BP + tl.arange(0, BP)
    bits = _inside(p, P, H, W)
    q = p.to(tl.int64)
    f_rows, g_rows = features + q[:, None] * f_pitch, gradient + q[:, None] * g_pitch
    dh = tl.zeros((BK, BP), ACC)
    for i in tl.range(0, 9 * STEPS, num_stages=STAGES):
        tap = i // STEPS
        n = i % STEPS * BN + tl.arange(0, BN)
        ok = ((bits >> tap) & 1) != 0
        at = (tap // 3 - 1) * W + tap % 3 - 1
        dy = _slice_gradient(
            f_rows + at * f_pitch, g_rows + at * g_pitch, ok, n, N, c_mean, slope, offset, p + at, seed, layer,
            THRESHOLD, SCALE, ACC,
        )  # fmt: skip
        row = (8 - tap) * K + k  # the output at a tap read this pixel by the opposite one
        w_ok = (k < K)[:, None] & (n < N)[None, :]
        w = tl.load(weight + row[:, None] * N + n[None, :], mask=w_ok, other=0.0)
        dh = tl.dot(w, tl.trans(dy.to(w.dtype)), dh, input_precision=PRECISION, out_dtype=ACC)
    ok = (k < K)[:, None] & (p < P)[None, :]
    dz = dh
    if mean is not None:
        m = tl.load(mean + k, mask=k < K, other=0.0)[:, None]
        s = tl.load(scale + k, mask=k < K, other=0.0)[:, None]
        t = tl.load(shift + k, mask=k < K, other=0.0)[:, None]
        centred = tl.load(z + q[None, :] * z_pitch + k[:, None], mask=ok, other=0.0).to(ACC) - m
        dn = tl.where(ok, activate.relu_gradient(dh, centred * s + t), 0.0)
        to = sums + tile.to(tl.int64) * 2 * K + k
        tl.store(to, tl.sum(dn, 1), mask=k < K)
        tl.store(to + K, tl.sum(dn * centred, 1), mask=k < K)
        dz = dn * s
    if out is not None:
        if source is not None:
            at = q[None, :] * (tl.cast(source_pitch, tl.int64) * UK) + k[:, None]
            dz += tl.load(source + at, mask=ok, other=0.0).to(ACC)
        tl.store(out + q[None, :] * out_pitch + k[:, None], dz.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["layer"])
def _wgrad(  # type: ignore[no-untyped-def]
    features, f_pitch, gradient, g_pitch, N, c_mean, slope, offset, z, z_pitch, K, mean, scale, shift, partials,
    P, H, W, chunk, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, UK: tl.constexpr, UN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [splits, 9, K, N]: one tap of a split of `chunk` pixels. Taps are the fast axis: they share loads."""
    K, z_pitch = K * UK, tl.cast(z_pitch, tl.int64) * UK
    N, f_pitch, g_pitch = N * UN, tl.cast(f_pitch, tl.int64) * UN, tl.cast(g_pitch, tl.int64) * UN
    columns, rows = tl.cdiv(N, BN), tl.cdiv(K, BK)
    tap = tl.program_id(0) % 9
    n = tl.program_id(0) // 9 % columns * BN + tl.arange(0, BN)
    k = tl.program_id(0) // (9 * columns) % rows * BK + tl.arange(0, BK)
    split = tl.program_id(0) // (9 * columns * rows)
    at = (tap // 3 - 1) * W + tap % 3 - 1
    element = z.dtype.element_ty
    acc = tl.zeros((BK, BN), ACC)
    for p0 in tl.range(split * chunk, tl.minimum(P, split * chunk + chunk), BP, num_stages=STAGES):
        p = p0 + tl.arange(0, BP)
        q = p.to(tl.int64)[:, None]
        ok = ((_inside(p, P, H, W) >> tap) & 1) != 0
        a = _activation(z + (q + at) * z_pitch, ok, k, K, mean, scale, shift, ACC)
        dy = _slice_gradient(
            features + q * f_pitch, gradient + q * g_pitch, ok, n, N, c_mean, slope, offset, p, seed, layer,
            THRESHOLD, SCALE, ACC,
        )  # fmt: skip
        acc = tl.dot(tl.trans(a.to(element)), dy.to(element), acc, input_precision=PRECISION, out_dtype=ACC)
    to = partials + ((split.to(tl.int64) * 9 + tap) * K + k)[:, None] * N + n[None, :]
    tl.store(to, acc, mask=(k < K)[:, None] & (n < N)[None, :])


def _few(pixels: int) -> bool:
    """More programs rather than larger ones."""
    return pixels < 1 << 14


# Configurations to choose from, the default first. None spills, all fit: tests/kernels/test_compile.py.
def _forward_tiles(dtype: torch.dtype, pixels: int, b: int, g: int) -> list[Tile]:
    if dtype == torch.float64:
        return [Tile(32, power(g, 16, 32), 16, 4, 2)]
    n = power(g, 16, 64)
    if dtype == torch.float32:
        small, large = Tile(64, n, 32, 8, 2), Tile(128, min(n, 32), 16, 8, 2)
    else:
        small, large = Tile(64, n, power(b, 16, 64), 4, 3), Tile(128, n, power(b, 16, 64 if n < 64 else 32), 8, 2)
    return [small, large] if _few(pixels) else [large, small]


def _dgrad_tiles(dtype: torch.dtype, b: int, g: int) -> list[Tile]:
    """outputs: of the b channels, depth: of the g channels."""
    if dtype == torch.float64:
        return [Tile(32, power(b, 16, 32), 16, 4, 2)]
    if dtype == torch.float32:
        return [Tile(64, power(b, 16, 64), power(g, 16, 32), 8, 2)]
    n = power(g, 16, 64)
    return [Tile(64, power(b, 16, 128), n, 8, 2), Tile(64, power(b, 16, 64), n, 4, 2)]


def _wgrad_tiles(dtype: torch.dtype, b: int, g: int) -> list[Tile]:
    """pixels: at a time, outputs: of the b channels, depth: of the g channels."""
    if dtype == torch.float64:
        return [Tile(16, power(b, 16, 32), power(g, 16, 32), 4, 2)]
    n = power(g, 16, 64)
    if dtype == torch.float32:
        return [Tile(32, power(b, 16, 64), n, 8, 2)]
    return [Tile(64, power(b, 16, 128), n, 8, 2), Tile(64, power(b, 16, 64), n, 4, 2)]


def _key(z: Tensor, g: int, precision: str, dropout: Dropout | None) -> tuple[object, ...]:
    """What a choice depends on."""
    pixels, b = z.shape
    return str(z.dtype), precision, triton.next_power_of_2(pixels), b, g, dropout is not None


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[g, b, 3, 3] -> [9, b, g]."""
    g, b = weight.shape[:2]
    return weight.new_empty((3, 3, b, g), dtype=dtype).copy_(weight.permute(2, 3, 1, 0)).view(9, b, g)


def _mask(dropout: Dropout | None) -> cuda.Mask:
    """Arguments seed, layer, THRESHOLD, SCALE."""
    if dropout is None or dropout.rate <= 0:
        return None, 0, 0, 1.0
    return dropout.seed, dropout.layer, dropout.threshold, dropout.scale


def _vectors(affine: Norm | Correction | None) -> tuple[Tensor | None, ...]:
    if isinstance(affine, Norm):
        return affine.mean, affine.scale, affine.shift
    return (affine.mean, affine.slope, affine.offset) if affine else (None, None, None)


def _pitch(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _check(geometry: Geometry, weight: Tensor, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor]) -> None:
    """inputs: [P, b] views, outputs: [P, g] views."""
    g, b = weight.shape[:2]
    if weight.shape != (g, b, 3, 3):
        raise ValueError(f"weight: expected [g, b, 3, 3], got {tuple(weight.shape)}")
    if geometry.pool:
        raise ValueError("a 3x3 convolution does not pool")
    given = {name: x for name, x in inputs.items() if x is not None}
    dtype = given["z"].dtype
    for views, channels in ((given, b), (outputs, g)):
        for name, x in views.items():
            launch.check_view(x, name)
            if x.shape != (geometry.pixels, channels) or x.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {dtype} {(geometry.pixels, channels)}, got {x.dtype} {tuple(x.shape)}"
                )


def forward(
    z: Tensor,
    norm: Norm | None,
    weight: Tensor,
    out: Tensor,
    geometry: Geometry,
    precision: str = "ieee",
    statistics: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """out [P, g] view = dropout(conv3x3(relu(norm(z)), weight)), of z as it is without a norm; z [P, b] view, weight
    [g, b, 3, 3]; statistics [2, g] float64 view: takes out's mean and biased variance."""
    _check(geometry, weight, {"z": z}, {"out": out})
    (pixels, b), g, dtype = z.shape, weight.shape[0], z.dtype
    if statistics is not None:
        check_statistics(statistics, g)
    if norm is not None and cuda.takes(z, weight, out, geometry, precision):
        return cuda.forward(z, norm, weight, out, geometry, precision, statistics, _mask(dropout))
    uk, un = launch.unit(b, z.stride(0)), launch.unit(g, out.stride(0))
    seed, layer, threshold, scale = _mask(dropout)
    packed = _packed(weight, dtype)

    def partials_of(tile: Tile) -> Tensor | None:
        shape = 2, blocks(pixels, tile.pixels), g
        return None if statistics is None else out.new_empty(shape, dtype=torch.float64)

    def run(tile: Tile, partials: Tensor | None) -> None:
        tiles = blocks(pixels, tile.pixels)
        _forward[(tiles * blocks(g, tile.outputs),)](
            z, z.stride(0) // uk, b // uk, *_vectors(norm), packed, out, out.stride(0) // un, g // un,
            partials, pixels, geometry.h, geometry.w, tiles, seed, layer,
            THRESHOLD=threshold, SCALE=scale, UK=uk, UN=un, ACC=launch.sum_type(dtype), PRECISION=precision,
            STEPS=blocks(b, tile.depth), BP=tile.pixels, BN=tile.outputs, BK=tile.depth, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip

    key, candidates = _key(z, g, precision, dropout), _forward_tiles(dtype, pixels, b, g)
    tile = tune.choose("conv3x3.forward", key, candidates, lambda tile: run(tile, partials_of(tile)))
    partials = partials_of(tile)
    run(tile, partials)
    if statistics is not None and partials is not None:
        merge(partials, pixels, tile.pixels, statistics)


def dgrad(
    features: Tensor,
    gradient: Tensor,
    correction: Correction | None,
    weight: Tensor,
    z: Tensor,
    norm: Norm | None,
    out: Tensor | None,
    geometry: Geometry,
    precision: str = "ieee",
    dropout: Dropout | None = None,
    source: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor | None:
    """features, gradient: F and G, [P, g] views of the slice; dY = G - ((F - mean) * slope + offset), G without a
    correction. out [P, b] view (None: unwanted) takes dn * scale, dn being the gradient of norm(z), or without a norm
    that of z, added to source [P, b] view (it may be out). Returns sums [2, b] of dn and dn * (z - mean), float32
    (float64 for float64), or adds them to the given sums [2, b] view and returns that; None without a norm."""
    _check(geometry, weight, {"z": z, "out": out, "source": source}, {"features": features, "gradient": gradient})
    (pixels, b), g, dtype = z.shape, weight.shape[0], z.dtype
    adds = sums is not None
    if norm is not None and cuda.takes(z, weight, features, geometry, precision):
        slices = features, gradient, correction, weight, z, norm
        found = cuda.dgrad(*slices, out, geometry, precision, _mask(dropout), source)
        return found if sums is None else sums.add_(found)
    uk = launch.unit(b, z.stride(0), _pitch(out), _pitch(source))
    un = launch.unit(g, features.stride(0), gradient.stride(0))
    seed, layer, threshold, scale = _mask(dropout)
    packed = _packed(weight, dtype)

    def run(tile: Tile, out: Tensor | None) -> Tensor | None:
        """Partial sums."""
        tiles = blocks(pixels, tile.pixels)
        partials = None if norm is None else z.new_empty((tiles, 2, b), dtype=launch.sum_dtype(dtype))
        _dgrad[(tiles * blocks(b, tile.outputs),)](
            features, features.stride(0) // un, gradient, gradient.stride(0) // un, g // un, *_vectors(correction),
            packed, z, z.stride(0) // uk, b // uk, *_vectors(norm), out, _pitch(out) // uk, source,
            _pitch(source) // uk, partials, pixels, geometry.h, geometry.w, seed, layer,
            THRESHOLD=threshold, SCALE=scale, UK=uk, UN=un, ACC=launch.sum_type(dtype), PRECISION=precision,
            STEPS=blocks(g, tile.depth), BP=tile.pixels, BN=tile.depth, BK=tile.outputs, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip
        return partials

    def trial(tile: Tile) -> None:
        """Into scratch memory what would be added."""
        run(tile, out if out is None or source is None else torch.empty_like(out))

    key, candidates = _key(z, g, precision, dropout), _dgrad_tiles(dtype, b, g)
    partials = run(tune.choose("conv3x3.dgrad", key, candidates, trial), out)
    if partials is not None:
        sums = partials.new_empty((2, b)) if sums is None else sums
        total(partials, sums, add=adds)
    return sums


def wgrad(
    features: Tensor,
    gradient: Tensor,
    correction: Correction | None,
    weight: Tensor,
    z: Tensor,
    norm: Norm | None,
    geometry: Geometry,
    precision: str = "ieee",
    dropout: Dropout | None = None,
) -> Tensor:
    """Arguments of `dgrad`. Returns dweight [g, b, 3, 3], contiguous; float32 (float64 for float64)."""
    _check(geometry, weight, {"z": z}, {"features": features, "gradient": gradient})
    (pixels, b), g, dtype = z.shape, weight.shape[0], z.dtype
    if norm is not None and cuda.takes(z, weight, features, geometry, precision):
        slices = features, gradient, correction, weight, z, norm
        return cuda.wgrad(*slices, geometry, precision, _mask(dropout))
    uk, un = launch.unit(b, z.stride(0)), launch.unit(g, features.stride(0), gradient.stride(0))
    seed, layer, threshold, scale = _mask(dropout)

    def programs(tile: Tile) -> int:
        return 9 * blocks(b, tile.outputs) * blocks(g, tile.depth)

    def chunk(tile: Tile) -> int:
        return launch.chunk(pixels, tile.pixels, programs(tile))

    def partials_of(tile: Tile) -> Tensor:
        return z.new_empty((blocks(pixels, chunk(tile)), 9 * b, g), dtype=launch.sum_dtype(dtype))

    def run(tile: Tile, partials: Tensor) -> None:
        _wgrad[(programs(tile) * len(partials),)](
            features, features.stride(0) // un, gradient, gradient.stride(0) // un, g // un, *_vectors(correction),
            z, z.stride(0) // uk, b // uk, *_vectors(norm), partials, pixels, geometry.h, geometry.w, chunk(tile), seed,
            layer, THRESHOLD=threshold, SCALE=scale, UK=uk, UN=un, ACC=launch.sum_type(dtype), PRECISION=precision,
            BP=tile.pixels, BN=tile.depth, BK=tile.outputs, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip

    key, candidates = _key(z, g, precision, dropout), _wgrad_tiles(dtype, b, g)
    tile = tune.choose("conv3x3.wgrad", key, candidates, lambda tile: run(tile, partials_of(tile)))
    partials = partials_of(tile)
    run(tile, partials)
    sums = partials.new_empty((9 * b, g))
    total(partials.view(-1, 1, 9 * b * g), sums.view(1, 9 * b * g))
    return sums.view(3, 3, b, g).permute(3, 2, 0, 1).contiguous()
