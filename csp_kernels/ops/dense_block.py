"""The concat-free dense block: checks, dispatch, fake kernels and autograd of torch.ops.csp_kernels.dense_block*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops._transforms import uses_reference
from csp_kernels.reference import dense_block as reference_dense_block

NAMES = ("norm1.weight", "norm1.bias", "conv1.weight", "norm2.weight", "norm2.bias", "conv2.weight")  # of one layer


class _Sizes(NamedTuple):
    layers: int  # L
    channels: int  # c0
    growth: int  # g
    width: int  # b, the bottleneck

    @property
    def total(self) -> int:  # C
        return self.channels + self.layers * self.growth

    @property
    def columns(self) -> int:  # of stats
        return self.total + self.layers * self.width


def dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    drop_rate: float = 0.0,
    recompute: str = "none",
) -> tuple[Tensor, Tensor]:
    """L layers of batch norm, ReLU, 1x1, batch norm, ReLU, 3x3 over a growing feature buffer; nothing is concatenated.

    DenseNet-BC (arXiv 1608.06993, section 3) with the statistics of each channel computed once (arXiv 1707.06990).

    Shapes: K_l = c0 + l * g prefix channels, b bottleneck and g growth channels, C = c0 + L * g.
      x        [N, c0, H, W], any strides; float32, bfloat16, float16 or float64. Under autocast cast to its dtype.
      params   6 a layer: norm1.weight [K_l], norm1.bias [K_l], conv1.weight [b, K_l, 1, 1], norm2.weight [b],
               norm2.bias [b], conv2.weight [g, b, 3, 3]; None for a norm's weight (ones) or bias (zeros).
               dtype of x; for a 16-bit x also float32.
      running  mean and variance of each frozen norm, in the order norm1, norm2 of layer 0, 1, ...; dtype as params.
      frozen   2L flags in that order: True normalises with `running`, False with batch statistics (default: all False).
      eps      one number or 2L.
      drop_rate  dropout on each layer's new features, 0 <= drop_rate < 1; 0 in eval mode.
      recompute  "none" keeps the bottleneck for backward, "bottleneck" computes it again there.
    Returns y [N, C, H, W] in the dtype and memory format of x (its first c0 channels are x), and stats [2, C + L * b]
    float64, no gradient: batch mean and biased variance of the features, then of each layer's bottleneck; unspecified
    where no norm needs them. Running statistics are the caller's to update: `csp.DenseBlock` does.
    Differentiable any number of times; second derivatives run on the reference, with the same dropout. y must not be
    changed in place before backward, which raises RuntimeError then: it holds the features.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    x = checks.autocast(checks.check_image(x))
    sizes = _checked_params(x, params)
    frozen = checks.flags(frozen, 2 * sizes.layers, "two a layer")
    eps = checks.epsilons(eps, frozen, "two a layer")
    _check_running(x, running, frozen, sizes)
    _check_options(x, frozen, drop_rate, recompute)
    channels_last = checks.is_channels_last(x)
    if uses_reference(x, *params, *running):
        y, stats = reference_dense_block(x, params, running, frozen=frozen, eps=eps, drop_rate=drop_rate)
        return checks.formatted(y, channels_last), stats
    features, stats = _fused(x, params, running, sizes, frozen, eps, drop_rate, recompute)
    y = checks.formatted(features, channels_last)
    node.watch(features, "the output of dense_block", y, features)
    return y, stats


def _fused(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor],
    sizes: _Sizes,
    frozen: list[bool],
    eps: list[float],
    drop_rate: float,
    recompute: str,
) -> tuple[Tensor, Tensor]:
    ops = torch.ops.csp_kernels
    dtype = checks.ACCUMULATE[x.dtype]
    full = [_filled(i, sizes, x) if p is None else checks.converted(p, dtype) for i, p in enumerate(params)]
    x = node.in_place(x)
    winograd = node.winograd(x.dtype)
    gradients = node.wants_gradients(x, *full)
    fixed = node.fixed(running, dtype, gradients)
    if all(frozen) and not gradients and drop_rate == 0:
        y = ops.dense_block_inference.default(x, full, fixed, eps, winograd)
        return y, x.new_zeros((2, sizes.columns), dtype=torch.float64)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if drop_rate > 0 else None
    keep = gradients and recompute == "none"
    op = ops.dense_block.default
    arguments = x, full, fixed, [int(f) for f in frozen], eps, seed, float(drop_rate), keep, winograd
    y, _, stats = node.call(op, _FORMULA, arguments) if gradients else op(*arguments)
    return y, stats


def _filled(index: int, sizes: _Sizes, x: Tensor) -> Tensor:
    """Weight (ones) or bias (zeros) of a norm without affine parameters."""
    layer, slot = divmod(index, 6)
    channels = sizes.width if slot > 2 else sizes.channels + layer * sizes.growth
    return (torch.ones if slot % 3 == 0 else torch.zeros)(channels, dtype=checks.ACCUMULATE[x.dtype], device=x.device)


# --- checks ---


def _checked_params(x: Tensor, params: Sequence[Tensor | None]) -> _Sizes:
    checks.check_count(params, NAMES)
    _check_channels(x, x.shape[1], params)
    shapes = _expected_shapes(params, x.shape[1])
    checks.check_tensors(params, shapes, _label, x)
    g, b = shapes[5][:2]
    return _Sizes(len(params) // 6, x.shape[1], g, b)


def _check_channels(x: Tensor, channels: int, params: Sequence[Tensor | None]) -> None:
    """channels of x, those that enter the block, against the first norm."""
    for i, p in enumerate(params[:2]):
        if isinstance(p, Tensor) and p.dim() == 1:
            checks.check_entering(x, channels, len(p), f"the size of {_label(i)}")


def _label(i: int) -> str:
    return f"params: layer {i // 6} {NAMES[i % 6]}"


def _norm_label(i: int) -> str:
    return f"layer {i // 2} norm{i % 2 + 1}"


def _expected_shapes(params: Sequence[Tensor | None], channels: int) -> list[checks.Shape]:
    """Of each parameter; channels is c0, growth and width come from the first 3x3 weight."""
    g, b = checks.check_weight(params[5], _label(5), "[growth, width, 3, 3]")
    shapes: list[checks.Shape] = []
    for layer in range(len(params) // 6):
        k = channels + layer * g
        shapes += [(k,), (k,), (b, k, 1, 1), (b,), (b,), (g, b, 3, 3)]
    return shapes


LAYER = checks.Layer(NAMES, _label, _norm_label, _check_channels, _expected_shapes, lambda shapes: shapes[5][0])


def _check_running(x: Tensor, running: Sequence[Tensor], frozen: list[bool], sizes: _Sizes) -> None:
    prefixes = [sizes.channels + layer * sizes.growth for layer in range(sizes.layers)]
    widths = [c for k in prefixes for c in (k, sizes.width)]
    checks.check_running(x, running, frozen, widths, _norm_label)


def _check_options(x: Tensor, frozen: list[bool], drop_rate: float, recompute: str) -> None:
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: got {drop_rate}, expected 0 <= drop_rate < 1")
    checks.check_recompute(recompute)
    checks.check_values(x, checks.pixels(x), frozen)


# --- fake kernels: shapes only ---


def _sizes(x: Tensor, params: Sequence[Tensor]) -> _Sizes:
    return _Sizes(len(params) // 6, x.shape[1], params[5].shape[0], params[5].shape[1])


def _fake_forward(
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
    sizes = _sizes(x, params)
    pixels, padded = x.shape[0] * x.shape[2] * x.shape[3], node.padded(sizes.width)
    z = [x.new_empty((pixels, padded)) for _ in range(sizes.layers if keep_bottleneck else 0)]
    return node.fake_image(x, sizes.total), z, node.fake_statistics(x, sizes.columns)


def _fake_backward(
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
    return [node.fake_image(y, in_channels), *(torch.empty_like(p) for p in params)]


def _fake_inference(x: Tensor, params: list[Tensor], running: list[Tensor], eps: list[float], winograd: int) -> Tensor:
    return node.fake_image(x, _sizes(x, params).total)


# --- autograd ---


def _save(arguments: tuple[Any, ...], output: tuple[Tensor, list[Tensor], Tensor]) -> node.Saved:
    x, params, running, frozen, eps, seed, drop_rate, _, winograd = arguments
    y, z, stats = output
    rest = frozen, eps, drop_rate, x.shape[1], winograd, x.requires_grad
    return node.Saved([y], (z, stats, params, running, seed), rest)


def _gradients(saved: node.Saved, grad_y: Tensor) -> list[Tensor]:
    (y,), (z, stats, params, running, seed), (frozen, eps, drop_rate, channels, winograd, _) = saved
    assert y is not None
    gradients: list[Tensor] = torch.ops.csp_kernels.dense_block_backward.default(
        node.packed(grad_y),
        node.packed(y),
        z,
        stats,
        params,
        running,
        frozen,
        eps,
        seed,
        drop_rate,
        channels,
        winograd,
    )
    return gradients


def _twin(saved: node.Saved) -> node.Twin:
    """x is y's first channels: not only equal, but by way of y and this operator's gradients also differentiable."""
    (y,), (_, _, params, running, seed), (frozen, eps, drop_rate, channels, _, differentiable) = saved
    assert y is not None
    x = y[:, :channels]

    def reference(x: Tensor, *params: Tensor) -> list[Tensor]:
        options = {"frozen": frozen, "eps": eps, "drop_rate": drop_rate, "seed": seed}
        return [reference_dense_block(x, params, running, **options)[0]]

    return [x if differentiable else x.detach(), *params], reference


_FORMULA = node.Formula(_save, _gradients, _twin)
_FAKES: dict[str, Callable[..., Any]] = {"": _fake_forward, "_backward": _fake_backward, "_inference": _fake_inference}
node.register("dense_block", _FAKES, _FORMULA)
