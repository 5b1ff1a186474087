"""torch.ops.csp_kernels.post_dense_block* in Triton: the order of work of csrc/cpu/post_dense_block.cpp. What is kept
are raw outputs of convolutions: every reader applies norm and ReLU on load.

P = N * H * W pixels, c0 channels of x, b bottleneck and g growth channels. A layer is 1x1 -> 3x3 in each of 1 or 2
branches, -> 3x3 in the second; the 1x1 of all branches are one product, z [P, branches * b] is what they give. features
[P, L * branches * g]: a slice for each layer and branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csp_kernels.kernels import activate, conv3x3, mix, statistics
from csp_kernels.kernels.launch import (
    Argument,
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
from csp_kernels.kernels.norm import BatchNorm, due
from csp_kernels.ops._node import fake_image as image
from csp_kernels.ops._node import padded


class _Conv(NamedTuple):
    """A convolution and the norm that follows it."""

    weight: Tensor  # [out, K] or [out, in, 3, 3]
    norm: BatchNorm
    statistics: Tensor | None  # [2, out] float64 view to fill; None: the norm has fixed ones


class _Layer(NamedTuple):
    reduce: list[_Conv]  # of each branch
    first: list[_Conv]
    second: _Conv | None  # of the second branch
    columns: list[slice]  # of the features that each branch gives

    @property
    def width(self) -> int:  # b
        return self.reduce[0].weight.shape[0]

    @property
    def stacked(self) -> Tensor:
        """[branches * b, K]: the 1x1 weights."""
        return torch.cat([conv.weight for conv in self.reduce]) if len(self.reduce) > 1 else self.reduce[0].weight

    @property
    def slices(self) -> list[_Conv]:
        """What gives each branch's features."""
        return [self.first[0], *([self.second] if self.second else [])]


class Kept(NamedTuple):
    """Raw outputs: features, and of each layer, or none, z [P, padded] and with two branches middle [P, padded], which
    is between the 3x3 of the second."""

    features: Tensor
    z: list[Tensor]
    middle: list[Tensor]


def columns(params: Sequence[Tensor]) -> int:
    """Of the statistics."""
    return sum(gamma.shape[0] for gamma in params[1::3])


def _check_params(like: Tensor, in_channels: int, params: Sequence[Tensor], two_way: bool) -> None:
    each = 15 if two_way else 6
    if not params or len(params) % each:
        raise ValueError(f"params: got {len(params)} items, expected {each} a layer")
    g, k = params[3].shape[0], in_channels
    shapes: list[tuple[int, ...]] = []
    for first in range(0, len(params), each):
        b = params[first].shape[0]  # a width of its own for each layer
        convs = [(b, k, 1, 1), (g, b, 3, 3)] * (2 if two_way else 1) + [(g, g, 3, 3)] * two_way
        shapes += [shape for conv in convs for shape in (conv, conv[:1], conv[:1])]
        k += g * (2 if two_way else 1)
    check_params(like, params, shapes)


class Block:
    """The arguments of an operator, by layer. stats: [2, at least columns]."""

    def __init__(
        self,
        like: Tensor,
        in_channels: int,
        params: Sequence[Tensor],
        running: Sequence[Tensor],
        frozen: Sequence[int],
        eps: Sequence[float],
        two_way: bool,
        winograd: int,
        stats: Tensor | None = None,
    ) -> None:
        n, _, h, w = like.shape
        _check_params(like, in_channels, params, two_way)
        check_norms(like, [len(gamma) for gamma in params[1::3]], frozen, eps, running)
        if stats is not None:
            check(like, [("stats", stats, (2, *stats.shape[1:]), torch.float64)])
        self.branches, self.growth = 2 if two_way else 1, params[3].shape[0]
        self.geometry, self.pixels = Geometry(n, h, w), n * h * w
        self.channels, self.precision = in_channels, precision_of(like, winograd)
        self.stats = like.new_zeros((2, columns(params)), dtype=torch.float64) if stats is None else stats
        self.layers = list(self._layers(list(self._convs(params, iter(running), frozen, eps))))
        self.grown = len(self.layers) * self.branches * self.growth
        self.total, self.width = in_channels + self.grown, max(layer.width for layer in self.layers)
        self.affine = params[1].new_empty((3, self.grown))  # of the features' norms

    def _convs(
        self, params: Sequence[Tensor], running: Iterator[Tensor], frozen: Sequence[int], eps: Sequence[float]
    ) -> Iterator[_Conv]:
        at = 0
        for i, fixed in enumerate(frozen):
            weight, gamma, beta = params[3 * i : 3 * i + 3]
            columns = self.stats[:, at : at + len(gamma)]
            at += len(gamma)
            mean, var = (next(running), next(running)) if fixed else columns.unbind()
            norm = BatchNorm(mean, var, gamma, beta, eps[i], bool(fixed))
            yield _Conv(weight if weight.shape[2] > 1 else weight.flatten(1), norm, None if fixed else columns)

    def _layers(self, convs: list[_Conv]) -> Iterator[_Layer]:
        g, each = self.growth, 5 if self.branches > 1 else 2
        for i in range(0, len(convs), each):
            at, layer = i // each * self.branches * g, convs[i : i + each]
            columns = [slice(at + j * g, at + (j + 1) * g) for j in range(self.branches)]
            yield _Layer(layer[:4:2], layer[1:4:2], layer[4] if self.branches > 1 else None, columns)

    def load(self) -> None:
        """The norms of the features, whose statistics are known."""
        for layer in self.layers:
            self._load(layer)

    def _load(self, layer: _Layer) -> None:
        for conv, columns in zip(layer.slices, layer.columns, strict=True):
            conv.norm.load(self.affine[:, columns])

    def loaded(self, count: int) -> Norm:
        """Of the first `count` features."""
        return Norm(*self.affine[:, :count].unbind())

    def keep(self, like: Tensor, layers: int) -> Kept:
        """Uninitialised; layers: how many of them keep z and middle."""
        return Kept(like.new_empty((self.pixels, self.grown)), *self._raw(like, layers))

    def check_kept(self, x: Tensor, kept: Kept) -> None:
        """What a backward pass of x was given."""
        sizes = {"z": self.branches * padded(self.width), "middle": padded(self.growth)}
        layers = len(self.layers) if kept.z else 0
        arguments: list[Argument] = [("features", kept.features, (self.pixels, self.grown), x.dtype)]
        for (name, size), given in zip(sizes.items(), kept[1:], strict=True):
            check_count(name, given, layers if name == "z" or self.branches > 1 else 0)
            arguments += [(f"{name}[{i}]", t, (self.pixels, size), x.dtype) for i, t in enumerate(given)]
        check(x, arguments)

    def _raw(self, like: Tensor, layers: int) -> tuple[list[Tensor], list[Tensor]]:
        z, middle = self.branches * padded(self.width), padded(self.growth)
        return (
            [like.new_empty((self.pixels, z)) for _ in range(layers)],
            [like.new_empty((self.pixels, middle)) for _ in range(layers if self.branches > 1 else 0)],
        )

    def _shared(self, kept: Kept) -> Kept:
        """What is not kept: in memory that all layers share."""
        if kept.z:
            return kept
        z, middle = self._raw(kept.features, 1)
        return Kept(kept.features, z * len(self.layers), middle * len(self.layers))

    def _inputs(self, i: int, x: Tensor, features: Tensor, dx: Tensor | None, grad: Tensor | None) -> list[mix.Segment]:
        """What layer i reads, and where its gradients are added."""
        k = i * self.branches * self.growth
        grown = mix.Segment(features[:, :k], self.loaded(k), None if grad is None else grad[:, :k], True)
        return [mix.Segment(x, None, dx, True), *([grown] if k else [])]

    def _reduce(self, i: int, x: Tensor, kept: Kept, collect: bool) -> Tensor:
        """z [P, branches * b]."""
        layer = self.layers[i]
        z = kept.z[i][:, : self.branches * layer.width]
        columns = [conv.statistics if collect else None for conv in layer.reduce]
        into = columns[0]
        if self.branches > 1 and any(c is not None for c in columns):
            into = self.stats.new_empty((2, z.shape[1]))
        segments = self._inputs(i, x, kept.features, None, None)
        mix.forward(segments, layer.stacked, z, self.geometry, self.precision, into)
        if self.branches > 1 and into is not None:
            for to, values in zip(columns, into.chunk(2, 1), strict=True):
                if to is not None:
                    to.copy_(values)
        return z

    def _conv(self, conv: _Conv, z: Tensor, before: BatchNorm, out: Tensor, collect: bool = True) -> None:
        """out [P, g] view = 3x3 of relu(before(z))."""
        columns = conv.statistics if collect else None
        conv3x3.forward(z, before.load(), conv.weight, out, self.geometry, self.precision, columns)

    def _middle(self, layer: _Layer, z: Tensor, out: Tensor, collect: bool) -> Tensor:
        """The second branch between its 3x3, [P, g]; z [P, 2 * b]."""
        middle = out[:, : self.growth]
        self._conv(layer.first[1], z[:, layer.width :], layer.reduce[1].norm, middle, collect)
        return middle

    def forward(self, x: Tensor, kept: Kept) -> None:
        """x [P, c0] view. Fills kept, statistics, and the norms of the features."""
        kept = self._shared(kept)
        for i, layer in enumerate(self.layers):
            slices = [kept.features[:, columns] for columns in layer.columns]
            z = self._reduce(i, x, kept, True)
            self._conv(layer.first[0], z[:, : layer.width], layer.reduce[0].norm, slices[0])
            if layer.second:
                middle = self._middle(layer, z, kept.middle[i], True)
                self._conv(layer.second, middle, layer.first[1].norm, slices[1])
            self._load(layer)

    def _unconv(
        self, conv: _Conv, sums: Tensor, out: Tensor, d: Tensor, z: Tensor, before: BatchNorm, dz: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Back through a 3x3 and the norm after it. out [P, g] view: what it gave; d: scale * dn of that norm, sums
        [2, g] of dn and dn * (out - mean). dz [P, in] view takes scale * dn of the norm before it. Gradients of weight
        and norm, and the sums of the norm before."""
        owed = sums.new_zeros(sums.shape, dtype=torch.float64)
        dgamma, dbeta, _ = conv.norm.settle(sums, self.pixels, owed)
        slices = out, d, due(owed, conv.norm.mean, dgamma), conv.weight, z, before.load()
        below = conv3x3.dgrad(*slices, dz, self.geometry, self.precision)
        return [conv3x3.wgrad(*slices, self.geometry, self.precision), dgamma, dbeta], below

    def _unreduce(
        self, layer: _Layer, segments: list[mix.Segment], z: Tensor, dz: Tensor, sums: list[Tensor]
    ) -> tuple[list[list[Tensor]], Tensor]:
        """Back through the 1x1 of all branches; sums of the norm after each. Gradients of weight and norm of each, and
        the sums of what the product read."""
        settled = [conv.norm.settle(s, self.pixels) for conv, s in zip(layer.reduce, sums, strict=True)]
        correction = _beside([c for *_, c in settled])
        raw = None if correction is None else z
        dweight, below = mix.backward(segments, dz, raw, correction, layer.stacked, self.geometry, self.precision)
        parts = [part.clone() for part in dweight.chunk(2)] if self.branches > 1 else [dweight]
        return [[part, dgamma, dbeta] for part, (dgamma, dbeta, _) in zip(parts, settled, strict=True)], below

    def backward(self, x: Tensor, dx: Tensor, kept: Kept, grad: Tensor, sums: Tensor) -> list[Tensor]:
        """dx [P, c0] view: gradient of other readers of x, added to. grad [P, L * branches * g]: scale * dn of the
        features' norms by other readers, sums [2, L * branches * g] float64 of dn and dn * (features - mean), both
        added to. After `load`. Gradients of params, in order."""
        recompute, kept = not kept.z, self._shared(kept)
        sizes = self.branches * padded(self.width), self.growth
        wide, dmiddle = (x.new_empty((self.pixels, n)) for n in sizes)
        gradients: list[Tensor] = []
        for i, layer in reversed(list(enumerate(self.layers))):
            b, dz = layer.width, wide[:, : self.branches * layer.width]
            z = self._reduce(i, x, kept, False) if recompute else kept.z[i][:, : dz.shape[1]]
            slices = [(sums[:, c], kept.features[:, c], grad[:, c]) for c in layer.columns]
            first, below = self._unconv(layer.first[0], *slices[0], z[:, :b], layer.reduce[0].norm, dz[:, :b])
            convs, all_below = [first], [below]
            last: list[Tensor] = []
            if layer.second:
                middle = (
                    self._middle(layer, z, kept.middle[i], False) if recompute else kept.middle[i][:, : self.growth]
                )
                last, below = self._unconv(layer.second, *slices[1], middle, layer.first[1].norm, dmiddle)
                second = below, middle, dmiddle, z[:, b:], layer.reduce[1].norm, dz[:, b:]
                first, below = self._unconv(layer.first[1], *second)
                convs, all_below = [*convs, first], [*all_below, below]
            segments = self._inputs(i, x, kept.features, dx, grad)
            reduces, below = self._unreduce(layer, segments, z, dz, all_below)
            sums[:, : layer.columns[0].start] += below[:, self.channels :]
            pairs = [t for pair in zip(reduces, convs, strict=True) for triple in pair for t in triple]
            gradients = [*pairs, *last, *gradients]
        return gradients


def _beside(corrections: list[Correction | None]) -> Correction | None:
    """Of columns side by side, as many of each; None: nothing to correct."""
    given = next((c for c in corrections if c is not None), None)
    if given is None or len(corrections) == 1:
        return given
    nothing = Correction(*[torch.zeros_like(given.mean)] * 3)
    each = [c or nothing for c in corrections]
    return Correction(*(torch.cat([getattr(c, name) for c in each]) for name in ("mean", "slope", "offset")))


# --- the operators, with the schemas of csrc/post_dense_block.cpp ---


def forward(
    x: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    two_way: bool,
    winograd: int,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    block = Block(x, x.shape[1], params, running, frozen, eps, two_way, winograd)
    y, kept = image(x, block.total), block.keep(x, len(block.layers) if keep else 0)
    if x.numel() > 0:
        source, out = pixels_of(x), pixels_of(y)
        block.forward(source, kept)
        statistics.copy_split(source, out[:, : block.channels], None)
        norm = block.loaded(block.grown)
        activate.forward(kept.features, norm, out[:, block.channels :], block.geometry, activate.RELU)
    return y, *kept, block.stats


def backward(
    grad_y: Tensor,
    x: Tensor,
    features: Tensor,
    z: list[Tensor],
    middle: list[Tensor],
    stats: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    two_way: bool,
    winograd: int,
) -> list[Tensor]:
    dx = image(x, x.shape[1])
    if x.numel() == 0:
        return [dx, *(torch.zeros_like(p) for p in params)]
    block = Block(x, x.shape[1], params, running, frozen, eps, two_way, winograd, stats)
    check(x, [("grad_y", grad_y, (x.shape[0], block.total, *x.shape[2:]), x.dtype)])
    check(x, [("stats", stats, (2, columns(params)), torch.float64)])
    block.check_kept(x, Kept(features, z, middle))
    d, into, grad = pixels_of(grad_y), pixels_of(dx), torch.empty_like(features)
    block.load()
    statistics.copy_split(d[:, : block.channels], into, None)
    d, norm = d[:, block.channels :], block.loaded(block.grown)
    sums = activate.backward(d, features, norm, grad, block.geometry, activate.RELU)
    assert sums is not None
    gradients = block.backward(pixels_of(x), into, Kept(features, z, middle), grad, sums.double())
    return [dx, *(laid_as(gradient, p) for gradient, p in zip(gradients, params, strict=True))]
