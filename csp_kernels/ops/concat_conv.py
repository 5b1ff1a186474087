"""1x1 convolution, batch norm and activation over a concatenation that is never built: checks and dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from csp_kernels._tracing import static, static_float
from csp_kernels.ops import _checks as checks
from csp_kernels.ops._program import Names, Source, run
from csp_kernels.ops._repeated import begin
from csp_kernels.ops._transforms import backend_of
from csp_kernels.reference import concat_conv as reference_concat_conv
from csp_kernels.stage.concat_conv import concat_conv as concat_conv_stage
from csp_kernels.vocabulary import ACTIVATIONS

NAMES = ("weight", "norm_weight", "norm_bias")


def concat_conv(
    inputs: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running: Sequence[Tensor] = (),
    *,
    frozen: bool = False,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    splits: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """act(BN(conv1x1(cat(inputs)))) split along the channels; the inputs are read where they are.

    The joins and, with two splits, the entries of cross stage partial networks (arXiv 1911.11929, Fig. 5).

    Shapes:
      inputs       one or more [N, c_i, H, W], any strides, the same dtype: float32, bfloat16, float16 or float64.
                   Under autocast cast to its dtype.
      weight       [out, sum of c_i, 1, 1]; dtype of the inputs; for 16-bit inputs also float32.
      norm_weight  [out] or None (ones); norm_bias [out] or None (zeros); dtype as weight.
      running      mean [out] and variance [out] if frozen; dtype as weight.
      frozen       True normalises with `running`, False with batch statistics.
      act          one of csp_kernels.vocabulary.ACTIVATIONS; leaky_relu with negative_slope.
      splits       channels of each output, adding up to out; None: one output.
    Returns the outputs, each [N, splits[i], H, W], in the dtype and memory format of the first input (each may be a
    channel slice of one tensor), and stats [2, out] float64, no gradient: batch mean and biased variance of the
    convolution, 0 if frozen. Running statistics are the caller's to update: `csp.ConcatConv` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    params = weight, norm_weight, norm_bias
    cuts = tuple(splits) if isinstance(splits, list) else splits
    call = begin("concat_conv", inputs, params, running, [frozen], eps, act, negative_slope, cuts)
    if call is not None and (found := call.again()) is not None:
        return found
    inputs = _checked_inputs(inputs)
    x = inputs[0]
    out, _ = _check_weight(inputs, weight)
    shapes = [(out, sum(t.shape[1] for t in inputs), 1, 1), (out,), (out,)]
    checks.check_tensors(params, shapes, lambda i: NAMES[i], x, "inputs[0]")
    if not isinstance(frozen, bool):
        raise TypeError(f"frozen: got {type(frozen).__name__}, expected True or False")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a number")
    checks.epsilons(eps, [frozen])
    checks.check_running(x, running, [frozen], [out], lambda i: "norm", "inputs[0]")
    checks.check_choice("act", act, ACTIVATIONS)
    if not abs(negative_slope) < math.inf:
        raise ValueError(f"negative_slope: got {negative_slope}, expected a finite number")
    _check_splits(splits, out)
    checks.check_values(x, checks.pixels(x), [frozen], "inputs[0]")
    backend = backend_of("concat_conv", inputs, params, running)
    if backend == "reference":
        channels_last = checks.is_channels_last(x)
        y, stats = reference_concat_conv(
            inputs, *params, running, frozen=frozen, eps=eps, act=act, negative_slope=negative_slope, splits=splits
        )
        return [checks.sliced(t, channels_last) for t in y], stats
    sizes = (out,) if splits is None else tuple(splits)
    source = source_of([t.shape[1] for t in inputs], sizes, act, negative_slope)
    names = Names(
        [f"inputs[{i}] of concat_conv" for i in range(len(inputs))],
        [f"output {i} of concat_conv" for i in range(len(sizes))],
    )
    full = checks.filled(params, shapes, x)
    y, moments = run(source, inputs, full, running, [frozen], [float(eps)], names, backend=backend, call=call)
    return y, moments.of(None)


def source_of(in_channels: Sequence[int], out_channels: Sequence[int], act: str, negative_slope: float) -> Source:
    """Of inputs and outputs of these channels; the slope counts for leaky_relu alone."""
    channels, sizes = (tuple(static(n) for n in given) for given in (in_channels, out_channels))
    return concat_conv_stage, channels, sizes, act, static_float(negative_slope) if act == "leaky_relu" else 0.0


# --- checks ---


def _checked_inputs(inputs: Sequence[Tensor]) -> list[Tensor]:
    """As a list, under autocast in its dtype."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a sequence of Tensors, such as [x]")
    if not inputs:
        raise ValueError("inputs: got no tensor, expected at least one")
    tensors = [checks.autocast(checks.check_image(t, f"inputs[{i}]")) for i, t in enumerate(inputs)]
    for i, t in enumerate(tensors[1:], 1):
        checks.check_beside(t, f"inputs[{i}]", tensors[0], "inputs[0]")
    return tensors


def _check_weight(inputs: list[Tensor], weight: Tensor) -> Sequence[int]:
    channels = [t.shape[1] for t in inputs]
    out, total = checks.check_weight(weight, "weight", f"[out, {sum(channels)}, 1, 1]")
    if total != sum(channels):
        got = " + ".join(map(str, channels)) + (f" = {sum(channels)}" if len(channels) > 1 else "")
        raise ValueError(f"inputs: got {got} channels, expected {total}, the input channels of weight")
    return out, total


def _check_splits(splits: Sequence[int] | None, out: int) -> None:
    if splits is not None and (not splits or min(splits) < 1 or sum(splits) != out):
        raise ValueError(
            f"splits: got {list(splits)}, expected sizes of at least 1 that add up to {out}, the rows of weight"
        )
