"""torch.ops.csp_kernels.dense_block* in Triton: the order of work of csrc/cpu/dense_block.cpp, a kernel a step.

P = N * H * W pixels, K = c0 + l * g channels enter layer l, b bottleneck and g growth channels, C = c0 + L * g.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import conv3x3, launch, mix, statistics
from csp_kernels.kernels.launch import Correction, Geometry, Norm
from csp_kernels.ops._node import fake_image as image
from csp_kernels.ops._node import in_place, padded

# --- vectors, a value a channel, in float64 ---


@triton.jit
def _affine_kernel(mean, var, gamma, beta, out, n, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """out [3, n]: mean, scale and shift of `Norm`; shift holds what the dtype of out loses of the mean."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0).to(tl.float64)
    v = tl.load(var + c, inside, 1.0).to(tl.float64)
    s = tl.load(gamma + c, inside, 0.0).to(tl.float64) / tl.sqrt(v + EPS)
    low = m.to(out.dtype.element_ty)
    shift = tl.load(beta + c, inside, 0.0).to(tl.float64) - (m - low.to(tl.float64)) * s
    tl.store(out + c, low, inside)
    tl.store(out + n + c, s.to(out.dtype.element_ty), inside)
    tl.store(out + 2 * n + c, shift.to(out.dtype.element_ty), inside)


@triton.jit
def _settle_kernel(
    sums, mean, var, gamma, dgamma, dbeta, owed, owed_pitch, correction, n, P, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums [2, n] of dn and dn * (x - mean) -> dgamma, dbeta, and what the norm takes from the gradient of its input:
    added to owed [2, n] (mean, slope), or written to correction [3, n] (mean, slope, offset); either may be None."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0).to(tl.float64)
    r = 1.0 / tl.sqrt(tl.load(var + c, inside, 1.0).to(tl.float64) + EPS)
    low = m.to(dgamma.dtype.element_ty)
    lost = m - low.to(tl.float64)
    bias = tl.load(sums + c, inside, 0.0).to(tl.float64)
    weight = r * (tl.load(sums + n + c, inside, 0.0).to(tl.float64) - lost * bias)
    tl.store(dbeta + c, bias.to(dbeta.dtype.element_ty), inside)
    tl.store(dgamma + c, weight.to(dgamma.dtype.element_ty), inside)
    s = tl.load(gamma + c, inside, 0.0).to(tl.float64) * r / P
    if owed is not None:
        at = owed + owed_pitch + c
        tl.store(owed + c, tl.load(owed + c, inside, 0.0) + s * bias, inside)
        tl.store(at, tl.load(at, inside, 0.0) + s * r * weight, inside)
    if correction is not None:
        slope = -s * r * weight
        tl.store(correction + c, low, inside)
        tl.store(correction + n + c, slope.to(correction.dtype.element_ty), inside)
        tl.store(correction + 2 * n + c, (-s * bias - slope * lost).to(correction.dtype.element_ty), inside)


@triton.jit
def _owed_kernel(owed, owed_pitch, mean, out, n, BLOCK: tl.constexpr):
    """owed [2, n] -> out [3, n]: gradient = G - ((F - mean) * slope + offset)."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0)
    slope = tl.load(owed + owed_pitch + c, inside, 0.0)
    low = m.to(out.dtype.element_ty)
    offset = tl.load(owed + c, inside, 0.0) - slope * (m - low.to(tl.float64))
    tl.store(out + c, low, inside)
    tl.store(out + n + c, slope.to(out.dtype.element_ty), inside)
    tl.store(out + 2 * n + c, offset.to(out.dtype.element_ty), inside)


@triton.jit
def _pay_kernel(
    grad, grad_pitch, features, features_pitch, owed, out, P, N, UNIT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr
):
    """out [P, N * UNIT], contiguous = grad - ((features - mean) * slope + offset), owed [3, N * UNIT]."""
    N = N * UNIT
    p = (tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP))[:, None]
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    ok = (p < P) & (n < N)
    mean, slope = tl.load(owed + n, n < N, 0.0), tl.load(owed + N + n, n < N, 0.0)
    offset = tl.load(owed + 2 * N + n, n < N, 0.0)
    f = tl.load(features + p * (features_pitch * UNIT) + n, ok, 0.0).to(owed.dtype.element_ty)
    g = tl.load(grad + p * (grad_pitch * UNIT) + n, ok, 0.0).to(owed.dtype.element_ty)
    tl.store(out + p * N + n, (g - ((f - mean) * slope + offset)).to(out.dtype.element_ty), ok)


# --- the block ---

BLOCK = 256  # channels a program of the kernels on vectors


def _pixels(x: Tensor) -> Tensor:
    """[P, channels] view of an image in channels_last order, or of a channel slice of one (of a copy of any other)."""
    x = in_place(x)
    n, c, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    return x.as_strided((n * h * w, c), (pitch, 1))


def _as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """As its parameter lies."""
    if parameter.is_contiguous():
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)


class _BatchNorm(NamedTuple):
    mean: Tensor  # [n] of the batch, float64, or running
    var: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    frozen: bool

    def load(self) -> Norm:
        n = len(self.gamma)
        out = self.gamma.new_empty((3, n))
        grid = (triton.cdiv(n, BLOCK),)
        _affine_kernel[grid](self.mean, self.var, self.gamma, self.beta, out, n, EPS=self.eps, BLOCK=BLOCK)
        return Norm(*out.unbind())

    def settle(self, sums: Tensor, pixels: int, owed: Tensor | None = None) -> tuple[Tensor, Tensor, Correction | None]:
        """Gradients of weight and bias; what the norm takes from its input's gradient goes to owed if given."""
        n = len(self.gamma)
        dgamma, dbeta = torch.empty_like(self.gamma), torch.empty_like(self.beta)
        correction = self.gamma.new_empty((3, n)) if owed is None and not self.frozen else None
        owed, pitch = (None, 0) if owed is None or self.frozen else (owed, owed.stride(0))
        moments = self.mean, self.var, self.gamma
        _settle_kernel[(triton.cdiv(n, BLOCK),)](
            sums, *moments, dgamma, dbeta, owed, pitch, correction, n, pixels, EPS=self.eps, BLOCK=BLOCK
        )
        return dgamma, dbeta, None if correction is None else Correction(*correction.unbind())


class _Layer(NamedTuple):
    entering: int  # K
    norm1: _BatchNorm
    conv1: Tensor  # [b, K]
    norm2: _BatchNorm
    conv2: Tensor  # [g, b, 3, 3]
    dropout: conv3x3.Dropout | None
    statistics1: Tensor  # [2, g] float64 view, of the slice that the layer adds
    statistics2: Tensor  # [2, b] float64 view


class _Block:
    """The arguments of an operator, by layer."""

    def __init__(
        self,
        like: Tensor,
        in_channels: int,
        params: Sequence[Tensor],
        running: Sequence[Tensor],
        frozen: Sequence[int] | None,
        eps: Sequence[float],
        seed: Tensor | None,
        drop_rate: float,
        winograd: int,
        stats: Tensor | None = None,
    ) -> None:
        n, _, h, w = like.shape
        layers, self.width, self.growth = len(params) // 6, params[2].shape[0], params[5].shape[0]
        self.geometry, self.pixels = Geometry(n, h, w), n * h * w
        self.channels, self.total = in_channels, in_channels + layers * self.growth
        columns = self.total + layers * self.width
        self.stats = like.new_zeros((2, columns), dtype=torch.float64) if stats is None else stats
        # 4: less precision than float32's was asked for, see csp_kernels.ops._node.winograd
        self.precision = "tf32" if winograd == 4 and like.dtype == torch.float32 else "ieee"
        self.layers = list(self._layers(params, iter(running), frozen, eps, seed, drop_rate))
        self.collects = not all(layer.norm1.frozen for layer in self.layers)

    def _layers(
        self,
        params: Sequence[Tensor],
        running: Iterator[Tensor],
        frozen: Sequence[int] | None,
        eps: Sequence[float],
        seed: Tensor | None,
        drop_rate: float,
    ) -> Iterator[_Layer]:
        def norm(index: int, columns: Tensor, gamma: Tensor, beta: Tensor) -> _BatchNorm:
            fixed = frozen is None or bool(frozen[index])
            mean, var = (next(running), next(running)) if fixed else columns.unbind()
            return _BatchNorm(mean, var, gamma, beta, eps[index], fixed)

        for i in range(len(params) // 6):
            gamma1, beta1, conv1, gamma2, beta2, conv2 = params[6 * i : 6 * i + 6]
            entering, at = self.channels + i * self.growth, self.total + i * self.width
            columns = self.stats[:, at : at + self.width]
            yield _Layer(
                entering,
                norm(2 * i, self.stats[:, :entering], gamma1, beta1),
                conv1.reshape(self.width, entering),
                norm(2 * i + 1, columns, gamma2, beta2),
                conv2.contiguous(),
                conv3x3.Dropout(drop_rate, seed, i) if seed is not None and drop_rate > 0 else None,
                self.stats[:, entering : entering + self.growth],
                columns,
            )

    def scratch(self, like: Tensor) -> Tensor:
        """[P, padded(b)], as what is kept of a layer."""
        return like.new_empty((self.pixels, padded(self.width)))

    def bottleneck(self, layer: _Layer, norm: Norm, features: Tensor, out: Tensor, collect: bool) -> Tensor:
        z = out[:, : self.width]
        segments = [mix.Segment(features[:, : layer.entering], norm, None, False)]
        columns = layer.statistics2 if collect else None
        mix.forward(segments, layer.conv1, z, self.geometry, self.precision, columns)
        return z

    def forward(self, x: Tensor, y: Tensor, kept: Sequence[Tensor]) -> None:
        """kept: z of each layer to fill, or none."""
        features = _pixels(y)
        columns = self.stats[:, : self.channels] if self.collects else None
        statistics.copy_split(_pixels(x), features[:, : self.channels], columns)
        scratch = None if kept else self.scratch(x)
        for i, layer in enumerate(self.layers):
            z = kept[i] if scratch is None else scratch
            z = self.bottleneck(layer, layer.norm1.load(), features, z, not layer.norm2.frozen)
            out = features[:, layer.entering : layer.entering + self.growth]
            columns = layer.statistics1 if self.collects else None
            norm = layer.norm2.load()
            conv3x3.forward(z, norm, layer.conv2, out, self.geometry, self.precision, columns, layer.dropout)

    def due(self, owed: Tensor, channels: slice) -> Tensor:
        """[3, channels]: mean, slope and offset; gradient = G - ((F - mean) * slope + offset)."""
        at, end = channels.start, channels.stop
        out = self.layers[0].norm1.gamma.new_empty((3, end - at))
        grid = (triton.cdiv(end - at, BLOCK),)
        _owed_kernel[grid](owed[0, at:], owed.stride(0), self.stats[0, at:], out, end - at, BLOCK=BLOCK)
        return out

    def backward(self, grad_y: Tensor, y: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of x and, in order, of params."""
        features, source = _pixels(y), _pixels(grad_y)
        entering = self.layers[-1].entering
        grad = y.new_empty((self.pixels, entering))  # G: of the features, without what norms still owe
        statistics.copy_split(source[:, :entering], grad, None)
        owed = self.stats.new_zeros((2, entering + self.growth))  # of every channel: mean and slope
        dn = self.scratch(y)[:, : self.width]
        scratch = None if kept else self.scratch(y)
        gradients: list[list[Tensor]] = []
        for i in reversed(range(len(self.layers))):
            layer, norm1, norm2 = self.layers[i], self.layers[i].norm1.load(), self.layers[i].norm2.load()
            z = kept[i][:, : self.width] if scratch is None else self.bottleneck(layer, norm1, features, scratch, False)
            old, new = slice(layer.entering), slice(layer.entering, layer.entering + self.growth)
            due = Correction(*self.due(owed, new).unbind())
            slices = features[:, new], source[:, new], due, layer.conv2, z, norm2
            sums = conv3x3.dgrad(*slices, dn, self.geometry, self.precision, layer.dropout)
            dconv2 = conv3x3.wgrad(*slices, self.geometry, self.precision, layer.dropout)
            dgamma2, dbeta2, correction = layer.norm2.settle(sums, self.pixels)
            segments = [mix.Segment(features[:, old], norm1, grad[:, old], True)]
            raw = None if correction is None else z
            dconv1, sums = mix.backward(segments, dn, raw, correction, layer.conv1, self.geometry, self.precision)
            dgamma1, dbeta1, _ = layer.norm1.settle(sums, self.pixels, owed[:, old])
            gradients.append([dgamma1, dbeta1, dconv1, dgamma2, dbeta2, dconv2])
            source = grad
        dx = image(y, self.channels)
        self._pay(grad, features, self.due(owed, slice(0, self.channels)), dx)
        return [dx, *(gradient for layer in reversed(gradients) for gradient in layer)]

    def _pay(self, grad: Tensor, features: Tensor, owed: Tensor, dx: Tensor) -> None:
        pitches = grad.stride(0), features.stride(0)
        n, u = self.channels, launch.unit(self.channels, *pitches)
        block = launch.power(n, 16, 128)
        rows = 4096 // block
        grid = (triton.cdiv(self.pixels, rows), triton.cdiv(n, block))
        _pay_kernel[grid](
            grad, pitches[0] // u, features, pitches[1] // u, owed, dx, self.pixels, n // u, UNIT=u, BP=rows, BN=block
        )


# --- the operators, with the schemas of csrc/dense_block.cpp ---


def forward(
    x: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    seed: Tensor | None,
    drop_rate: float,
    keep_bottleneck: bool,
    winograd: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    block = _Block(x, x.shape[1], params, running, frozen, eps, seed, drop_rate, winograd)
    y = image(x, block.total)
    kept = [block.scratch(x) for _ in block.layers] if keep_bottleneck else []
    if x.numel() > 0:
        block.forward(x, y, kept)
    return y, kept, block.stats


def backward(
    grad_y: Tensor,
    y: Tensor,
    z: list[Tensor],
    stats: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    seed: Tensor | None,
    drop_rate: float,
    in_channels: int,
    winograd: int,
) -> list[Tensor]:
    if y.numel() == 0:
        return [image(y, in_channels), *(torch.zeros_like(p) for p in params)]
    block = _Block(y, in_channels, params, running, frozen, eps, seed, drop_rate, winograd, stats)
    dx, *gradients = block.backward(grad_y, y, z)
    return [dx, *(_as(gradient, p) for gradient, p in zip(gradients, params, strict=True))]


def inference(x: Tensor, params: list[Tensor], running: list[Tensor], eps: list[float], winograd: int) -> Tensor:
    block = _Block(x, x.shape[1], params, running, None, eps, None, 0.0, winograd)
    y = image(x, block.total)
    if x.numel() > 0:
        block.forward(x, y, [])
    return y
