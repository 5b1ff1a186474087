"""Any stage: a graph's program as one operator, `torch.ops.csp_kernels.stage`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from csp_kernels._tracing import cached_constant
from csp_kernels.backends import resolve, selected
from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops._transforms import uses_reference
from csp_kernels.reference.stage import stage as reference_stage
from csp_kernels.stage.check import sizes
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.cost import side
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.stage.place import RECOMPUTE
from csp_kernels.stage.program import Buffer, Copy, Fill, Program, Wanted, values_read
from csp_kernels.stage.text import decode, encode


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
    What `unsupported` names runs on the reference on every device, and so does all of it on a GPU so far.
    Raises TypeError or ValueError for bad arguments before any work, RuntimeError if the chosen backend cannot run.
    """
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
    channels_last = checks.is_channels_last(x)
    seed = _seed(graph, x)
    if uses_reference(*inputs, *params, *running) or _not_here(graph, x):
        y, stats = reference_stage(graph, inputs, params, running, frozen=flags, eps=numbers, seed=seed)
        return [checks.formatted(t, channels_last) for t in y], stats
    y, stats = _fused(graph, inputs, params, running, flags, numbers, recompute, seed)
    formatted = [checks.formatted(t, channels_last) for t in y]
    for i, (original, used) in enumerate(zip(formatted, y, strict=True)):
        node.watch(y[i], f"output {i} of stage", original, used)
    return formatted, stats


@cached_constant
def unsupported(graph: Graph) -> str:
    """What of a graph the kernels cannot run yet, in words; "" if they can run all of it."""
    for i, conv in enumerate(graph.nodes):
        if not isinstance(conv, Conv):
            continue
        found = {
            "groups": conv.groups > 1,
            "a stride": conv.stride > 1,
            "a bias": conv.bias,
            "dropout behind a 1x1": conv.drop_rate > 0 and conv.kernel == 1,
        }
        for what, there in found.items():
            if there:
                return f"v{graph.value(i)} has {what}"
    return ""


def _not_here(graph: Graph, x: Tensor) -> bool:
    """Whether the reference takes a call that the backend was to run; RuntimeError if that backend was chosen."""
    if resolve(x.device.type) == "triton" or x.device.type != "cpu":
        if selected() == "auto":
            return True
        raise RuntimeError("stage: has no kernels for GPUs yet; choose csp.use_backend('reference') or 'auto'")
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


# --- the operator ---

_GRAPHS: dict[str, tuple[Graph, list[bool]]] = {}  # of programs that ran with gradients, for their second derivatives


def _fused(
    graph: Graph,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor | None],
    running: Sequence[Tensor],
    frozen: list[bool],
    eps: list[float],
    recompute: str,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    x = inputs[0]
    full = checks.filled(params, parameter_shapes(graph)[1], x)
    used = [node.in_place(t) for t in inputs]
    wanted = wanted_gradients(graph, used, full) if node.wants_gradients(*used, *full) else None
    text = _program(graph, tuple(frozen), wanted, recompute)
    fixed = node.fixed(running, checks.ACCUMULATE[x.dtype], wanted is not None)
    op = torch.ops.csp_kernels.stage.default
    arguments = used, full, fixed, seed, text, eps, node.winograd(x.dtype)
    if wanted is None:
        y, _, stats = op(*arguments)
        return y, by_norm(text, stats)
    _GRAPHS[text] = graph, frozen
    y, _, stats = node.call(op, _FORMULA, arguments)
    for i in read_again(text):
        if i < len(used):
            node.watch(y[0], f"inputs[{i}] of stage", inputs[i], used[i])
    return y, by_norm(text, stats)


@cached_constant
def read_again(text: str) -> tuple[int, ...]:
    """Inputs, and behind them outputs, whose values backward reads: the others need not be kept."""
    program = decode(text)
    found = {place.buffer for step in program.backward for place in values_read(step)}
    return tuple(i for i in sorted(found) if program.buffers[i].kind in ("input", "output"))


Indices = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # a Wanted, which Dynamo would pass on empty


def wanted_gradients(graph: Graph, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Indices:
    nodes: list[int] = []
    norms: list[int] = []
    at = 0
    for item in graph.order:
        conv = graph.nodes[item.index] if item.kind == "conv" else None
        count = 1 + conv.bias if isinstance(conv, Conv) else 2
        if any(p.requires_grad for p in params[at : at + count]):
            (norms if conv is None else nodes).append(item.index)
        at += count
    wanted = tuple(i for i, t in enumerate(inputs) if t.requires_grad)
    return wanted, tuple(sorted(nodes)), tuple(sorted(norms))


@cached_constant
def _program(graph: Graph, frozen: tuple[bool, ...], wanted: Indices | None, recompute: str) -> str:
    return encode(compile_stage(graph, frozen, Wanted(*wanted) if wanted else None, recompute))


def by_norm(text: str, stats: Tensor) -> Tensor:
    """Statistics of values' channels as those of the norms', norm after norm; 0 for frozen ones."""
    # what traces (torch.compile, FakeTensorMode, make_fx) must not leave its tensors to real calls
    find = _where if torch.compiler.is_compiling() or type(stats) is not Tensor else _known_where
    index, frozen = find(text, stats.device)
    if not stats.shape[1]:
        return stats.new_zeros(2, index.shape[0])
    found = stats.index_select(1, index)
    return found if frozen is None else found.masked_fill(frozen, 0.0)


def _where(text: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where each channel's statistics are, and which have none."""
    columns = _columns(text)
    index = torch.tensor([max(c, 0) for c in columns], dtype=torch.int64, device=device)
    if min(columns, default=0) >= 0:
        return index, None
    return index, torch.tensor([c < 0 for c in columns], device=device)


_known_where = lru_cache(maxsize=1024)(_where)


@cached_constant
def _columns(text: str) -> tuple[int, ...]:
    """For each channel of each norm its column of statistics, -1: it is frozen."""
    program = decode(text)
    starts = [0]
    for norm in program.norms:
        starts.append(starts[-1] + norm.channels)
    columns = [-1] * starts[-1]
    for step in program.forward:
        for b in step.bindings if isinstance(step, Fill) else ():
            for c in range(b.count):
                columns[starts[b.norm] + b.at + c] = -1 if b.statistics is None else b.statistics + c
    return tuple(columns)


# --- fake kernels ---


def _image(like: Tensor, buffer: Buffer) -> Tensor:
    return node.fake_image(like, buffer.channels, side(buffer.size, like.shape[2]), side(buffer.size, like.shape[3]))


def _fake(inputs: list[Tensor], params: list[Tensor], running: list[Tensor], seed: Tensor | None, program: str,
          eps: list[float], winograd: int) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    x, p = inputs[0], decode(program)
    n, _, height, width = x.shape
    outputs = [_image(x, b) for b in p.buffers if b.kind == "output"]
    kept = [
        x.new_empty((n * side(b.size, height) * side(b.size, width), node.padded(b.channels)))
        for b in p.buffers
        if b.kind == "kept"
    ]
    return outputs, kept, node.fake_statistics(x, p.statistics)


def _fake_backward(grads: list[Tensor], inputs: list[Tensor], outputs: list[Tensor], kept: list[Tensor], stats: Tensor,
                   params: list[Tensor], running: list[Tensor], seed: Tensor | None, program: str, eps: list[float],
                   winograd: int) -> list[Tensor]:  # fmt: skip
    p = decode(program)
    images = [node.fake_image(inputs[i], inputs[i].shape[1]) for i in p.wanted.inputs]
    return [*images, *(torch.empty_like(params[i]) for i in _wanted_params(p))]


def _wanted_params(program: Program) -> list[int]:
    """Which parameters have gradients, in the order in which the operator returns them."""
    found = []
    for i in program.wanted.nodes:
        weight = program.weights[i]
        assert weight is not None
        found += [weight.position, weight.position + 1] if weight.bias else [weight.position]
    for i in program.wanted.norms:
        found += [program.norms[i].position, program.norms[i].position + 1]
    return found


# --- autograd ---


def _save(arguments: tuple[Any, ...], output: Any) -> node.Saved:
    inputs, params, running, seed, program, eps, winograd = arguments
    outputs, kept, stats = output
    images = [*inputs, *outputs]
    again = read_again(program)
    rest = program, eps, winograd, len(inputs), [t.shape for t in images], [t.requires_grad for t in inputs]
    read = [t if i in again else None for i, t in enumerate(images)]
    return node.Saved(read, (kept, stats, params, running, seed), rest)


def _gradients(saved: node.Saved, grads: list[Tensor | None]) -> list[Tensor | None]:
    kept_images, (kept, stats, params, running, seed), (text, eps, winograd, count, shapes, _) = saved
    like = next(g for g in grads if g is not None)
    images = [
        like.new_empty(1, 1, 1, 1).expand(shape) if t is None else t  # nobody reads it
        for t, shape in zip(kept_images, shapes, strict=True)
    ]
    outputs = [t if kept_images[count + i] is None else node.packed(t) for i, t in enumerate(images[count:])]
    given = [
        node.packed(like.new_zeros(shape) if g is None else g) for g, shape in zip(grads, shapes[count:], strict=True)
    ]
    found = torch.ops.csp_kernels.stage_backward.default(
        given, images[:count], outputs, kept, stats, params, running, seed, text, eps, winograd
    )
    program = decode(text)
    at = [*program.wanted.inputs, *(count + i for i in _wanted_params(program))]
    gradients: list[Tensor | None] = [None] * (count + len(params))
    for position, gradient in zip(at, found, strict=True):
        gradients[position] = gradient
    return gradients


def _twin(saved: node.Saved) -> node.Twin:
    """An input that was not kept was copied into an output, and is read from there."""
    images, (_, _, params, running, seed), (text, eps, _, count, _, differentiable) = saved
    if text not in _GRAPHS:
        raise RuntimeError("stage: its second derivatives need the graph, which this process has not seen: run it here")
    graph, frozen = _GRAPHS[text]
    inputs = [_original(text, images, i) for i in range(count)]
    inputs = [t if d else t.detach() for t, d in zip(inputs, differentiable, strict=True)]

    def reference(*leaves: Tensor) -> list[Tensor]:
        return reference_stage(
            graph, leaves[:count], leaves[count:], running, frozen=frozen, eps=eps, seed=seed
        )[0]  # fmt: skip

    return [*inputs, *params], reference


def _original(text: str, images: Sequence[Tensor | None], index: int) -> Tensor:
    t = images[index]
    if t is not None:
        return t
    program = decode(text)
    for step in program.forward:
        if isinstance(step, Copy) and step.source.buffer == index:
            output = images[step.to.buffer]
            if output is not None and program.buffers[step.to.buffer].kind == "output":
                return output[:, step.to.start : step.to.stop]
    raise RuntimeError(f"stage: its second derivatives need inputs[{index}], which was not kept")


_FORMULA = node.Formula(_save, _gradients, _twin)
node.register("stage", {"": _fake, "_backward": _fake_backward}, _FORMULA, triton=False)
