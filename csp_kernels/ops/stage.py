"""Any stage: a graph's program as one operator, `torch.ops.csp_kernels.stage`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csp_kernels._tracing import cached_constant
from csp_kernels.backends import selected
from csp_kernels.ops import _biases
from csp_kernels.ops import _checks as checks
from csp_kernels.ops._program import Names, Part, run
from csp_kernels.ops._repeated import begin
from csp_kernels.ops._transforms import backend_of
from csp_kernels.reference.stage import stage as reference_stage
from csp_kernels.stage.biases import has_biases
from csp_kernels.stage.check import sizes
from csp_kernels.stage.cost import side
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.vocabulary import RECOMPUTE


def stage(
    graph: Graph,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    recompute: str = "none",
) -> tuple[list[Tensor], Tensor]:
    """The outputs of a graph, and the statistics of its norms.

    inputs: [N, channels, H, W] each, channels as in graph.inputs. params: as graph.order lists them: weight (and bias)
    of a convolution, weight and bias of a norm (None: ones, zeros). running: mean and variance of each frozen norm.
    frozen: norms that use those instead of the batch's. recompute: what backward computes again instead of keeping it:
    "none", "bottleneck" (1x1 convolutions that 3x3 ones alone read) or "all" (all but inputs and outputs).

    Returns the outputs, in the dtype and memory format of inputs[0], and stats [2, channels of all norms] float64, no
    gradient: batch mean and biased variance, norm after norm; 0 for frozen ones. Running statistics are the caller's to
    update: `csp.Stage` does. Differentiable any number of times; second derivatives run on the reference.
    What `unsupported` names runs on the reference on every device.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
    call = begin(graph, inputs, params, running, frozen, eps, recompute)
    if call is not None and (found := call.again()) is not None:
        return found
    inputs = checked_inputs(graph, inputs)
    x = inputs[0]
    channels = graph.norms
    _check_params(graph, params, x)
    flags = checks.flags(frozen, len(channels))
    numbers = checks.epsilons(eps, flags) if channels else []
    label = _norm_label(graph)
    checks.check_running(x, running, flags, channels, label, "inputs[0]")
    checks.check_choice("recompute", recompute, RECOMPUTE)
    _check_sizes(graph, x, flags)
    seed = _seed(graph, x)
    backend = backend_of("stage", inputs, params, running)
    if backend == "reference" or _not_here(graph):
        channels_last = checks.is_channels_last(x)
        y, stats = reference_stage(graph, inputs, params, running, frozen=flags, eps=numbers, seed=seed)
        return [checks.formatted(t, channels_last) for t in y], stats
    full = checks.filled(params, parameter_shapes(graph)[1], x, _biases_of(graph))
    options: dict[str, Any] = {"recompute": recompute, "seed": seed, "backend": backend}
    if not has_biases(graph):
        y, moments = run(graph, inputs, full, running, flags, numbers, _names(graph), call=call, **options)
        return y, moments.of(None)
    without = _biases.arguments(graph, full, running, flags, numbers)
    y, moments = run((_biases.lowered, _biases.number_of(graph)), inputs, *without[:4], _names(graph), **options)
    stats = moments.of(tuple(Part("norm", i) for i in range(len(channels))))
    return y, _biases.with_means(stats, without.moved, flags, channels)


@cached_constant
def unsupported(graph: Graph) -> str:
    """What of a graph the kernels cannot run yet, in words; "" if they can run all of it."""
    for i, conv in enumerate(graph.nodes):
        if not isinstance(conv, Conv):
            continue
        found = {
            "groups": conv.groups > 1 and (conv.kernel == 1 or conv.drop_rate > 0),
            "a stride": conv.stride > 1 and conv.drop_rate > 0,
            "dropout behind a bias": conv.bias and conv.drop_rate > 0,
            "dropout behind a 1x1": conv.drop_rate > 0 and conv.kernel == 1,
        }
        for what, there in found.items():
            if there:
                return f"v{graph.value(i)} has {what}"
    return ""


def _not_here(graph: Graph) -> bool:
    """Whether the reference takes a call that the backend was to run; RuntimeError if that backend was chosen."""
    reason = unsupported(graph)
    if reason and selected() != "auto":
        raise RuntimeError(f"stage: {reason}, which the kernels cannot run yet; choose csp.use_backend('reference')")
    return bool(reason)


# --- checks ---


def checked_inputs(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """As a list, under autocast in its dtype."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a sequence of Tensors, such as [x]")
    if len(inputs) != len(graph.inputs):
        raise ValueError(f"inputs: got {len(inputs)} tensors, expected {len(graph.inputs)}, as the graph has")
    tensors = [checks.autocast(checks.check_image(t, f"inputs[{i}]")) for i, t in enumerate(inputs)]
    for i, (t, channels) in enumerate(zip(tensors, graph.inputs, strict=True)):
        if t.shape[1] != channels:
            raise ValueError(f"inputs[{i}]: got {t.shape[1]} channels {list(t.shape)}, expected {channels}")
        checks.check_beside(t, f"inputs[{i}]", tensors[0], "inputs[0]")
    return tensors


@cached_constant
def parameter_shapes(graph: Graph) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names ("<name>.weight", "<name>.bias") and shapes of all parameters, in order."""
    names, shapes = [], []
    for item in graph.order:
        conv = graph.nodes[item.index] if item.kind == "conv" else None
        if isinstance(conv, Conv):
            shape = conv.out_channels, conv.in_channels // conv.groups, conv.kernel, conv.kernel
            found: list[tuple[int, ...]] = [shape, shape[:1]] if conv.bias else [shape]
        else:
            found = [(graph.norms[item.index],)] * 2
        names += [f"{item.name}.weight", f"{item.name}.bias"][: len(found)]
        shapes += found
    return tuple(names), tuple(shapes)


@cached_constant
def _biases_of(graph: Graph) -> tuple[bool, ...]:
    """Which parameters are biases, of convolutions or norms."""
    return tuple(name.endswith(".bias") for name in parameter_shapes(graph)[0])


def _check_params(graph: Graph, params: Sequence[Tensor | None], x: Tensor) -> None:
    names, shapes = parameter_shapes(graph)
    if len(params) != len(names):
        raise ValueError(f"params: got {len(params)}, expected {len(names)}: {', '.join(names)}")
    checks.check_tensors(params, shapes, lambda i: f"params[{i}] ({names[i]})", x, "inputs[0]")


def _norm_label(graph: Graph) -> checks.Label:
    return lambda i: next(item.name for item in graph.order if item.kind == "norm" and item.index == i)


def _check_sizes(graph: Graph, x: Tensor, frozen: Sequence[bool]) -> None:
    """Something is left after pooling, and two values a channel where a norm takes statistics."""
    n, _, height, width = x.shape
    everything, normalised = stage_sizes(graph)
    pixels = {size: n * side(size, height) * side(size, width) for size in everything}
    if n and 0 in pixels.values():
        raise ValueError(
            f"inputs[0]: got {height} x {width} pixels {list(x.shape)}, expected more: pooling leaves none"
        )
    for norm, size in normalised:
        checks.check_values(x, pixels[size], frozen[norm : norm + 1], "inputs[0]")


@cached_constant
def stage_sizes(graph: Graph) -> tuple[tuple[str, ...], tuple[tuple[int, str], ...]]:
    """The sizes (check.sizes) of all values, and those of what norms normalise, with the norm."""
    found = sizes(graph)
    reads = (read for _, user in graph.users() for read in user.reads if read.norm is not None)
    normalised = {(read.norm, found[read.value]) for read in reads if read.norm is not None}
    return tuple(sorted({*found})), tuple(sorted(normalised))


def _seed(graph: Graph, x: Tensor) -> Tensor | None:
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if _drops(graph) else None


@cached_constant
def _drops(graph: Graph) -> bool:
    return any(isinstance(conv, Conv) and conv.drop_rate > 0 for conv in graph.nodes)


@cached_constant
def _names(graph: Graph) -> Names:
    inputs, outputs = range(len(graph.inputs)), range(len(graph.outputs))
    return Names([f"inputs[{i}] of stage" for i in inputs], [f"output {i} of stage" for i in outputs])
