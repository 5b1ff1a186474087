"""torch.ops.csp_kernels.partial_transition* in Triton: the order of work of csrc/cpu/partial_transition.cpp. T over the
dense part, U over the bypass and T's output, nothing concatenated, averages taken in front of the last product.

P = N * H * W pixels, P' those of the output. Post-activation: conv-BN-ReLU, pre-activation: BN-ReLU-conv.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels.kernels import activate, mix, statistics
from csp_kernels.kernels.activate import IDENTITY, RELU
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
from csp_kernels.ops._node import padded, winograd
from csp_kernels.ops.partial_transition import FUSIONS, count, expected_shapes, output_size, raw_sizes


class Grown(NamedTuple):
    """More of the dense part: raw slices of post-activation layers, read through their norms."""

    x: Tensor  # [P, n] view
    affine: Norm  # [n], of all slices


class _Conv(NamedTuple):
    """A transition: its product and the norm before it (pre-activation) or after it."""

    weight: Tensor  # [out, K]
    norm: BatchNorm
    statistics: Tensor | None  # [2, channels of the norm] float64 view to fill; None: the norm has fixed ones

    @property
    def out(self) -> int:
        return self.weight.shape[0]


class PartialTransition:
    """One call, in the role of csrc/cpu/partial_transition.h."""

    def __init__(
        self,
        part: Tensor | None,
        dense: Tensor,
        grown: Grown | None,
        params: Sequence[Tensor],
        running: Sequence[Tensor],
        frozen: Sequence[int],
        eps: Sequence[float],
        fusion: int,
        post: bool,
        pool: bool,
        geometry: Geometry,
        stats: Tensor,
        precision: str,
        dense_stats: Tensor | None = None,
    ) -> None:
        """part [P, p] view; dense [P, d] view; grown: only with post. params: norm weight, norm bias, conv weight of T
        (unless fusion first), then of U (unless last); running: mean and variance of each frozen norm. geometry: of
        the inputs (its pool is not read). stats [2, n] float64 view, n = columns(params): filled by forward, read by
        backward. dense_stats [2, d] float64 view: batch statistics of dense, where known."""
        kind = FUSIONS[fusion]
        check(dense, [("stats", stats, (2, columns(params)), torch.float64)])
        self.part, self.dense, self.grown, self.dense_stats = part, dense, grown, dense_stats
        self.post, self.precision = post, precision
        self.full = replace(geometry, pool=False)
        self.last = replace(geometry, pool=pool)  # of the last product or what follows it: it reads averages
        self.pooled = Geometry(geometry.n, geometry.h // 2, geometry.w // 2) if pool else self.full
        self.bypass = 0 if part is None else part.shape[1]
        convs = list(_convs(params, iter(running), frozen, eps, stats))
        self.t = None if kind == "first" else convs[0]
        self.u = None if kind == "last" else convs[-1]

    def forward(self, y: Tensor, raw_t: Tensor, raw_u: Tensor) -> None:
        """y [P', o] view: takes the output. raw_t, raw_u: memory of ops.partial_transition.raw_sizes elements for what
        backward needs; empty: not kept."""
        if not self.post:
            self._collect()
        z = None if self.t is None else self._forward_t(self.t, y, raw_t)
        if self.u is not None:
            return self._forward_u(self.u, z, y, raw_u)
        if self.t is not None and z is not None:
            activate.forward(z, self.t.norm.load(), y[:, self.bypass :], self.last, RELU)
        if self.part is not None:
            activate.forward(self.part, None, y[:, : self.bypass], self.last, IDENTITY)

    def backward(
        self,
        dy: Tensor,
        raw_t: Tensor,
        raw_u: Tensor,
        dpart: Tensor | None,
        ddense: Tensor,
        dgrown: Tensor | None,
        owed: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """dy [P', o] view; dpart [P, p], ddense [P, d] views: take the gradients; dgrown [P, n] view: takes that of
        the raw slices without what their norms owe, scale * dn. owed [2, d] float64 view: what a pre-activation norm
        owes dense is added to it (mean, slope; ddense - mean - (dense - batch mean) * slope is the gradient); None: it
        is paid. Returns gradients of params in order, [out, K] for weights, and sums [2, n] of dn and dn * (x - mean)
        of grown."""
        into = _Into(dpart, ddense, dgrown, owed)
        if self.t is None:
            return self._backward_first(dy, raw_u, into)
        if self.u is None:
            return self._backward_last(self.t, dy, raw_t, into)
        z = _raw(raw_t, self.full.pixels, self.t.out)
        grad = _scratch(z, *z.shape)
        of_u, rest = self._backward_u(self.u, dy, raw_u, self._inputs(self.u, z, into, grad), into)
        if self.post:
            *of_norm, correction = self.t.norm.settle(rest, self.full.pixels)
        else:
            of_norm, correction = [], _taken(self.u.norm, rest)
        of_t, sums = self._backward_t(self.t, _Product(grad, z, correction, of_norm), self.full, into)
        return of_t + of_u, sums

    # --- forward ---

    def _collect(self) -> None:
        """Statistics of the inputs, for pre-activation norms."""
        if self.u is not None and self.part is not None:
            statistics.copy_split(self.part, None, _columns(self.u.statistics, slice(self.bypass)))
        into = self.t.statistics if self.t is not None else self._of_rest()
        if into is not None and self.dense_stats is not None:
            into.copy_(self.dense_stats)
        else:
            statistics.copy_split(self.dense, None, into)

    def _of_rest(self) -> Tensor | None:
        """Statistics of what U reads beside the bypass."""
        return None if self.u is None else _columns(self.u.statistics, slice(self.bypass, None))

    def _forward_t(self, t: _Conv, y: Tensor, raw: Tensor) -> Tensor | None:
        """What the product gives, [P, m]; None: it is the output."""
        segments = self._dense(None if self.post else t.norm.load(), None)
        if self.u is None and not self.post:
            mix.forward(segments, t.weight, y[:, self.bypass :], self.last, self.precision)
            return None
        z = self._room(raw, self.full.pixels, t.out)
        mix.forward(segments, t.weight, z, self.full, self.precision, t.statistics if self.post else self._of_rest())
        return z

    def _forward_u(self, u: _Conv, z: Tensor | None, y: Tensor, raw: Tensor) -> None:
        """z: what T's product gave."""
        segments = self._inputs(u, z, None, None)
        if not self.post:
            return mix.forward(segments, u.weight, y, self.last, self.precision)
        if u.norm.frozen and raw.numel() == 0:
            after = mix.After(u.norm.load(), RELU)
            return mix.forward(segments, u.weight, y, self.last, self.precision, after=after)
        out = self._room(raw, self.pooled.pixels, u.out)
        mix.forward(segments, u.weight, out, self.last, self.precision, u.statistics)
        activate.forward(out, u.norm.load(), y, self.pooled, RELU)

    def _room(self, raw: Tensor, pixels: int, channels: int) -> Tensor:
        """[P, channels]: what is kept of a product, scratch memory if nothing is."""
        return _raw(raw, pixels, channels) if raw.numel() else _scratch(self.dense, pixels, channels)

    # --- what the products read, and where its gradients go ---

    def _dense(self, norm: Norm | None, into: _Into | None) -> list[mix.Segment]:
        segments = [mix.Segment(self.dense, norm, into.dense if into else None)]
        if self.grown is not None:
            segments.append(mix.Segment(self.grown.x, self.grown.affine, into.grown if into else None))
        return segments

    def _inputs(self, u: _Conv, z: Tensor | None, into: _Into | None, grad: Tensor | None) -> list[mix.Segment]:
        """Of U: the bypass, and T's output z (grad: takes its gradient) or the dense part."""
        before: Norm | None = None
        rest: Norm | None = None
        if not self.post:
            norm = u.norm.load()
            before, rest = (_part(norm, at) for at in (slice(self.bypass), slice(self.bypass, None)))
        elif self.t is not None:
            rest = self.t.norm.load()
        segments = [] if self.part is None else [mix.Segment(self.part, before, into.part if into else None)]
        return segments + (self._dense(rest, into) if z is None else [mix.Segment(z, rest, grad)])

    # --- backward ---

    def _backward_first(self, dy: Tensor, raw: Tensor, into: _Into) -> tuple[list[Tensor], Tensor | None]:
        assert self.u is not None
        of_u, rest = self._backward_u(self.u, dy, raw, self._inputs(self.u, None, into, None), into)
        if self.post:
            return of_u, self._of_grown(rest)
        self._settle_dense(self.u.norm, rest, into)
        return of_u, None

    def _backward_last(self, t: _Conv, dy: Tensor, raw: Tensor, into: _Into) -> tuple[list[Tensor], Tensor | None]:
        d = dy[:, self.bypass :]
        if into.part is not None:
            activate.backward(dy[:, : self.bypass], None, None, into.part, self.last, IDENTITY)
        if not self.post:
            return self._backward_t(t, _Product(d, None, None, []), self.last, into)
        product = _through(t.norm, d, _raw(raw, self.full.pixels, t.out), self.last)
        return self._backward_t(t, product, self.full, into)

    def _backward_u(
        self, u: _Conv, dy: Tensor, raw: Tensor, segments: list[mix.Segment], into: _Into
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of params, and for what U reads beside the bypass: post: sums [2, m] of dn and dn * (x - mean);
        pre: what the norm owes, [2, m] float64."""
        product = _Product(dy, None, None, [])
        if self.post:
            product = _through(u.norm, dy, _raw(raw, self.pooled.pixels, u.out), self.pooled)
        dweight, sums = self._unmix(segments, product, u, self.last)
        if self.post:
            return [*product.of_norm, dweight], sums[:, self.bypass :]
        *of_norm, owed = self._settle(u.norm, sums)
        if self.part is not None and into.part is not None:
            _repay(u.norm, owed[:, : self.bypass], slice(self.bypass), self.part, into.part)
        return [*of_norm, dweight], owed[:, self.bypass :]

    def _backward_t(
        self, t: _Conv, product: _Product, geometry: Geometry, into: _Into
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of params, and sums of grown."""
        segments = self._dense(None if self.post else t.norm.load(), into)
        dweight, sums = self._unmix(segments, product, t, geometry)
        if self.post:
            return [*product.of_norm, dweight], self._of_grown(sums)
        *of_norm, owed = self._settle(t.norm, sums)
        self._settle_dense(t.norm, owed, into)
        return [*of_norm, dweight], None

    def _unmix(
        self, segments: list[mix.Segment], product: _Product, conv: _Conv, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        z = None if product.correction is None else product.z
        return mix.backward(segments, product.d, z, product.correction, conv.weight, geometry, self.precision)

    def _of_grown(self, sums: Tensor) -> Tensor | None:
        """They are read last."""
        return None if self.grown is None else sums[:, -self.grown.x.shape[1] :]

    def _settle(self, norm: BatchNorm, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the norm's weight and bias, and what it owes: [2, n] float64."""
        owed = sums.new_zeros(sums.shape, dtype=torch.float64)
        dgamma, dbeta, _ = norm.settle(sums, self.full.pixels, owed)
        return dgamma, dbeta, owed

    def _settle_dense(self, norm: BatchNorm, owed: Tensor, into: _Into) -> None:
        """owed [2, d]: the norm's last columns."""
        if into.owed is not None:
            into.owed.add_(owed)
        else:
            _repay(norm, owed, slice(-owed.shape[1], None), self.dense, into.dense)


class _Into(NamedTuple):
    """Where gradients go, see PartialTransition.backward."""

    part: Tensor | None
    dense: Tensor
    grown: Tensor | None
    owed: Tensor | None


class _Product(NamedTuple):
    """The gradient of a product, as mix.backward takes it; of_norm: gradients of the norm behind it, if known."""

    d: Tensor
    z: Tensor | None
    correction: Correction | mix.ActivationGradient | None
    of_norm: list[Tensor]


def _through(norm: BatchNorm, d: Tensor, z: Tensor, geometry: Geometry) -> _Product:
    """Through average, ReLU and norm; d [P', o], z [P, o] views. What is spread out by the average is kept."""
    affine, dn = norm.load(), _scratch(z, *z.shape) if geometry.pool else None
    sums = activate.backward(d, z, affine, dn, geometry, RELU)
    assert sums is not None
    *of_norm, correction = norm.settle(sums, geometry.pixels)
    if dn is not None:
        return _Product(dn, z, correction, of_norm)
    slope, offset = (None, None) if correction is None else (correction.slope, correction.offset)
    return _Product(d, z, mix.ActivationGradient(affine, RELU, slope, offset), of_norm)


def _repay(norm: BatchNorm, owed: Tensor, at: slice, x: Tensor, grad: Tensor) -> None:
    """Takes from grad what columns `at` of the norm owe it."""
    if not norm.frozen:
        pay(grad, x, due(owed, norm.mean[at], norm.gamma), grad)


def _taken(norm: BatchNorm, owed: Tensor) -> Correction | None:
    """What turns scale * dn of T's output into its gradient; owed [2, m]: of the norm's last columns."""
    if norm.frozen:
        return None
    c = due(owed, norm.mean[-owed.shape[1] :], norm.gamma)
    return Correction(c.mean, -c.slope, -c.offset)


def _part(norm: Norm, at: slice) -> Norm:
    return Norm(norm.mean[at], norm.scale[at], norm.shift[at])


def _columns(statistics: Tensor | None, at: slice) -> Tensor | None:
    return None if statistics is None else statistics[:, at]


def _raw(kept: Tensor, pixels: int, channels: int) -> Tensor:
    """[P, channels] of what is kept with padded rows."""
    return kept.view(pixels, -1)[:, :channels]


def _scratch(like: Tensor, pixels: int, channels: int) -> Tensor:
    return like.new_empty((pixels, padded(channels)))[:, :channels]


def check_arguments(
    like: Tensor,
    part: int,
    dense: int,
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    frozen: Sequence[int],
    eps: Sequence[float],
    fusion: int,
    post: bool,
) -> None:
    """part, dense: channels, those of the dense part in all."""
    kind = FUSIONS[fusion]
    check_count("params", params, count(kind))
    check_params(like, params, expected_shapes(params, part, dense, kind, "post" if post else "pre"))
    check_norms(like, [p.shape[0] for p in params[::3]], frozen, eps, running)


def columns(params: Sequence[Tensor]) -> int:
    """Channels of the norms: of the statistics."""
    return sum(p.shape[0] for p in params[::3])


def _convs(
    params: Sequence[Tensor], running: Iterator[Tensor], frozen: Sequence[int], eps: Sequence[float], stats: Tensor
) -> Iterator[_Conv]:
    at = 0
    for i, fixed in enumerate(frozen):
        gamma, beta, weight = params[3 * i : 3 * i + 3]
        batch = stats[:, at : at + len(gamma)]
        at += len(gamma)
        mean, var = (next(running), next(running)) if fixed else batch.unbind()
        norm = BatchNorm(mean, var, gamma, beta, eps[i], bool(fixed))
        yield _Conv(weight.flatten(1), norm, None if fixed else batch)


def check_gradient(grad_y: Tensor, x: Tensor, channels: int, pool: bool) -> None:
    """Of an output that has so many channels."""
    h, w = (size // 2 if pool else size for size in x.shape[2:])
    check(x, [("grad_y", grad_y, (x.shape[0], channels, h, w), x.dtype)])


def check_raw(like: Tensor, raw_t: Tensor, raw_u: Tensor, sizes: tuple[int, int]) -> None:
    given = zip(("raw_t", "raw_u"), (raw_t, raw_u), sizes, strict=True)
    check(like, [(name, raw, (size,), like.dtype) for name, raw, size in given])


# --- the operators, with the schemas of csrc/partial_transition.cpp ---


def forward(
    part: Tensor | None,
    dense: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    fusion: int,
    post: bool,
    pool: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(part, dense, params, running, frozen, eps, fusion, post)
    h, w = (size // 2 if pool else size for size in dense.shape[2:])
    y = image(dense, output_size(fusion, 0 if part is None else part.shape[1], params), h, w)
    sizes = raw_sizes(dense, params, fusion, post, pool) if keep else (0, 0)
    raw_t, raw_u = (dense.new_empty((size,)) for size in sizes)
    stats = dense.new_zeros((2, columns(params)), dtype=torch.float64)
    if y.numel() > 0:
        call = _call(part, dense, params, running, frozen, eps, fusion, post, pool, stats)
        call.forward(pixels_of(y), raw_t, raw_u)
    return y, raw_t, raw_u, stats


def backward(
    grad_y: Tensor,
    part: Tensor | None,
    dense: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    raw_t: Tensor,
    raw_u: Tensor,
    stats: Tensor,
    frozen: list[int],
    eps: list[float],
    fusion: int,
    post: bool,
    pool: bool,
) -> list[Tensor]:
    _check(part, dense, params, running, frozen, eps, fusion, post)
    dpart = dense.new_empty((0,)) if part is None else image(part, part.shape[1])
    ddense = image(dense, dense.shape[1])
    if grad_y.numel() == 0:
        return [dpart.zero_(), ddense.zero_(), *(torch.zeros_like(p) for p in params)]
    call = _call(part, dense, params, running, frozen, eps, fusion, post, pool, stats)
    check_gradient(grad_y, dense, output_size(fusion, 0 if part is None else part.shape[1], params), pool)
    check_raw(dense, raw_t, raw_u, raw_sizes(dense, params, fusion, post, pool))
    to = None if part is None else pixels_of(dpart)
    gradients, _ = call.backward(pixels_of(grad_y), raw_t, raw_u, to, pixels_of(ddense), None)
    return [dpart, ddense, *(laid_as(gradient, p) for gradient, p in zip(gradients, params, strict=True))]


def _check(part: Tensor | None, dense: Tensor, *given: Any) -> None:
    n, d, h, w = dense.shape
    channels = 0 if part is None else part.shape[1]
    check(dense, [] if part is None else [("part", part, (n, channels, h, w), dense.dtype)])
    check_arguments(dense, channels, d, *given)


def _call(
    part: Tensor | None,
    dense: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    fusion: int,
    post: bool,
    pool: bool,
    stats: Tensor,
) -> PartialTransition:
    n, _, h, w = dense.shape
    precision = precision_of(dense, winograd(dense.dtype))
    return PartialTransition(
        None if part is None else pixels_of(part), pixels_of(dense), None, params, running, frozen, eps, fusion, post,
        pool, Geometry(n, h, w), stats, precision,
    )  # fmt: skip
