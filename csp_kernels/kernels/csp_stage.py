"""torch.ops.csp_kernels.csp_stage* in Triton, as csrc/csp_stage.cpp: the bypass is read where it lies in x.
Pre-activation layers copy the rest once, into the features that they extend and the transition reads; post-activation
layers read it in place, and the transition reads their raw features beside it.

P = N * H * W pixels, c0 channels of x, p of them bypass the dense layers, which enter with c0 - p and give d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from csp_kernels.kernels import dense_block, partial_transition, post_dense_block
from csp_kernels.kernels.launch import Geometry, check, check_count, laid_as, pixels_of, precision_of
from csp_kernels.kernels.partial_transition import Grown, PartialTransition
from csp_kernels.kernels.post_dense_block import Kept
from csp_kernels.ops._node import fake_image as image
from csp_kernels.ops.partial_transition import FUSIONS, output_size, raw_sizes
from csp_kernels.ops.partial_transition import count as transition_count


class _Norms(NamedTuple):
    """Convolutions, and norms before or after them."""

    params: list[Tensor]
    running: list[Tensor]
    frozen: list[int]
    eps: list[float]


class _Options(NamedTuple):
    part_channels: int
    layer: int
    fusion: int
    pool: bool
    winograd: int


class _Stage(ABC):
    """The arguments of an operator: of the dense layers, and of the transition."""

    post: bool

    def __init__(self, x: Tensor, layers: _Norms, last: _Norms, options: _Options, stats: Tensor | None) -> None:
        n, _, h, w = x.shape
        self.x, self.layers, self.last, self.options = x, layers, last, options
        self.geometry, self.pixels = Geometry(n, h, w), n * h * w
        self.part, self.dense = self.split(pixels_of(x))
        self.columns = self.dense_columns()
        total = self.columns + partial_transition.columns(last.params)
        self.stats = x.new_zeros((2, total), dtype=torch.float64) if stats is None else stats

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """[P, c0] view -> [P, p] and [P, c0 - p]."""
        part = self.options.part_channels
        return x[:, :part] if part else None, x[:, part:]

    def transition(self, dense: Tensor, grown: Grown | None, dense_stats: Tensor | None) -> PartialTransition:
        stats, precision = self.stats[:, self.columns :], precision_of(self.x, self.options.winograd)
        what = self.options.fusion, self.post, self.options.pool, self.geometry
        return PartialTransition(self.part, dense, grown, *self.last, *what, stats, precision, dense_stats)

    @property
    @abstractmethod
    def block(self) -> dense_block.Block | post_dense_block.Block:
        """The dense layers."""

    @abstractmethod
    def dense_columns(self) -> int:
        """Of the statistics."""

    @abstractmethod
    def check_kept(self, kept: Kept) -> None:
        """What a backward pass was given."""

    @abstractmethod
    def keep(self, bottlenecks: bool) -> Kept:
        """Uninitialised."""

    @abstractmethod
    def forward(self, y: Tensor, kept: Kept, raw_t: Tensor, raw_u: Tensor, last: bool) -> None:
        """y [P', o] view; last: no backward pass follows."""

    @abstractmethod
    def backward(self, dy: Tensor, kept: Kept, raw_t: Tensor, raw_u: Tensor, dx: Tensor) -> list[Tensor]:
        """dy [P', o] view; dx [P, c0] view takes the gradient of x. Gradients of params, in order."""


class _Pre(_Stage):
    post = False

    def dense_columns(self) -> int:
        return dense_block.columns(self.dense.shape[1], self.layers.params)

    @cached_property
    def block(self) -> dense_block.Block:
        collects = not self.last.frozen[0]  # the norm that reads the features
        return dense_block.Block(
            self.x, self.dense.shape[1], *self.layers, None, 0.0, self.options.winograd, self.stats, collects
        )

    def check_kept(self, kept: Kept) -> None:
        check(self.x, [("features", kept.features, (self.pixels, self.block.total), self.x.dtype)])
        check_count("middle", kept.middle, 0)
        self.block.check_kept(self.x, kept.z)

    def keep(self, bottlenecks: bool) -> Kept:
        z = [self.block.scratch(self.x) for _ in self.block.layers] if bottlenecks else []
        return Kept(self.x.new_empty((self.pixels, self.block.total)), z, [])

    def reading(self, features: Tensor) -> PartialTransition:
        known = self.stats[:, : self.block.total] if self.block.collects else None
        return self.transition(features, None, known)

    def forward(self, y: Tensor, kept: Kept, raw_t: Tensor, raw_u: Tensor, last: bool) -> None:
        if last and self.block.fixed:
            self.block.inference(self.dense, kept.features)
        else:
            self.block.forward(self.dense, kept.features, kept.z)
        self.reading(kept.features).forward(y, raw_t, raw_u)

    def backward(self, dy: Tensor, kept: Kept, raw_t: Tensor, raw_u: Tensor, dx: Tensor) -> list[Tensor]:
        (dpart, ddense), grad = self.split(dx), torch.empty_like(kept.features)
        owed = self.stats.new_zeros((2, self.block.total))
        gradients, _ = self.reading(kept.features).backward(dy, raw_t, raw_u, dpart, grad, None, owed)
        return [*self.block.backward(kept.features, kept.z, grad, grad, owed, ddense), *gradients]


class _Post(_Stage):
    post = True

    def dense_columns(self) -> int:
        return post_dense_block.columns(self.layers.params)

    @cached_property
    def block(self) -> post_dense_block.Block:
        options = self.options.layer == 2, self.options.winograd, self.stats
        return post_dense_block.Block(self.x, self.dense.shape[1], *self.layers, *options)

    def check_kept(self, kept: Kept) -> None:
        self.block.check_kept(self.x, kept)

    def keep(self, bottlenecks: bool) -> Kept:
        return self.block.keep(self.x, len(self.block.layers) if bottlenecks else 0)

    def reading(self, features: Tensor) -> PartialTransition:
        return self.transition(self.dense, Grown(features, self.block.loaded(self.block.grown)), None)

    def forward(self, y: Tensor, kept: Kept, raw_t: Tensor, raw_u: Tensor, last: bool) -> None:
        self.block.forward(self.dense, kept)
        self.reading(kept.features).forward(y, raw_t, raw_u)

    def backward(self, dy: Tensor, kept: Kept, raw_t: Tensor, raw_u: Tensor, dx: Tensor) -> list[Tensor]:
        (dpart, ddense), grad = self.split(dx), torch.empty_like(kept.features)
        self.block.load()
        gradients, sums = self.reading(kept.features).backward(dy, raw_t, raw_u, dpart, ddense, grad)
        assert sums is not None
        return [*self.block.backward(self.dense, ddense, kept, grad, sums.double()), *gradients]


def _stage(x: Tensor, norms: _Norms, options: _Options, stats: Tensor | None = None) -> _Stage:
    params, running, frozen, eps = norms
    check_count("params", params, 3 * len(frozen))
    check(x, [("x", x, tuple(x.shape), x.dtype)])
    last = transition_count(FUSIONS[options.fusion])  # of the parameters
    n = len(frozen) - last // 3
    fixed = 2 * sum(1 for f in frozen[:n] if f)
    layers = _Norms(params[:-last], running[:fixed], frozen[:n], eps[:n])
    transition = _Norms(params[-last:], running[fixed:], frozen[n:], eps[n:])
    stage = (_Post if options.layer else _Pre)(x, layers, transition, options, stats)
    part, dense, fusion = options.part_channels, stage.block.total, options.fusion
    partial_transition.check_arguments(x, part, dense, *transition, fusion, stage.post)
    return stage


# --- the operators, with the schemas of csrc/csp_stage.cpp ---


def forward(
    x: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    part_channels: int,
    layer: int,
    fusion: int,
    pool: bool,
    winograd: int,
    keep: bool,
    keep_bottleneck: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    options = _Options(part_channels, layer, fusion, pool, winograd)
    stage = _stage(x, _Norms(params, running, frozen, eps), options)
    params, (h, w) = stage.last.params, x.shape[2:]
    sizes = raw_sizes(x, params, fusion, stage.post, pool) if keep else (0, 0)
    raw_t, raw_u = (x.new_empty((n,)) for n in sizes)
    kept = stage.keep(keep_bottleneck)
    y = image(x, output_size(fusion, part_channels, params), *((h // 2, w // 2) if pool else (h, w)))
    if y.numel() > 0:
        stage.forward(pixels_of(y), kept, raw_t, raw_u, last=not keep)
    return y, *kept, raw_t, raw_u, stage.stats


def backward(
    grad_y: Tensor,
    x: Tensor,
    features: Tensor,
    z: list[Tensor],
    middle: list[Tensor],
    raw_t: Tensor,
    raw_u: Tensor,
    stats: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    part_channels: int,
    layer: int,
    fusion: int,
    pool: bool,
    winograd: int,
) -> list[Tensor]:
    dx = image(x, x.shape[1])
    if grad_y.numel() == 0:
        return [dx, *(torch.zeros_like(p) for p in params)]
    options = _Options(part_channels, layer, fusion, pool, winograd)
    stage = _stage(x, _Norms(params, running, frozen, eps), options, stats)
    kept, last = Kept(features, z, middle), stage.last.params
    partial_transition.check_gradient(grad_y, x, output_size(fusion, part_channels, last), pool)
    partial_transition.check_raw(x, raw_t, raw_u, raw_sizes(x, last, fusion, stage.post, pool))
    check(x, [("stats", stats, (2, stage.columns + partial_transition.columns(last)), torch.float64)])
    stage.check_kept(kept)
    gradients = stage.backward(pixels_of(grad_y), kept, raw_t, raw_u, pixels_of(dx))
    return [dx, *(laid_as(gradient, p) for gradient, p in zip(gradients, params, strict=True))]
