"""torch.ops.csp_kernels.concat_conv* in Triton: the order of work of csrc/cpu/concat_conv.cpp. Of what is kept, raw
[P, sum of padded splits], the first O columns hold the product, O = sum of splits.

P = N * H * W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from csp_kernels.kernels import activate, mix
from csp_kernels.kernels.activate import Activation
from csp_kernels.kernels.launch import (
    Geometry,
    Norm,
    check,
    check_count,
    laid_as,
    pixels_of,
    precision_of,
    sum_dtype,
)
from csp_kernels.kernels.norm import BatchNorm
from csp_kernels.ops._node import fake_image as image
from csp_kernels.ops._node import fake_statistics, padded, winograd


class _Call:
    """What the operators share."""

    def __init__(self, inputs: Sequence[Tensor], weight: Tensor, splits: Sequence[int]) -> None:
        if not inputs:
            raise ValueError("inputs: got none")
        x = inputs[0]
        n, _, h, w = x.shape
        check(x, [(f"inputs[{i}]", t, (n, t.shape[1], h, w), x.dtype) for i, t in enumerate(inputs)])
        check(x, [("weight", weight, (sum(splits), sum(t.shape[1] for t in inputs), 1, 1), sum_dtype(x.dtype))])
        self.geometry, self.inputs = Geometry(n, h, w), [pixels_of(t) for t in inputs]
        self.weight = weight.flatten(1)  # [O, K]
        self.precision = precision_of(x, winograd(x.dtype))
        ends = [sum(splits[: i + 1]) for i in range(len(splits))]
        self.columns = [slice(end - size, end) for end, size in zip(ends, splits, strict=True)]

    def norm(
        self,
        stats: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
    ) -> BatchNorm:
        """With fixed statistics if these are given."""
        x, n = self.inputs[0], len(self.weight)
        fixed = {"running_mean": running_mean, "running_var": running_var}
        given = {name: t for name, t in {"norm_weight": gamma, "norm_bias": beta, **fixed}.items() if t is not None}
        check(x, [(name, t, (n,), sum_dtype(x.dtype)) for name, t in given.items()])
        if stats is not None:
            check(x, [("stats", stats, (2, n), torch.float64)])
        if running_mean is not None and running_var is not None:
            return BatchNorm(running_mean, running_var, gamma, beta, eps, True)
        if stats is None or len(given) == 3:
            raise ValueError("running_mean, running_var: expected both")
        mean, var = stats.unbind()
        return BatchNorm(mean, var, gamma, beta, eps, False)

    @property
    def empty(self) -> bool:
        return self.geometry.pixels == 0

    def segments(self, gradients: Sequence[Tensor | None] | None = None) -> list[mix.Segment]:
        """gradients: where those of the inputs go."""
        into = gradients or [None] * len(self.inputs)
        return [mix.Segment(x, None, g) for x, g in zip(self.inputs, into, strict=True)]

    def parts(self, norm: Norm) -> Iterator[tuple[slice, Norm]]:
        """Columns of each output, and their norm."""
        for at in self.columns:
            yield at, Norm(norm.mean[at], norm.scale[at], norm.shift[at])


def forward(
    inputs: list[Tensor],
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    act: int,
    negative_slope: float,
    splits: list[int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    call, x = _Call(inputs, weight, splits), inputs[0]
    y = [image(x, size) for size in splits]
    raw = x.new_empty((call.geometry.pixels, sum(padded(size) for size in splits)))
    stats = fake_statistics(x, len(gamma)).zero_()
    if not call.empty:
        z, norm = raw[:, : len(gamma)], call.norm(stats, gamma, beta, running_mean, running_var, eps)
        into = None if norm.frozen else stats
        mix.forward(call.segments(), call.weight, z, call.geometry, call.precision, into)
        for out, (at, affine) in zip(y, call.parts(norm.load()), strict=True):
            activate.forward(z[:, at], affine, pixels_of(out), call.geometry, Activation(act, negative_slope))
    return y, raw, stats


def backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    raw: Tensor,
    stats: Tensor,
    eps: float,
    act: int,
    negative_slope: float,
    splits: list[int],
    wanted: list[int],
) -> list[Tensor]:
    """wanted: which inputs' gradients; an unwanted one comes back empty."""
    call, params = _Call(inputs, weight, splits), (weight, gamma, beta)
    check_count("wanted", wanted, len(inputs))
    images = [image(t, t.shape[1]) if w else t.new_empty((0,)) for t, w in zip(inputs, wanted, strict=True)]
    if call.empty:
        return [*images, *(torch.zeros_like(p) for p in params)]
    norm = call.norm(stats, gamma, beta, running_mean, running_var, eps)
    x, (n, _, h, w) = inputs[0], inputs[0].shape
    check_count("grads", grads, len(splits))
    check(x, [(f"grads[{i}]", g, (n, c, h, w), x.dtype) for i, (g, c) in enumerate(zip(grads, splits, strict=True))])
    check(x, [("raw", raw, (n * h * w, sum(padded(size) for size in splits)), x.dtype)])
    segments = call.segments([pixels_of(g) if w else None for g, w in zip(images, wanted, strict=True)])
    d, z = [pixels_of(g) for g in grads], raw[:, : len(gamma)]
    of_norm, dz = _through(call, norm, d, z, Activation(act, negative_slope))
    dweight, _ = mix.backward(segments, *dz, call.weight, call.geometry, call.precision)
    return [*images, *(laid_as(g, p) for g, p in zip((dweight, *of_norm), params, strict=True))]


def _through(
    call: _Call, norm: BatchNorm, d: list[Tensor], z: Tensor, act: Activation
) -> tuple[list[Tensor], tuple[Tensor, Tensor | None, mix.Correction | mix.ActivationGradient | None]]:
    """Gradients of the norm's weight and bias, and d, z and correction of mix.backward. Those of several outputs are
    gathered; that of one is read where it is."""
    affine = norm.load()
    dn = None if len(d) == 1 else torch.empty_like(z, memory_format=torch.contiguous_format)
    sums = [
        activate.backward(g, z[:, at], part, None if dn is None else dn[:, at], call.geometry, act)
        for g, (at, part) in zip(d, call.parts(affine), strict=True)
    ]
    *of_norm, correction = norm.settle(torch.cat([s for s in sums if s is not None], 1), call.geometry.pixels)
    if dn is not None:
        return of_norm, (dn, None if correction is None else z, correction)
    slope, offset = (None, None) if correction is None else (correction.slope, correction.offset)
    return of_norm, (d[0], z, mix.ActivationGradient(affine, act, slope, offset))


def inference(
    inputs: list[Tensor],
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: int,
    negative_slope: float,
    splits: list[int],
) -> list[Tensor]:
    call = _Call(inputs, weight, splits)
    y = [image(inputs[0], size) for size in splits]
    if not call.empty:
        norm = call.norm(None, gamma, beta, running_mean, running_var, eps)
        for out, (at, affine) in zip(y, call.parts(norm.load()), strict=True):
            after = mix.After(affine, Activation(act, negative_slope))
            to, rows = pixels_of(out), call.weight[at]
            mix.forward(call.segments(), rows, to, call.geometry, call.precision, after=after)
    return y
