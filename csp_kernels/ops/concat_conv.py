"""1x1 convolution, batch norm and activation over a concatenation that is never built: checks and dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops._transforms import uses_reference
from csp_kernels.reference import concat_conv as reference_concat_conv

ACTIVATIONS = ("relu", "leaky_relu", "silu", "mish", "hardswish", "identity")
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
      act          relu, leaky_relu (with negative_slope), silu, mish, hardswish or identity.
      splits       channels of each output, adding up to out; None: one output.
    Returns the outputs, each [N, splits[i], H, W], in the dtype and memory format of the first input (each may be a
    channel slice of one tensor), and stats [2, out] float64, no gradient: batch mean and biased variance of the
    convolution, unspecified if frozen. Running statistics are the caller's to update: `csp.ConcatConv` does.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    inputs = _checked_inputs(inputs)
    x = inputs[0]
    out, _ = _check_weight(inputs, weight)
    shapes = [(out, sum(t.shape[1] for t in inputs), 1, 1), (out,), (out,)]
    params = weight, norm_weight, norm_bias
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
    channels_last = checks.is_channels_last(x)
    if uses_reference(*inputs, *params, *running):
        y, stats = reference_concat_conv(
            inputs, *params, running, frozen=frozen, eps=eps, act=act, negative_slope=negative_slope, splits=splits
        )
    else:
        w, gamma, beta = checks.filled(params, shapes, x)
        sizes = [out] if splits is None else list(splits)
        y, stats = _native(inputs, w, gamma, beta, running, frozen, float(eps), act, float(negative_slope), sizes)
    return [checks.sliced(t, channels_last) for t in y], stats


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


# --- native ---

_CODES = {"identity": 0, "relu": 1, "leaky_relu": 2, "silu": 3, "mish": 4, "hardswish": 5}  # enum Activation


def _native(
    inputs: list[Tensor],
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running: Sequence[Tensor],
    frozen: bool,
    eps: float,
    act: str,
    negative_slope: float,
    splits: list[int],
) -> tuple[list[Tensor], Tensor]:
    """Parameters: contiguous, in the dtype of sums, none missing."""
    ops = torch.ops.csp_kernels
    given, inputs = inputs, [node.in_place(t) for t in inputs]
    gradients = node.wants_gradients(*inputs, weight, norm_weight, norm_bias)
    mean, var = node.fixed(running, weight.dtype, gradients) if frozen else (None, None)
    arguments = inputs, weight, norm_weight, norm_bias, mean, var, eps, _CODES[act], negative_slope, splits
    if gradients:
        y, _, stats = node.call(ops.concat_conv.default, _FORMULA, arguments)
        for i, (original, used) in enumerate(zip(given, inputs, strict=True)):
            node.watch(y[0], f"inputs[{i}] of concat_conv", original, used)
        return y, stats
    if frozen:
        y = ops.concat_conv_inference.default(*arguments)
        return y, inputs[0].new_zeros((2, sum(splits)), dtype=torch.float64)
    y, _, stats = ops.concat_conv.default(*arguments)
    return y, stats


def _fake(inputs: list[Tensor], weight: Tensor, *rest: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    x, splits = inputs[0], rest[-1]
    raw = x.new_empty((checks.pixels(x), sum(node.padded(c) for c in splits)))
    return _fake_inference(inputs, weight, *rest), raw, node.fake_statistics(x, sum(splits))


def _fake_inference(inputs: list[Tensor], weight: Tensor, *rest: Any) -> list[Tensor]:
    return [node.fake_image(inputs[0], c) for c in rest[-1]]


def _fake_backward(grads: list[Tensor], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    wanted, parameters = rest[-1], rest[:3]
    images = [node.fake_image(t, t.shape[1]) if w else t.new_empty((0,)) for t, w in zip(inputs, wanted, strict=True)]
    return [*images, *(torch.empty_like(p) for p in parameters)]


def _save(arguments: tuple[Any, ...], output: Any) -> node.Saved:
    inputs, *parameters, eps, act, negative_slope, splits = arguments
    wanted = [int(t.requires_grad) for t in inputs]
    return node.Saved(inputs, (*output[1:], *parameters), (eps, act, negative_slope, splits, wanted))


def _gradients(saved: node.Saved, grads: list[Tensor | None]) -> list[Tensor | None]:
    inputs, (raw, stats, *parameters), (*options, splits, wanted) = saved
    assert inputs[0] is not None
    full = [
        node.fake_image(inputs[0], c).zero_() if g is None else node.in_place(g)
        for g, c in zip(grads, splits, strict=True)
    ]
    *images, dw, dgamma, dbeta = torch.ops.csp_kernels.concat_conv_backward.default(
        full, inputs, *parameters, raw, stats, *options, splits, wanted
    )
    return [*(g if w else None for g, w in zip(images, wanted, strict=True)), dw, dgamma, dbeta]


def _twin(saved: node.Saved) -> node.Twin:
    inputs, (_, _, *parameters, mean, var), (eps, act, negative_slope, splits, _) = saved
    names = {code: name for name, code in _CODES.items()}
    running = [] if mean is None else [mean, var]

    def reference(*leaves: Tensor) -> list[Tensor]:
        *images, weight, gamma, beta = leaves
        options: dict[str, Any] = {"act": names[act], "negative_slope": negative_slope, "splits": splits}
        frozen = bool(running)
        return reference_concat_conv(images, weight, gamma, beta, running, frozen=frozen, eps=eps, **options)[0]

    return [*inputs, *parameters], reference


_FORMULA = node.Formula(_save, _gradients, _twin)
node.register("concat_conv", {"": _fake, "_backward": _fake_backward, "_inference": _fake_inference}, _FORMULA)
