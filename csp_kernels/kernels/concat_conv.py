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
from csp_kernels.kernels.launch import Geometry, Norm, laid_as, pixels_of, precision_of
from csp_kernels.kernels.norm import BatchNorm
from csp_kernels.ops._node import fake_image as image
from csp_kernels.ops._node import fake_statistics, padded, winograd


class _Call:
    """What the operators share."""

    def __init__(self, inputs: Sequence[Tensor], weight: Tensor, splits: Sequence[int]) -> None:
        x = inputs[0]
        n, _, h, w = x.shape
        self.geometry, self.inputs = Geometry(n, h, w), [pixels_of(t) for t in inputs]
        self.weight = weight.flatten(1)  # [O, K]
        self.precision = precision_of(x, winograd(x.dtype))
        ends = [sum(splits[: i + 1]) for i in range(len(splits))]
        self.columns = [slice(end - size, end) for end, size in zip(ends, splits, strict=True)]

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
        z, norm = raw[:, : len(gamma)], _norm(stats, gamma, beta, running_mean, running_var, eps)
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
    images = [image(t, t.shape[1]) if w else t.new_empty((0,)) for t, w in zip(inputs, wanted, strict=True)]
    if call.empty:
        return [*images, *(torch.zeros_like(p) for p in params)]
    norm = _norm(stats, gamma, beta, running_mean, running_var, eps)
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
        norm = BatchNorm(running_mean, running_var, gamma, beta, eps, True)
        for out, (at, affine) in zip(y, call.parts(norm.load()), strict=True):
            after = mix.After(affine, Activation(act, negative_slope))
            to, rows = pixels_of(out), call.weight[at]
            mix.forward(call.segments(), rows, to, call.geometry, call.precision, after=after)
    return y


def _norm(
    stats: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None, eps: float
) -> BatchNorm:
    if running_mean is not None and running_var is not None:
        return BatchNorm(running_mean, running_var, gamma, beta, eps, True)
    mean, var = stats.unbind()
    return BatchNorm(mean, var, gamma, beta, eps, False)
