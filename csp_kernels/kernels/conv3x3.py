"""The 3x3 convolution, padding 1: forward, and both gradients. An implicit product over taps and channels: its input is
read through norm and ReLU or as it is, its output is a channel slice. The portable form: where that of the compiled
library (kernels/cuda.py) takes a layer, which reads through norm and ReLU, it runs instead.

P = N * H * W pixels and b channels enter, P' pixels and g channels leave: with stride 2 P' is a quarter. Groups are
computed some at a time, as one dense product with zeros between them: a part, which has a program axis of its own.
Weights are packed as [9, b, g of a part] in the type of the input."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import activate, cuda, elementwise, launch, tune
from csp_kernels.kernels.elementwise import After, apply_after, check_after
from csp_kernels.kernels.launch import Correction, Geometry, Norm, Tile, blocks, power
from csp_kernels.kernels.statistics import check_statistics, merge, store_tile_statistics, total

TOGETHER = 32  # channels of groups that are computed as one product: what fills its tile


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
def _drop(x, pixel, n, seed, layer, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
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
def _centre(p, H, W, STRIDE: tl.constexpr):
    """The pixel of the input in the middle of what output p reads."""
    q = p.to(tl.int64)
    if STRIDE > 1:
        h = (H + STRIDE - 1) // STRIDE
        w = (W + STRIDE - 1) // STRIDE
        q = (q // (h * w) * H + q // w % h * STRIDE) * W + q % w * STRIDE
    return q


@triton.jit
def _inside(p, P, H, W, STRIDE: tl.constexpr):
    """Bit t: tap t of output p reads the image, not its padding."""
    columns = (W + STRIDE - 1) // STRIDE
    rows = (H + STRIDE - 1) // STRIDE
    w = p % columns * STRIDE
    h = p // columns % rows * STRIDE
    across = tl.where(w > 0, 1, 0) | 2 | tl.where(w < W - 1, 4, 0)
    bits = tl.where(h > 0, across, 0) | (across << 3) | tl.where(h < H - 1, across << 6, 0)
    return tl.where(p < P, bits, 0)


@triton.jit
def _activation(rows, ok, k, K, mean, scale, shift, ACC: tl.constexpr):
    """[rows, k] of relu(norm(z)), of z without a norm; zero from K on and where not ok: the padding is of what the
    convolution reads."""
    z = tl.load(rows + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0).to(ACC)
    if mean is not None:
        m = tl.load(mean + k, mask=k < K, other=0.0)
        s = tl.load(scale + k, mask=k < K, other=0.0)
        t = tl.load(shift + k, mask=k < K, other=0.0)
        z = tl.where(ok[:, None], activate.relu((z - m[None, :]) * s[None, :] + t[None, :]), 0.0)
    return z


@triton.jit
def _slice_gradient(
    features, gradient, ok, n, N, mean, slope, offset, pixel, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dY [rows, n] = dropout(G - ((F - mean) * slope + offset)), zero from N on and where not ok; mean None: nothing is
    owed. features, gradient: rows."""
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


@triton.jit
def _part(channels, PARTS: tl.constexpr):
    """The first of a part's channels."""
    if PARTS == 1:
        return 0
    else:
        return tl.program_id(1) * channels


@triton.jit(do_not_specialize=["layer"])
def _forward(
    z, z_pitch, K, mean, scale, shift, weight, out, out_pitch, N, out_mean, out_scale, out_shift,
    residual, residual_pitch, residual_mean, residual_scale, residual_shift, partials, P, H, W, tiles, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr,
    RESIDUAL_ACT: tl.constexpr, RESIDUAL_NEGATIVE: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr,
    UK: tl.constexpr, UN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """P: pixels of out; K, N: channels of a part. STEPS: of BK channels. One loop over taps and steps, which is what
    gets pipelined."""
    K, z_pitch = K * UK, tl.cast(z_pitch, tl.int64) * UK
    N, out_pitch = N * UN, tl.cast(out_pitch, tl.int64) * UN
    k_first, n_first = _part(K, PARTS), _part(N, PARTS)
    k_end, n_end = k_first + K, n_first + N
    columns = tl.cdiv(N, BN)
    tile = tl.program_id(0) // columns
    n = n_first + tl.program_id(0) % columns * BN + tl.arange(0, BN)
    p = tile * BP + tl.arange(0, BP)
    bits = _inside(p, P, H, W, STRIDE)
    rows = z + _centre(p, H, W, STRIDE)[:, None] * z_pitch
    acc = tl.zeros((BP, BN), ACC)
    for i in tl.range(0, 9 * STEPS, num_stages=STAGES):
        tap = i // STEPS
        k = k_first + i % STEPS * BK + tl.arange(0, BK)
        ok = ((bits >> tap) & 1) != 0
        at = (tap // 3 - 1) * W + tap % 3 - 1
        a = _activation(rows + at * z_pitch, ok, k, k_end, mean, scale, shift, ACC)
        w_ok = (k < k_end)[:, None] & (n < n_end)[None, :]
        w = tl.load(weight + (tap * K * PARTS + k)[:, None] * N + (n - n_first)[None, :], mask=w_ok, other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
    ok = (p < P)[:, None] & (n < n_end)[None, :]
    if seed is not None:
        acc = _drop(acc, p, n, seed, layer, THRESHOLD, SCALE)
    if out_mean is not None:
        m = tl.load(out_mean + n, mask=n < n_end, other=0.0)[None, :]
        s = tl.load(out_scale + n, mask=n < n_end, other=0.0)[None, :]
        t = tl.load(out_shift + n, mask=n < n_end, other=0.0)[None, :]
        acc = activate.value((acc - m) * s + t, ACT, NEGATIVE)
    if residual is not None:
        acc = elementwise.plus(
            acc, residual, tl.cast(residual_pitch, tl.int64) * UN, residual_mean, residual_scale, residual_shift,
            p.to(tl.int64)[:, None], n, n_end, ok, RESIDUAL_ACT, RESIDUAL_NEGATIVE, ACC,
        )  # fmt: skip
    y = acc.to(out.dtype.element_ty)
    tl.store(out + p.to(tl.int64)[:, None] * out_pitch + n[None, :], y, mask=ok)
    if partials is not None:  # of what was stored
        store_tile_statistics(y, ok, tl.minimum(P - tile * BP, BP), partials, tile, tiles, n, n_end, N * PARTS, 0, ACC)


@triton.jit(do_not_specialize=["layer"])
def _dgrad(
    features, f_pitch, gradient, g_pitch, N, c_mean, slope, offset, weight, z, z_pitch, K, mean, scale, shift, out,
    out_pitch, source, source_pitch, sums, P, H, W, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr,
    UK: tl.constexpr, UN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [P, K], added to source, and sums [tiles, 2, K]. P: pixels of the gradient; K, N: channels of a part. STEPS:
    of BN channels. The product's columns are pixels: cheap sums.

    With stride 2 a program has pixels of one parity of row and column, which as many taps read as each other: an even
    row is in the middle of one output, an odd one the last of one and the first of the next."""
    K, z_pitch, out_pitch = K * UK, tl.cast(z_pitch, tl.int64) * UK, tl.cast(out_pitch, tl.int64) * UK
    N, f_pitch, g_pitch = N * UN, tl.cast(f_pitch, tl.int64) * UN, tl.cast(g_pitch, tl.int64) * UN
    k_first, n_first = _part(K, PARTS), _part(N, PARTS)
    k_end, n_end = k_first + K, n_first + N
    columns = tl.cdiv(K, BK)
    tile = tl.program_id(0) // columns
    k = k_first + tl.program_id(0) % columns * BK + tl.arange(0, BK)
    if STRIDE == 1:
        p = tile * BP + tl.arange(0, BP)
        bits = _inside(p, P, H, W, 1)
        q = p.to(tl.int64)
        inside = p < P
        steps = 9 * STEPS
    else:
        share = tile // tl.cdiv(P, BP)  # the dearest first
        odd_y, odd_x = 1 - share // 2, 1 - share % 2
        p = tile % tl.cdiv(P, BP) * BP + tl.arange(0, BP)
        h, w = (H + 1) // 2, (W + 1) // 2
        y, x = p // w % h, p % w
        q = _centre(p, H, W, 2) + odd_y * W + odd_x
        inside = (p < P) & (y * 2 + odd_y < H) & (x * 2 + odd_x < W)
        beside, below = tl.where(x < w - 1, 2, 0), tl.where(y < h - 1, 4, 0)
        bits = tl.where(inside, 1 | beside | below | (beside * below), 0)
        steps = (1 + odd_y) * (1 + odd_x) * STEPS
    o = p.to(tl.int64)
    f_rows, g_rows = features + o[:, None] * f_pitch, gradient + o[:, None] * g_pitch
    dh = tl.zeros((BK, BP), ACC)
    for i in tl.range(0, steps, num_stages=STAGES):
        n = n_first + i % STEPS * BN + tl.arange(0, BN)
        if STRIDE == 1:  # the output at a tap read this pixel by the opposite one
            bit = i // STEPS
            tap = 8 - bit
            at = (bit // 3 - 1) * W + bit % 3 - 1
        else:
            down, right = i // STEPS // (1 + odd_x), i // STEPS % (1 + odd_x)
            bit = down * 2 + right
            tap = (1 + odd_y - 2 * down) * 3 + 1 + odd_x - 2 * right
            at = down * w + right
        ok = ((bits >> bit) & 1) != 0
        dy = _slice_gradient(
            f_rows + at * f_pitch, g_rows + at * g_pitch, ok, n, n_end, c_mean, slope, offset, p + at, seed, layer,
            THRESHOLD, SCALE, ACC,
        )  # fmt: skip
        row = tap * K * PARTS + k
        w_ok = (k < k_end)[:, None] & (n < n_end)[None, :]
        v = tl.load(weight + row[:, None] * N + (n - n_first)[None, :], mask=w_ok, other=0.0)
        dh = tl.dot(v, tl.trans(dy.to(v.dtype)), dh, input_precision=PRECISION, out_dtype=ACC)
    ok = (k < k_end)[:, None] & inside[None, :]
    dz = dh
    if mean is not None:
        m = tl.load(mean + k, mask=k < k_end, other=0.0)[:, None]
        s = tl.load(scale + k, mask=k < k_end, other=0.0)[:, None]
        t = tl.load(shift + k, mask=k < k_end, other=0.0)[:, None]
        centred = tl.load(z + q[None, :] * z_pitch + k[:, None], mask=ok, other=0.0).to(ACC) - m
        dn = tl.where(ok, activate.relu_gradient(dh, centred * s + t), 0.0)
        to = sums + tile.to(tl.int64) * 2 * K * PARTS + k
        tl.store(to, tl.sum(dn, 1), mask=k < k_end)
        tl.store(to + K * PARTS, tl.sum(dn * centred, 1), mask=k < k_end)
        dz = dn * s
    if out is not None:
        if source is not None:
            at = q[None, :] * (tl.cast(source_pitch, tl.int64) * UK) + k[:, None]
            dz += tl.load(source + at, mask=ok, other=0.0).to(ACC)
        tl.store(out + q[None, :] * out_pitch + k[:, None], dz.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["layer"])
def _wgrad(
    features, f_pitch, gradient, g_pitch, N, c_mean, slope, offset, z, z_pitch, K, mean, scale, shift, partials,
    P, H, W, chunk, seed, layer,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr,
    UK: tl.constexpr, UN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [splits, 9, K of all parts, N]: one tap of a split of `chunk` pixels of the gradient; K, N: channels of
    a part. Taps are the fast axis: they share loads."""
    K, z_pitch = K * UK, tl.cast(z_pitch, tl.int64) * UK
    N, f_pitch, g_pitch = N * UN, tl.cast(f_pitch, tl.int64) * UN, tl.cast(g_pitch, tl.int64) * UN
    k_first, n_first = _part(K, PARTS), _part(N, PARTS)
    k_end, n_end = k_first + K, n_first + N
    columns, rows = tl.cdiv(N, BN), tl.cdiv(K, BK)
    tap = tl.program_id(0) % 9
    n = n_first + tl.program_id(0) // 9 % columns * BN + tl.arange(0, BN)
    k = k_first + tl.program_id(0) // (9 * columns) % rows * BK + tl.arange(0, BK)
    split = tl.program_id(0) // (9 * columns * rows)
    at = (tap // 3 - 1) * W + tap % 3 - 1
    element = z.dtype.element_ty
    acc = tl.zeros((BK, BN), ACC)
    for p0 in tl.range(split * chunk, tl.minimum(P, split * chunk + chunk), BP, num_stages=STAGES):
        p = p0 + tl.arange(0, BP)
        q, o = _centre(p, H, W, STRIDE)[:, None], p.to(tl.int64)[:, None]
        ok = ((_inside(p, P, H, W, STRIDE) >> tap) & 1) != 0
        a = _activation(z + (q + at) * z_pitch, ok, k, k_end, mean, scale, shift, ACC)
        dy = _slice_gradient(
            features + o * f_pitch, gradient + o * g_pitch, ok, n, n_end, c_mean, slope, offset, p, seed, layer,
            THRESHOLD, SCALE, ACC,
        )  # fmt: skip
        acc = tl.dot(tl.trans(a.to(element)), dy.to(element), acc, input_precision=PRECISION, out_dtype=ACC)
    to = partials + ((split.to(tl.int64) * 9 + tap) * K * PARTS + k)[:, None] * N + (n - n_first)[None, :]
    tl.store(to, acc, mask=(k < k_end)[:, None] & (n < n_end)[None, :])


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


@dataclass(frozen=True)
class _Parts:
    """Groups, `together` at a time: parts of the channels, each a dense convolution of b channels to g."""

    count: int
    together: int
    b: int
    g: int

    @staticmethod
    def of(weight: Tensor, channels: int) -> _Parts:
        """weight: [g, b of a group, 3, 3], of so many channels that enter. As many groups as fill a product's tile."""
        groups, out = channels // weight.shape[1], weight.shape[0]
        few = min(weight.shape[1], out // groups)
        together = next(n for n in range(min(groups, blocks(TOGETHER, few)), 0, -1) if groups % n == 0)
        count = groups // together
        return _Parts(count, together, channels // count, out // count)

    def within(self, spread: Tensor) -> Tensor:
        """spread: [3, 3, channels that enter, g]; a view [3, 3, parts, b of a group, g of a group, groups of a part]
        without what is between groups."""
        t = self.together
        parts = spread.unflatten(3, (t, self.g // t)).unflatten(2, (self.count, t, self.b // t))
        return parts.diagonal(0, 3, 5)

    def packed(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[9, channels that enter, g], zeros between groups."""
        spread = weight.new_zeros((3, 3, self.count * self.b, self.g), dtype=dtype)
        self.within(spread).copy_(weight.unflatten(0, (self.count, self.together, -1)).permute(4, 5, 0, 3, 2, 1))
        return spread.flatten(0, 1)

    def unpacked(self, spread: Tensor) -> Tensor:
        """[9, channels that enter, g] -> [g of all, b of a group, 3, 3], contiguous."""
        return self.within(spread.unflatten(0, (3, 3))).permute(2, 5, 4, 3, 0, 1).flatten(0, 2).contiguous()


def _key(
    z: Tensor, geometry: Geometry, parts: _Parts, precision: str, dropout: Dropout | None
) -> tuple[object, ...]:  # fmt: skip
    """What a choice depends on."""
    size = triton.next_power_of_2(geometry.pixels), geometry.stride
    return str(z.dtype), precision, *size, parts.b, parts.g, parts.count, dropout is not None


def _packed(weight: Tensor, dtype: torch.dtype, parts: _Parts) -> Tensor:
    """[g, b of a group, 3, 3] -> [9, b, g of a part]."""
    if parts.count * parts.together > 1:
        return parts.packed(weight, dtype)
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
    """inputs: [P, b] views, outputs: [P', g] views."""
    given = {name: x for name, x in inputs.items() if x is not None}
    g, b = weight.shape[0], given["z"].shape[-1]
    of_group = weight.shape[1] if weight.dim() == 4 else 0
    groups = b // of_group if of_group and b % of_group == 0 else 0
    if weight.shape != (g, of_group, 3, 3) or not groups or g % groups:
        raise ValueError(f"weight: expected [g, b or that of a group, 3, 3], got {tuple(weight.shape)}")
    if geometry.pool:
        raise ValueError("a 3x3 convolution does not pool")
    dtype = given["z"].dtype
    for views, shape in ((given, (geometry.pixels, b)), (outputs, (geometry.outputs, g))):
        for name, x in views.items():
            launch.check_view(x, name)
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {x.dtype} {tuple(x.shape)}")


def _in_cuda(z: Tensor, weight: Tensor, out: Tensor, geometry: Geometry, precision: str) -> bool:
    """Whether CUDA C++ takes it, read through a norm."""
    if geometry.stride > 1 or weight.shape[1] != z.shape[1]:
        return False
    return cuda.takes(z, weight, out, geometry, precision)


def forward(
    z: Tensor,
    norm: Norm | None,
    weight: Tensor,
    out: Tensor,
    geometry: Geometry,
    precision: str = "ieee",
    statistics: Tensor | None = None,
    dropout: Dropout | None = None,
    after: After | None = None,
) -> None:
    """out [P', g] view = dropout(conv3x3(relu(norm(z)), weight)), of z as it is without a norm; z [P, b] view, weight
    [g, b, 3, 3], of groups [g, b of a group, 3, 3]; statistics [2, g] float64 view: takes out's mean and biased
    variance; after, without statistics and dropout: what follows the convolution."""
    _check(geometry, weight, {"z": z}, {"out": out})
    pixels, g, dtype = geometry.outputs, weight.shape[0], z.dtype
    if statistics is not None:
        check_statistics(statistics, g)
    check_after(after, out, statistics is not None or dropout is not None)
    if norm is not None and _in_cuda(z, weight, out, geometry, precision):
        cuda.forward(z, norm, weight, out, geometry, precision, statistics, _mask(dropout))
        return apply_after(out, after)
    parts = _Parts.of(weight, z.shape[1])
    residual = after.residual.x if after and after.residual else None
    uk, un = launch.unit(parts.b, z.stride(0)), launch.unit(parts.g, out.stride(0), _pitch(residual))
    seed, layer, threshold, scale = _mask(dropout)
    packed = _packed(weight, dtype, parts)

    def partials_of(tile: Tile) -> Tensor | None:
        shape = 2, blocks(pixels, tile.pixels), g
        return None if statistics is None else out.new_empty(shape, dtype=torch.float64)

    def run(tile: Tile, partials: Tensor | None) -> None:
        tiles = blocks(pixels, tile.pixels)
        _forward[(tiles * blocks(parts.g, tile.outputs), parts.count)](
            z, z.stride(0) // uk, parts.b // uk, *_vectors(norm), packed, out, out.stride(0) // un, parts.g // un,
            *elementwise.tensors_after(after, un), partials, pixels, geometry.h, geometry.w, tiles, seed, layer,
            THRESHOLD=threshold, SCALE=scale, **elementwise.acts_after(after), STRIDE=geometry.stride,
            PARTS=parts.count, UK=uk, UN=un,
            ACC=launch.sum_type(dtype), PRECISION=precision, STEPS=blocks(parts.b, tile.depth),
            BP=tile.pixels, BN=tile.outputs, BK=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip

    key, candidates = _key(z, geometry, parts, precision, dropout), _forward_tiles(dtype, pixels, parts.b, parts.g)
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
    """features, gradient: F and G, [P', g] views of the slice; dY = G - ((F - mean) * slope + offset), G without a
    correction. out [P, b] view (None: unwanted) takes dn * scale, dn being the gradient of norm(z), or without a norm
    that of z, added to source [P, b] view (it may be out). Returns sums [2, b] of dn and dn * (z - mean), float32
    (float64 for float64), or adds them to the given sums [2, b] view and returns that; None without a norm."""
    _check(geometry, weight, {"z": z, "out": out, "source": source}, {"features": features, "gradient": gradient})
    pixels, b, dtype, adds = geometry.outputs, z.shape[1], z.dtype, sums is not None
    if norm is not None and _in_cuda(z, weight, features, geometry, precision):
        slices = features, gradient, correction, weight, z, norm
        found = cuda.dgrad(*slices, out, geometry, precision, _mask(dropout), source)
        return found if sums is None else sums.add_(found)
    parts = _Parts.of(weight, b)
    uk = launch.unit(parts.b, z.stride(0), _pitch(out), _pitch(source))
    un = launch.unit(parts.g, features.stride(0), gradient.stride(0))
    seed, layer, threshold, scale = _mask(dropout)
    packed = _packed(weight, dtype, parts)

    def run(tile: Tile, out: Tensor | None) -> Tensor | None:
        """Partial sums."""
        tiles = blocks(pixels, tile.pixels) * geometry.stride**2
        partials = None if norm is None else z.new_empty((tiles, 2, b), dtype=launch.sum_dtype(dtype))
        _dgrad[(tiles * blocks(parts.b, tile.outputs), parts.count)](
            features, features.stride(0) // un, gradient, gradient.stride(0) // un, parts.g // un,
            *_vectors(correction), packed, z, z.stride(0) // uk, parts.b // uk, *_vectors(norm), out,
            _pitch(out) // uk, source, _pitch(source) // uk, partials, pixels, geometry.h, geometry.w, seed, layer,
            THRESHOLD=threshold, SCALE=scale, STRIDE=geometry.stride, PARTS=parts.count, UK=uk, UN=un,
            ACC=launch.sum_type(dtype), PRECISION=precision, STEPS=blocks(parts.g, tile.depth),
            BP=tile.pixels, BN=tile.depth, BK=tile.outputs, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return partials

    def trial(tile: Tile) -> None:
        """Into scratch memory what would be added."""
        run(tile, out if out is None or source is None else torch.empty_like(out))

    key, candidates = _key(z, geometry, parts, precision, dropout), _dgrad_tiles(dtype, parts.b, parts.g)
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
    """Arguments of `dgrad`. Returns dweight, as large as weight, contiguous; float32 (float64 for float64)."""
    _check(geometry, weight, {"z": z}, {"features": features, "gradient": gradient})
    pixels, b, dtype = geometry.outputs, z.shape[1], z.dtype
    if norm is not None and _in_cuda(z, weight, features, geometry, precision):
        slices = features, gradient, correction, weight, z, norm
        return cuda.wgrad(*slices, geometry, precision, _mask(dropout))
    parts = _Parts.of(weight, b)
    uk, un = launch.unit(parts.b, z.stride(0)), launch.unit(parts.g, features.stride(0), gradient.stride(0))
    seed, layer, threshold, scale = _mask(dropout)

    def programs(tile: Tile) -> int:
        """Of a split and a part."""
        return 9 * blocks(parts.b, tile.outputs) * blocks(parts.g, tile.depth)

    def chunk(tile: Tile) -> int:
        return launch.chunk(pixels, tile.pixels, programs(tile) * parts.count)

    def partials_of(tile: Tile) -> Tensor:
        return z.new_empty((blocks(pixels, chunk(tile)), 9 * b, parts.g), dtype=launch.sum_dtype(dtype))

    def run(tile: Tile, partials: Tensor) -> None:
        _wgrad[(programs(tile) * len(partials), parts.count)](
            features, features.stride(0) // un, gradient, gradient.stride(0) // un, parts.g // un,
            *_vectors(correction), z, z.stride(0) // uk, parts.b // uk, *_vectors(norm), partials,
            pixels, geometry.h, geometry.w, chunk(tile), seed, layer,
            THRESHOLD=threshold, SCALE=scale, STRIDE=geometry.stride, PARTS=parts.count, UK=uk, UN=un,
            ACC=launch.sum_type(dtype), PRECISION=precision,
            BP=tile.pixels, BN=tile.depth, BK=tile.outputs, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip

    key, candidates = _key(z, geometry, parts, precision, dropout), _wgrad_tiles(dtype, parts.b, parts.g)
    tile = tune.choose("conv3x3.wgrad", key, candidates, lambda tile: run(tile, partials_of(tile)))
    partials = partials_of(tile)
    run(tile, partials)
    sums = partials.new_empty((9 * b, parts.g))
    total(partials.view(-1, 1, sums.numel()), sums.view(1, -1))
    return parts.unpacked(sums.view(9, b, parts.g))
