"""The concat-free dense block in the order convolution, batch norm, ReLU: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops._blocks import dense_layers
from csp_kernels.ops._program import Source
from csp_kernels.reference import post_dense_block as reference_post_dense_block
from csp_kernels.stage.post_dense_block import post_dense_block as post_dense_block_stage

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
    0 where a norm is frozen. Running statistics are the caller's to update: `csp.PostDenseBlock` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    return dense_layers(
        x, params, running, frozen, eps, name="post_dense_block", layer=LAYER, each="two a layer",
        reference=reference_post_dense_block, source=source_of,
    )  # fmt: skip


def source_of(weights: Sequence[checks.Shape]) -> Source:
    """Of a block with these shapes of its convolutions' weights, in order."""
    return post_dense_block_stage, weights[0][1], LAYER.growth(weights), tuple(shape[0] for shape in weights[::2])


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


LAYER = checks.Layer(NAMES, _label, _norm_label, _check_channels, _expected_shapes, lambda weights: weights[1][0])
