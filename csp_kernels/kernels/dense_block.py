"""torch.ops.csp_kernels.dense_block* in Triton: the order of work of csrc/cpu/dense_block.cpp, a kernel a step.

P = N * H * W pixels, K = c0 + l * g channels enter layer l, b bottleneck and g growth channels, C = c0 + L * g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csp_kernels.kernels import conv3x3, cuda, mix, statistics
from csp_kernels.kernels.launch import (
    Correction,
    Geometry,
    Norm,
    check,
    check_count,
    check_norms,
    check_params,
    laid_as,
    pixels_of,
    precision_of,
)
from csp_kernels.kernels.norm import BatchNorm, due, pay
from csp_kernels.ops._node import fake_image as image
from csp_kernels.ops._node import padded
from csp_kernels.ops.dense_block import LAYER


class _Layer(NamedTuple):
    entering: int  # K
    norm1: BatchNorm
    conv1: Tensor  # [b, K]
    norm2: BatchNorm
    conv2: Tensor  # [g, b, 3, 3]
    dropout: conv3x3.Dropout | None
    statistics1: Tensor  # [2, g] float64 view, of the slice that the layer adds
    statistics2: Tensor  # [2, b] float64 view


def columns(in_channels: int, params: Sequence[Tensor]) -> int:
    """Of the statistics: C, then b of each layer."""
    return in_channels + len(params) // 6 * (params[2].shape[0] + params[5].shape[0])


def _check_params(like: Tensor, in_channels: int, params: Sequence[Tensor]) -> None:
    if not params or len(params) % len(LAYER.names):
        raise ValueError(f"params: got {len(params)} items, expected {len(LAYER.names)} a layer")
    check_params(like, params, LAYER.shapes(params, in_channels))


class Block:
    """The arguments of an operator, by layer. stats: [2, at least columns]."""

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
        collects: bool = False,
    ) -> None:
        """collects: whether something else needs the features' statistics."""
        n, _, h, w = like.shape
        _check_params(like, in_channels, params)
        layers, self.width, self.growth = len(params) // 6, params[2].shape[0], params[5].shape[0]
        channels = [len(p) for i, p in enumerate(params) if i % 3 == 0]
        check_norms(like, channels, [1] * len(channels) if frozen is None else frozen, eps, running)
        if stats is not None:
            check(like, [("stats", stats, (2, *stats.shape[1:]), torch.float64)])
        if seed is not None:
            check(like, [("seed", seed, (1,), torch.int64)])
        self.geometry, self.pixels = Geometry(n, h, w), n * h * w
        self.channels, self.total = in_channels, in_channels + layers * self.growth
        size = 2, columns(in_channels, params)
        self.stats = like.new_zeros(size, dtype=torch.float64) if stats is None else stats
        self.precision = precision_of(like, winograd)
        self.layers = list(self._layers(params, iter(running), frozen, eps, seed, drop_rate))
        self.collects = collects or not all(layer.norm1.frozen for layer in self.layers)

    def _layers(
        self,
        params: Sequence[Tensor],
        running: Iterator[Tensor],
        frozen: Sequence[int] | None,
        eps: Sequence[float],
        seed: Tensor | None,
        drop_rate: float,
    ) -> Iterator[_Layer]:
        def norm(index: int, columns: Tensor, gamma: Tensor, beta: Tensor) -> BatchNorm:
            fixed = frozen is None or bool(frozen[index])
            mean, var = (next(running), next(running)) if fixed else columns.unbind()
            return BatchNorm(mean, var, gamma, beta, eps[index], fixed)

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

    @property
    def fixed(self) -> bool:
        """Whether `inference` does: no norm takes statistics, no other reader wants them, nothing is dropped."""
        norms = all(layer.norm1.frozen and layer.norm2.frozen for layer in self.layers)
        return norms and not self.collects and self.layers[0].dropout is None

    def scratch(self, like: Tensor) -> Tensor:
        """[P, padded(b)], as what is kept of a layer."""
        return like.new_empty((self.pixels, padded(self.width)))

    def check_kept(self, like: Tensor, z: Sequence[Tensor]) -> None:
        """What a backward pass was given."""
        check_count("z", z, len(self.layers) if z else 0)
        shape = self.pixels, padded(self.width)
        check(like, [(f"z[{i}]", t, shape, like.dtype) for i, t in enumerate(z)])

    def bottleneck(self, layer: _Layer, norm: Norm, features: Tensor, out: Tensor, collect: bool) -> Tensor:
        z = out[:, : self.width]
        segments = [mix.Segment(features[:, : layer.entering], norm, None, False)]
        columns = layer.statistics2 if collect else None
        mix.forward(segments, layer.conv1, z, self.geometry, self.precision, columns)
        return z

    def forward(self, x: Tensor, features: Tensor, kept: Sequence[Tensor]) -> None:
        """x [P, c0] view, features [P, C]; kept: z of each layer to fill, or none."""
        columns = self.stats[:, : self.channels] if self.collects else None
        statistics.copy_split(x, features[:, : self.channels], columns)
        scratch = None if kept else self.scratch(x)
        for i, layer in enumerate(self.layers):
            self.grow(layer, features, kept[i] if scratch is None else scratch)

    def grow(self, layer: _Layer, features: Tensor, z: Tensor) -> None:
        """features: takes the layer's slice; z [P, padded(b)]: its bottleneck."""
        z = self.bottleneck(layer, layer.norm1.load(), features, z, not layer.norm2.frozen)
        columns, norm = layer.statistics1 if self.collects else None, layer.norm2.load()
        out = features[:, self.grown(layer)]
        conv3x3.forward(z, norm, layer.conv2, out, self.geometry, self.precision, columns, layer.dropout)

    def grown(self, layer: _Layer) -> slice:
        return slice(layer.entering, layer.entering + self.growth)

    def inference(self, x: Tensor, features: Tensor) -> None:
        """`forward` where nothing is kept and no statistics are wanted: z may stay on chip."""
        statistics.copy_split(x, features[:, : self.channels], None)
        scratch = self.scratch(x)
        for layer in self.layers:
            entering, out = features[:, : layer.entering], features[:, self.grown(layer)]
            if cuda.takes_layer(entering, layer.conv2, out, self.geometry):
                norms = layer.norm1.load(), layer.norm2.load()
                cuda.layer(entering, norms[0], layer.conv1, norms[1], layer.conv2, out, self.geometry)
            else:
                self.grow(layer, features, scratch)

    def due(self, owed: Tensor, channels: slice) -> Correction:
        """gradient of these channels = G - ((F - mean) * slope + offset)."""
        return due(owed[:, channels], self.stats[0, channels], self.layers[0].norm1.gamma)

    def backward(
        self, features: Tensor, kept: Sequence[Tensor], source: Tensor, grad: Tensor, owed: Tensor, dx: Tensor
    ) -> list[Tensor]:
        """source [P, C] view: gradient of the features, without what norms still owe, owed [2, C] float64: mean and
        slope. grad [P, at least what enters the last layer]: the same values, or source itself; added to, as is owed.
        dx [P, c0] view: takes the gradient of x. Gradients of params, in order."""
        dn = self.scratch(features)[:, : self.width]
        scratch = None if kept else self.scratch(features)
        gradients: list[list[Tensor]] = []
        for i in reversed(range(len(self.layers))):
            layer, norm1, norm2 = self.layers[i], self.layers[i].norm1.load(), self.layers[i].norm2.load()
            z = kept[i][:, : self.width] if scratch is None else self.bottleneck(layer, norm1, features, scratch, False)
            old, new = slice(layer.entering), self.grown(layer)
            slices = features[:, new], source[:, new], self.due(owed, new), layer.conv2, z, norm2
            sums = conv3x3.dgrad(*slices, dn, self.geometry, self.precision, layer.dropout)
            dconv2 = conv3x3.wgrad(*slices, self.geometry, self.precision, layer.dropout)
            dgamma2, dbeta2, correction = layer.norm2.settle(sums, self.pixels)
            segments = [mix.Segment(features[:, old], norm1, grad[:, old], True, source[:, old])]
            raw = None if correction is None else z
            dconv1, sums = mix.backward(segments, dn, raw, correction, layer.conv1, self.geometry, self.precision)
            dgamma1, dbeta1, _ = layer.norm1.settle(sums, self.pixels, owed[:, old])
            gradients.append([dgamma1, dbeta1, dconv1, dgamma2, dbeta2, dconv2])
            source = grad
        old = slice(self.channels)
        pay(grad[:, old], features[:, old], self.due(owed, old), dx)
        return [gradient for layer in reversed(gradients) for gradient in layer]


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
    block = Block(x, x.shape[1], params, running, frozen, eps, seed, drop_rate, winograd)
    y = image(x, block.total)
    kept = [block.scratch(x) for _ in block.layers] if keep_bottleneck else []
    if x.numel() > 0:
        block.forward(pixels_of(x), pixels_of(y), kept)
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
    dx = image(y, in_channels)
    if y.numel() == 0:
        return [dx, *(torch.zeros_like(p) for p in params)]
    block = Block(y, in_channels, params, running, frozen, eps, seed, drop_rate, winograd, stats)
    shape = (y.shape[0], block.total, *y.shape[2:])
    check(y, [("y", y, shape, y.dtype), ("grad_y", grad_y, shape, y.dtype)])
    check(y, [("stats", stats, (2, columns(in_channels, params)), torch.float64)])
    block.check_kept(y, z)
    grad, owed = y.new_empty((block.pixels, block.layers[-1].entering)), stats.new_zeros((2, block.total))
    gradients = block.backward(pixels_of(y), z, pixels_of(grad_y), grad, owed, pixels_of(dx))
    return [dx, *(laid_as(gradient, p) for gradient, p in zip(gradients, params, strict=True))]


def inference(x: Tensor, params: list[Tensor], running: list[Tensor], eps: list[float], winograd: int) -> Tensor:
    block = Block(x, x.shape[1], params, running, None, eps, None, 0.0, winograd)
    y = image(x, block.total)
    if x.numel() > 0:
        block.inference(pixels_of(x), pixels_of(y))
    return y
