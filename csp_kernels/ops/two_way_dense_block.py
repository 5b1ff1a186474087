"""PeleeNet's two-way dense block without concatenation: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops._blocks import dense_layers
from csp_kernels.ops._program import Source
from csp_kernels.reference import two_way_dense_block as reference_two_way_dense_block
from csp_kernels.stage.two_way_dense_block import two_way_dense_block as two_way_dense_block_stage

NORMS = ("branch1.norm1", "branch1.norm2", "branch2.norm1", "branch2.norm2", "branch2.norm3")  # of one layer
NAMES = tuple(
    name for norm in NORMS for name in (f"{norm.replace('norm', 'conv')}.weight", f"{norm}.weight", f"{norm}.bias")
)


def two_way_dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
) -> tuple[Tensor, Tensor]:
    """L two-way layers over growing features; nothing is concatenated (PeleeNet, arXiv 1804.06882, section 2).

    A layer appends branch1, 1x1 and 3x3, and branch2, 1x1, 3x3 and 3x3, batch norm and ReLU after each convolution.

    Shapes: K_l = c0 + l * 2h prefix channels, i_l channels of both 1x1 of layer l, h channels a branch.
      x        [N, c0, H, W], any strides; float32, bfloat16, float16 or float64. Under autocast cast to its dtype.
      params   15 a layer, conv.weight, norm.weight and norm.bias of branch1.conv1 [i_l, K_l, 1, 1], branch1.conv2
               [h, i_l, 3, 3], branch2.conv1 [i_l, K_l, 1, 1], branch2.conv2 [h, i_l, 3, 3], branch2.conv3 [h, h, 3, 3];
               None for a norm's weight (ones) or bias (zeros). dtype of x; for a 16-bit x also float32.
      running  mean and variance of each frozen norm, in that order; dtype as params.
      frozen   5L flags in that order: True normalises with `running`, False with batch statistics (default: all False).
      eps      one number or 5L.
    Returns y [N, c0 + L * 2h, H, W] in the dtype and memory format of x (its first c0 channels are x), and
    stats [2, sum of 2 * i_l + 3h] float64, no gradient: batch mean and biased variance of each norm's input, in order;
    0 where a norm is frozen. Running statistics are the caller's to update: `csp.TwoWayDenseBlock` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    return dense_layers(
        x, params, running, frozen, eps, name="two_way_dense_block", layer=LAYER, each="five a layer",
        reference=reference_two_way_dense_block, source=source_of,
    )  # fmt: skip


def source_of(weights: Sequence[checks.Shape]) -> Source:
    """Of a block with these shapes of its convolutions' weights, in order."""
    return two_way_dense_block_stage, weights[0][1], LAYER.growth(weights), tuple(shape[0] for shape in weights[::5])


# --- checks ---


def _check_channels(x: Tensor, channels: int, params: Sequence[Tensor | None]) -> None:
    """channels of x, those that enter the block, against the first convolution."""
    _, expected = checks.check_weight(params[0], _label(0), "[inter, c0, 1, 1]")
    checks.check_entering(x, channels, expected, f"the input channels of {_label(0)}")


def _label(i: int) -> str:
    return f"params: layer {i // 15} {NAMES[i % 15]}"


def _norm_label(i: int) -> str:
    return f"layer {i // 5} {NORMS[i % 5]}"


def _expected_shapes(params: Sequence[Tensor | None], channels: int) -> list[checks.Shape]:
    """Of each parameter; channels is c0, inter comes from each layer's first weight, growth from layer 0's second."""
    h, _ = checks.check_weight(params[3], _label(3), "[growth / 2, inter, 3, 3]")
    shapes: list[checks.Shape] = []
    for first in range(0, len(params), 15):
        k = channels + first // 15 * 2 * h
        inter, _ = checks.check_weight(params[first], _label(first), f"[inter, {k}, 1, 1]")
        two: list[checks.Shape] = [(inter, k, 1, 1), (inter,), (inter,), (h, inter, 3, 3), (h,), (h,)]
        shapes += [*two, *two, (h, h, 3, 3), (h,), (h,)]
    return shapes


LAYER = checks.Layer(NAMES, _label, _norm_label, _check_channels, _expected_shapes, lambda weights: 2 * weights[1][0])
