"""The concat-free dense block: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csp_kernels._tracing import cached_constant, static_float
from csp_kernels.ops import _checks as checks
from csp_kernels.ops._program import Names, Part, Source, run
from csp_kernels.ops._repeated import begin
from csp_kernels.ops._transforms import backend_of
from csp_kernels.reference import dense_block as reference_dense_block
from csp_kernels.stage.dense_block import dense_block as dense_block_stage

NAMES = ("norm1.weight", "norm1.bias", "conv1.weight", "norm2.weight", "norm2.bias", "conv2.weight")  # of one layer


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
    float64, no gradient: batch mean and biased variance of the features, then of each layer's bottleneck; 0 where no
    norm of the block needs them, as of what the last layer adds. Running statistics are the caller's to update:
    `csp.DenseBlock` does.
    Differentiable any number of times; second derivatives run on the reference, with the same dropout. y must not be
    changed in place before backward, which raises RuntimeError then: it holds the features.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    call = begin("dense_block", [x], params, running, frozen, eps, drop_rate, recompute)
    if call is not None and (found := call.again()) is not None:
        return found[0][0], found[1]
    x = checks.autocast(checks.check_image(x))
    shapes = _checked_params(x, params)
    layers = len(params) // 6
    frozen = checks.flags(frozen, 2 * layers, "two a layer")
    eps = checks.epsilons(eps, frozen, "two a layer")
    checks.check_running(x, running, frozen, [shapes[i][0] for i in checks.norm_indices(shapes)], _norm_label)
    _check_options(x, frozen, drop_rate, recompute)
    channels_last = checks.is_channels_last(x)
    backend = backend_of("dense_block", [x], params, running)
    if backend == "reference":
        y, stats = reference_dense_block(x, params, running, frozen=frozen, eps=eps, drop_rate=drop_rate)
        return checks.formatted(y, channels_last), stats
    full = checks.filled(params, shapes, x)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if drop_rate > 0 else None
    source = source_of(checks.weights(params), drop_rate)
    (y,), moments = run(
        source, [x], full, running, frozen, eps, _NAMES, recompute=recompute, seed=seed, backend=backend, call=call
    )
    return y, moments.of(features_and_bottlenecks(layers))


_NAMES = Names(["x of dense_block"], ["the output of dense_block"])


def source_of(weights: Sequence[checks.Shape], drop_rate: float) -> Source:
    """Of a block with these shapes of its convolutions' weights, in order."""
    growth, width = weights[1][:2]
    return dense_block_stage, len(weights) // 2, weights[0][1], growth, width, static_float(drop_rate)


@cached_constant
def features_and_bottlenecks(layers: int, first: int = 0) -> tuple[Part, ...]:
    """What enters the layers, value `first`, and what each adds, then what each 1x1 gives."""
    grown, bottlenecks = range(first + 2, first + 2 * layers + 1, 2), range(first + 1, first + 2 * layers + 1, 2)
    return tuple(Part("value", value) for value in (first, *grown, *bottlenecks))


# --- checks ---


def _checked_params(x: Tensor, params: Sequence[Tensor | None]) -> list[checks.Shape]:
    checks.check_count(params, NAMES)
    _check_channels(x, x.shape[1], params)
    shapes = _expected_shapes(params, x.shape[1])
    checks.check_tensors(params, shapes, _label, x)
    return shapes


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


LAYER = checks.Layer(NAMES, _label, _norm_label, _check_channels, _expected_shapes, lambda weights: weights[1][0])


def _check_options(x: Tensor, frozen: list[bool], drop_rate: float, recompute: str) -> None:
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: got {drop_rate}, expected 0 <= drop_rate < 1")
    checks.check_recompute(recompute)
    checks.check_values(x, checks.pixels(x), frozen)
