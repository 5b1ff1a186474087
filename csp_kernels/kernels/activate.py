"""What follows the raw output z of a product: norm, activation and 2x2 average, and back."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import launch, tune
from csp_kernels.kernels.launch import Geometry, Norm, blocks
from csp_kernels.kernels.statistics import total


@dataclass(frozen=True)
class Activation:
    """code: its position in csp_kernels.vocabulary.ACTIVATIONS; negative_slope: of leaky ReLU."""

    code: int
    negative_slope: float = 0.0


IDENTITY, RELU = Activation(0), Activation(1)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gate(x):
    """tanh(log(1 + e^x))"""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    w = e * (e + 2.0)
    return w / (w + 2.0)


@triton.jit
def _normal(x):
    """P(X <= x) of a normal X."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_gate(x):
    """(1 + tanh(u / 2)) / 2 with u = 2 sqrt(2 / pi) (x + 0.044715 x^3)"""
    return _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def relu(x):
    """NaN stays NaN: what tl.maximum does by itself would turn it into 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_gradient(d, x):
    """As PyTorch's: NaN in x passes d, NaN in d is 0 where x is not active."""
    return tl.where(x <= 0.0, 0.0, d)


@triton.jit
def value(x, ACT: tl.constexpr, NEGATIVE: tl.constexpr):
    """The activation; NaN stays NaN."""
    tl.static_assert(ACT >= 0 and ACT <= 8, "unknown activation code: 0 to 8 are known")
    if ACT == 1:
        return relu(x)
    elif ACT == 2:
        return tl.where(x <= 0.0, x * NEGATIVE, x)
    elif ACT == 3:
        return x * _sigmoid(x)
    elif ACT == 4:
        return x * _gate(x)
    elif ACT == 5:
        t = x + 3.0
        return x * tl.where(t < 0.0, 0.0, tl.where(t > 6.0, 6.0, t)) * (1.0 / 6)
    elif ACT == 6:
        return tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACT == 7:
        return x * _normal(x)
    elif ACT == 8:
        return x * _gelu_gate(x)
    else:
        return x


@triton.jit
def gradient(d, x, ACT: tl.constexpr, NEGATIVE: tl.constexpr):
    """d times the derivative at x. Where the activation is constant that is 0, whatever d is, as PyTorch's."""
    tl.static_assert(ACT >= 0 and ACT <= 8, "unknown activation code: 0 to 8 are known")
    if ACT == 0:
        return d
    elif ACT == 1:
        return relu_gradient(d, x)
    elif ACT == 2:
        return tl.where(x > 0.0, d, d * NEGATIVE)
    elif ACT == 3:
        s = _sigmoid(x)
        return d * (s * (1.0 + x * (1.0 - s)))
    elif ACT == 4:
        t = _gate(x)
        return d * (t + x * (1.0 - t * t) * _sigmoid(x))
    elif ACT == 5:
        return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, d, d * (x * (1.0 / 3) + 0.5)))
    elif ACT == 6:
        return tl.where((x > 0.0) & (x < 6.0), d, 0.0)  # of NaN too, as PyTorch's vectors
    elif ACT == 7:
        return d * (_normal(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    else:
        s = _gelu_gate(x)
        return d * (s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)))


@triton.jit
def _forward(
    z, z_pitch, mean, scale, shift, out, out_pitch, P, N, H, W,
    UNIT: tl.constexpr, POOL: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """P: pixels of out."""
    N = N * UNIT
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (p < P)[:, None] & (n < N)[None, :]
    row = p
    if POOL:  # the first of four
        h, w = H // 2, W // 2
        row = (p // (h * w) * H + p // w % h * 2) * W + p % w * 2
    if mean is not None:
        m = tl.load(mean + n, n < N, 0.0)[None, :]
        s = tl.load(scale + n, n < N, 0.0)[None, :]
        t = tl.load(shift + n, n < N, 0.0)[None, :]
    y = tl.zeros((BP, BN), ACC)
    for tap in tl.static_range(4 if POOL else 1):
        at = row + tap // 2 * W + tap % 2
        x = tl.load(z + at[:, None] * (z_pitch * UNIT) + n[None, :], ok, 0.0).to(ACC)
        if mean is not None:
            x = (x - m) * s + t
        y += value(x, ACT, NEGATIVE)
    if POOL:
        y = y * 0.25
    tl.store(out + p[:, None] * (out_pitch * UNIT) + n[None, :], y.to(out.dtype.element_ty), ok)


@triton.jit
def _backward(
    d, d_pitch, z, z_pitch, mean, scale, shift, dn, dn_pitch, source, source_pitch, sums, P, N, H, W,
    UNIT: tl.constexpr, POOL: tl.constexpr, ACT: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr,
    STEPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """P: pixels of z; a program has STEPS * BP of them. sums [programs, 2, N]."""
    N = N * UNIT
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if mean is not None:
        m = tl.load(mean + n, n < N, 0.0)[None, :]
        s = tl.load(scale + n, n < N, 0.0)[None, :]
        t = tl.load(shift + n, n < N, 0.0)[None, :]
    dbeta = tl.zeros((BN,), ACC)
    dgamma = tl.zeros((BN,), ACC)
    for i in tl.range(STEPS):
        p = (tl.program_id(0).to(tl.int64) * STEPS + i) * BP + tl.arange(0, BP)
        ok = (p < P)[:, None] & (n < N)[None, :]
        row, row_ok = p, p < P
        if POOL:  # the average it belongs to; none on an odd border
            h, w = H // 2, W // 2
            y, x = p // W % H // 2, p % W // 2
            row, row_ok = (p // (H * W) * h + y) * w + x, (p < P) & (y < h) & (x < w)
        wanted = row_ok[:, None] & (n < N)[None, :]
        value = tl.load(d + row[:, None] * (d_pitch * UNIT) + n[None, :], wanted, 0.0).to(ACC)
        if POOL:
            value = value * 0.25
        if z is not None:
            pre = tl.load(z + p[:, None] * (z_pitch * UNIT) + n[None, :], ok, 0.0).to(ACC)
            if mean is not None:
                centred = pre - m
                pre = centred * s + t
            value = tl.where(wanted, gradient(value, pre, ACT, NEGATIVE), 0.0)
            if mean is not None:
                dbeta += tl.sum(value, 0)
                dgamma += tl.sum(value * centred, 0)
                value = value * s
        if dn is not None:
            if source is not None:
                value += tl.load(source + p[:, None] * (source_pitch * UNIT) + n[None, :], ok, 0.0).to(ACC)
            tl.store(dn + p[:, None] * (dn_pitch * UNIT) + n[None, :], value.to(dn.dtype.element_ty), ok)
    if mean is not None:
        to = sums + tl.program_id(0).to(tl.int64) * 2 * N + n
        tl.store(to, dbeta, n < N)
        tl.store(to + N, dgamma, n < N)


def _check(views: dict[str, tuple[Tensor | None, int]], channels: int) -> None:
    """views: each with its pixels."""
    for name, (x, pixels) in views.items():
        if x is not None:
            launch.check_view(x, name)
            if x.shape != (pixels, channels):
                raise ValueError(f"{name}: expected {(pixels, channels)}, got {tuple(x.shape)}")


def _tiles(dtype: torch.dtype, channels: int) -> list[tuple[int, int]]:
    """Pixels and channels of a step, of 8 KiB or of 4."""
    columns = launch.power(channels, 16, 128)
    return [(size // (columns * dtype.itemsize), columns) for size in (8192, 4096)]


def _key(d: Tensor, geometry: Geometry, act: Activation) -> tuple[object, ...]:
    """What a choice depends on."""
    return str(d.dtype), triton.next_power_of_2(geometry.pixels), geometry.pool, d.shape[1], act.code


def _pitch(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _vectors(norm: Norm | None) -> tuple[Tensor | None, ...]:
    return (norm.mean, norm.scale, norm.shift) if norm else (None, None, None)


def forward(z: Tensor, norm: Norm | None, out: Tensor, geometry: Geometry, act: Activation) -> None:
    """out [P', O] view = act(norm(z)), averaged over 2x2 pixels if the geometry pools; z [P, O] view."""
    pixels, channels = out.shape
    _check({"z": (z, geometry.pixels), "out": (out, geometry.outputs)}, channels)
    u = launch.unit(channels, z.stride(0), out.stride(0))

    def run(tile: tuple[int, int]) -> None:
        bp, bn = tile
        _forward[(blocks(pixels, bp), blocks(channels, bn))](
            z, z.stride(0) // u, *_vectors(norm), out, out.stride(0) // u, pixels, channels // u,
            geometry.h, geometry.w,
            UNIT=u, POOL=geometry.pool, ACT=act.code, NEGATIVE=act.negative_slope, ACC=launch.sum_type(z.dtype),
            BP=bp, BN=bn, num_warps=4,
        )  # fmt: skip

    key = *_key(out, geometry, act), norm is not None
    run(tune.choose("activate.forward", key, _tiles(z.dtype, channels), run))


def backward(
    d: Tensor,
    z: Tensor | None,
    norm: Norm | None,
    dn: Tensor | None,
    geometry: Geometry,
    act: Activation,
    source: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor | None:
    """d [P', O] view: gradient of what forward gives; dn' = d spread over the pixels of its average * act'(norm(z)),
    zero on the border of an odd map. dn [P, O] view: takes dn' * norm.scale (dn' without a norm), added to source
    [P, O] view (None: to nothing; it may be dn). z [P, O] view, None: act is the identity. Returns sums [2, O] of dn'
    and dn' * (z - norm.mean), or adds them to the given sums [2, O] view and returns that; None without a norm."""
    pixels, channels = geometry.pixels, d.shape[1]
    _check({"d": (d, geometry.outputs), "z": (z, pixels), "dn": (dn, pixels), "source": (source, pixels)}, channels)
    if z is None and (act.code != IDENTITY.code or norm is not None):
        raise ValueError("z is needed for the derivative")
    steps = 1 if launch.few(pixels) else 4
    adds, wide = sums is not None, launch.sum_dtype(d.dtype)
    if not adds and norm is not None:
        sums = d.new_empty((2, channels), dtype=wide)
    u = launch.unit(channels, d.stride(0), _pitch(z), _pitch(dn), _pitch(source))

    def run(tile: tuple[int, int], dn: Tensor | None) -> Tensor | None:
        """Partial sums."""
        bp, bn = tile
        programs = blocks(pixels, bp * steps)
        partials = None if norm is None else d.new_empty((programs, 2, channels), dtype=wide)
        _backward[(programs, blocks(channels, bn))](
            d, d.stride(0) // u, z, _pitch(z) // u, *_vectors(norm), dn, _pitch(dn) // u, source,
            _pitch(source) // u, partials, pixels, channels // u, geometry.h, geometry.w,
            UNIT=u, POOL=geometry.pool, ACT=act.code, NEGATIVE=act.negative_slope, ACC=launch.sum_type(d.dtype),
            STEPS=steps, BP=bp, BN=bn, num_warps=4,
        )  # fmt: skip
        return partials

    key = *_key(d, geometry, act), norm is not None, dn is not None, source is not None

    def trial(tile: tuple[int, int]) -> None:
        """Into scratch memory what would be added."""
        run(tile, dn if dn is None or source is None else torch.empty_like(dn))

    partials = run(tune.choose("activate.backward", key, _tiles(d.dtype, channels), trial), dn)
    if sums is not None and partials is not None:
        total(partials, sums, add=adds)
    return sums
