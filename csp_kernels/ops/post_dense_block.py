"""The concat-free dense block in the order convolution, batch norm, ReLU: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops._transforms import uses_reference
from csp_kernels.reference import post_dense_block as reference_post_dense_block
from csp_kernels.reference import two_way_dense_block as reference_two_way_dense_block

NAMES = ("conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias")  # of one layer


def post_dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
) -> tuple[Tensor, Tensor]:
    """L layers of 1x1, batch norm, ReLU, 3x3, batch norm, ReLU over growing features; nothing is concatenated.

    The dense layers of CSPNet (arXiv 1911.11929, Eq. 1) in PeleeNet's order of convolution and norm (arXiv 1804.06882).

    Shapes: K_l = c0 + l * g prefix channels, b bottleneck and g growth channels.
      x        [N, c0, H, W], any strides; float32, bfloat16, float16 or float64. Under autocast cast to its dtype.
      params   6 a layer: conv1.weight [b, K_l, 1, 1], norm1.weight [b], norm1.bias [b], conv2.weight [g, b, 3, 3],
               norm2.weight [g], norm2.bias [g]; None for a norm's weight (ones) or bias (zeros).
               dtype of x; for a 16-bit x also float32.
      running  mean and variance of each frozen norm, in the order norm1, norm2 of layer 0, 1, ...; dtype as params.
      frozen   2L flags in that order: True normalises with `running`, False with batch statistics (default: all False).
      eps      one number or 2L.
    Returns y [N, c0 + L * g, H, W] in the dtype and memory format of x (its first c0 channels are x), and
    stats [2, L * (b + g)] float64, no gradient: batch mean and biased variance of each norm's input, in order;
    unspecified where a norm is frozen. Running statistics are the caller's to update: `csp.PostDenseBlock` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    x = checks.autocast(checks.check_image(x))
    checks.check_count(params, NAMES)
    _check_channels(x, x.shape[1], params)
    shapes = _expected_shapes(params, x.shape[1])
    checks.check_tensors(params, shapes, _label, x)
    norms = checks.norm_indices(shapes)
    frozen = checks.flags(frozen, len(norms), "two a layer")
    eps = checks.epsilons(eps, frozen, "two a layer")
    checks.check_running(x, running, frozen, [shapes[i][0] for i in norms], _norm_label)
    checks.check_values(x, checks.pixels(x), frozen)
    channels_last = checks.is_channels_last(x)
    if uses_reference(x, *params, *running):
        y, stats = reference_post_dense_block(x, params, running, frozen=frozen, eps=eps)
    else:
        y, stats = _native(x, checks.filled(params, shapes, x), running, frozen, eps)
    return checks.formatted(y, channels_last), stats


# --- checks ---


def _check_channels(x: Tensor, channels: int, params: Sequence[Tensor | None]) -> None:
    """channels of x, those that enter the block, against the first convolution."""
    _, expected = checks.check_weight(params[0], _label(0), "[width, c0, 1, 1]")
    checks.check_entering(x, channels, expected, f"the input channels of {_label(0)}")


def _label(i: int) -> str:
    return f"params: layer {i // 6} {NAMES[i % 6]}"


def _norm_label(i: int) -> str:
    return f"layer {i // 2} norm{i % 2 + 1}"


def _expected_shapes(params: Sequence[Tensor | None], channels: int) -> list[checks.Shape]:
    """Of each parameter; channels is c0, width and growth come from the weights of layer 0."""
    b, _ = checks.check_weight(params[0], _label(0), "[width, c0, 1, 1]")
    g, _ = checks.check_weight(params[3], _label(3), "[growth, width, 3, 3]")
    shapes: list[checks.Shape] = []
    for layer in range(len(params) // 6):
        shapes += [(b, channels + layer * g, 1, 1), (b,), (b,), (g, b, 3, 3), (g,), (g,)]
    return shapes


LAYER = checks.Layer(NAMES, _label, _norm_label, _check_channels, _expected_shapes, lambda shapes: shapes[3][0])


# --- native ---


def _native(
    x: Tensor, params: list[Tensor], running: Sequence[Tensor], frozen: list[bool], eps: list[float]
) -> tuple[Tensor, Tensor]:
    """params: contiguous, in the dtype of sums, none missing."""
    return run(x, params, running, frozen, eps, two_way=False)


def run(
    x: Tensor, params: list[Tensor], running: Sequence[Tensor], frozen: list[bool], eps: list[float], *, two_way: bool
) -> tuple[Tensor, Tensor]:
    """The compiled operator of this block and of the two-way block."""
    op = torch.ops.csp_kernels.post_dense_block.default
    given, x = x, node.in_place(x)
    gradients = node.wants_gradients(x, *params)
    fixed = node.fixed(running, params[0].dtype, gradients)
    arguments = x, params, fixed, [int(f) for f in frozen], eps, two_way, node.winograd(x.dtype)
    if gradients:
        y, *_, stats = node.call(op, _FORMULA, (*arguments, True))
        node.watch(y, f"x of {'two_way' if two_way else 'post'}_dense_block", given, x)
    else:
        y, *_, stats = op(*arguments, False)
    return y, stats


def _fake(
    x: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    frozen: list[int],
    eps: list[float],
    two_way: bool,
    winograd: int,
    keep: bool,
) -> tuple[Tensor | list[Tensor], ...]:
    ways, each = (2, 15) if two_way else (1, 6)
    layers, pixels = len(params) // each, checks.pixels(x)
    b, g = max(p.shape[0] for p in params[::each]), params[3].shape[0]
    grown = layers * ways * g
    z, middle = ways * node.padded(b), node.padded(g)
    return (
        node.fake_image(x, x.shape[1] + grown),
        x.new_empty((pixels, grown)),
        [x.new_empty((pixels, z)) for _ in range(layers if keep else 0)],
        [x.new_empty((pixels, middle)) for _ in range(layers if keep and two_way else 0)],
        node.fake_statistics(x, sum(p.shape[0] for p in params[1::3])),
    )


def _fake_backward(grad_y: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return [node.fake_image(x, x.shape[1]), *(torch.empty_like(p) for p in rest[4])]


def _save(arguments: tuple[Any, ...], output: Any) -> node.Saved:
    x, params, running, *rest, _ = arguments
    return node.Saved([x], (*output[1:], params, running), rest)


def _gradients(saved: node.Saved, grad_y: Tensor) -> list[Tensor]:
    (x,), kept, rest = saved
    gradients: list[Tensor] = torch.ops.csp_kernels.post_dense_block_backward.default(
        node.in_place(grad_y), x, *kept, *rest
    )
    return gradients


def _twin(saved: node.Saved) -> node.Twin:
    (x,), (*_, params, running), (frozen, eps, two_way, _) = saved
    block = reference_two_way_dense_block if two_way else reference_post_dense_block
    return [x, *params], lambda x, *params: [block(x, params, running, frozen=frozen, eps=eps)[0]]


_FORMULA = node.Formula(_save, _gradients, _twin)
node.register("post_dense_block", {"": _fake, "_backward": _fake_backward}, _FORMULA)
