"""Runs programs: torch.ops.csp_kernels.stage with fake kernels and autograd, which every operator of a graph calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csp_kernels._tracing import cached_constant
from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops import _packed as packed
from csp_kernels.ops._repeated import Call
from csp_kernels.reference.stage import stage as reference_stage
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.cost import side
from csp_kernels.stage.graph import Conv, Graph, Parameters, Read
from csp_kernels.stage.program import Add, Buffer, Copy, Fill, Maximum, Measure, Product, Program, Wanted, values_read
from csp_kernels.stage.text import decode, encode


class Names(NamedTuple):
    """What errors call the tensors of an operator: one for each input and output."""

    inputs: Sequence[str]
    outputs: Sequence[str]


class Part(NamedTuple):
    """Channels whose moments are asked for: all that a norm normalises, or those of a value from `start` on.

    kind: "norm" or "value"; number: which one of the graph's.
    """

    kind: str
    number: int
    start: int = 0


class Moments(NamedTuple):
    """Batch means and variances of a call: stats [2, columns] of the program of this text."""

    text: str
    stats: Tensor
    learn: Callable[[Callable[[Tensor], Tensor]], None] | None = None  # of a call that may be made again

    def of(self, parts: tuple[Part, ...] | None) -> Tensor:
        """[2, channels] of the parts side by side (None: of all norms); 0 where no norm needs them."""
        if self.learn is not None:
            text = self.text  # what is learned outlives the call: it may hold none of its tensors
            self.learn(lambda stats: Moments(text, stats).of(parts))
        # what traces (torch.compile, FakeTensorMode, make_fx) must not leave its tensors to real calls
        traced = torch.compiler.is_compiling() or type(self.stats) is not Tensor
        if not traced and not self.stats.shape[1]:  # inference: no norm needs any
            return self.stats.new_zeros((2, len(_columns(self.text, parts))))
        where = _where if traced else _known_where
        index, nothing = where(self.text, parts, self.stats.shape[1], self.stats.device)
        return (self.stats if nothing is None else torch.cat((self.stats, nothing), 1)).index_select(1, index)


Source = (
    Graph | tuple[Any, ...]
)  # a graph, or a builder and its arguments: torch.compile passes on no graph it was given


@lru_cache(maxsize=1024)
def built(source: Source) -> Graph:
    return source if isinstance(source, Graph) else source[0](*source[1:])


def run(
    source: Source,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    running: Sequence[Tensor],
    frozen: list[bool],
    eps: list[float],
    names: Names,
    *,
    backend: str,
    recompute: str = "none",
    seed: Tensor | None = None,
    call: Call | None = None,
) -> tuple[list[Tensor], Moments]:
    """The outputs of a graph in the memory format of inputs[0], by the kernels; all arguments have been checked.

    params: none missing, in the dtype of sums. backend: "native" or "triton". call: what is learned of it, for the
    next one like it. running, frozen, eps, recompute: see `csp.ops.stage`.
    """
    x = inputs[0]
    channels_last = checks.is_channels_last(x)
    used = [node.in_place(t) for t in inputs]
    wants = tuple(t.requires_grad for t in (*used, *params)) if node.wants_gradients(*used, *params) else ()
    text = _program(source, tuple(frozen), wants, recompute)
    fixed = node.fixed(running, checks.ACCUMULATE[x.dtype], bool(wants))
    op = torch.ops.csp_kernels.stage.default
    arguments = used, params, fixed, seed, text, eps, node.winograd(x.dtype, backend)
    if not wants:
        shares = packed.SHARES and backend == "native" and x.is_cpu and not torch.compiler.is_compiling()
        found = packed.inference(used, params, fixed, text, eps, arguments[-1]) if shares else None
        y, stats = found or node.without_gradients(op, arguments)[::2]
        learn = None if found is None or call is None else partial(call.learned, params, fixed, text, eps)
        return [checks.formatted(t, channels_last) for t in y], Moments(text, stats, learn)
    if not torch.compiler.is_compiling():
        packed.forget(params)
    y, _, stats = node.call(op, _FORMULA, arguments)
    outputs = [
        checks.formatted(t if depends else t.detach(), channels_last)
        for t, depends in zip(y, _depend(source, wants), strict=True)
    ]
    given = [*inputs, *outputs]
    for i in read_again(text):
        node.watch(y[0], [*names.inputs, *names.outputs][i], given[i], [*used, *y][i])
    return outputs, Moments(text, stats)


_GRAPHS: dict[
    str, tuple[Graph, tuple[bool, ...]]
] = {}  # of programs that ran with gradients, for their second derivatives


@cached_constant
def read_again(text: str) -> tuple[int, ...]:
    """Inputs, and behind them outputs, whose values backward reads: the others need not be kept."""
    program = decode(text)
    found = {place.buffer for step in program.backward for place in values_read(step)}
    return tuple(i for i in sorted(found) if program.buffers[i].kind in ("input", "output"))


def wanted_gradients(graph: Graph, wants: Sequence[bool]) -> Wanted:
    """wants: of each input, then of each parameter, whether it wants a gradient."""
    inputs, params = wants[: len(graph.inputs)], wants[len(graph.inputs) :]
    nodes: list[int] = []
    norms: list[int] = []
    for item, at, end in _positions(graph):
        if any(params[at:end]):
            (norms if item.kind == "norm" else nodes).append(item.index)
    wanted = tuple(i for i, flag in enumerate(inputs) if flag)
    return Wanted(wanted, tuple(sorted(nodes)), tuple(sorted(norms)))


def _positions(graph: Graph) -> Iterator[tuple[Parameters, int, int]]:
    """Of what has parameters, in their order: which of them, from the first to the one behind the last."""
    at = 0
    for item in graph.order:
        conv = graph.nodes[item.index] if item.kind == "conv" else None
        end = at + (1 + conv.bias if isinstance(conv, Conv) else 2)
        yield item, at, end
        at = end


@cached_constant
def _program(source: Source, frozen: tuple[bool, ...], wants: tuple[bool, ...], recompute: str) -> str:
    """wants: see wanted_gradients; (): no gradients at all."""
    graph = built(source)
    text = encode(compile_stage(graph, frozen, wanted_gradients(graph, wants) if wants else None, recompute))
    if wants:
        _GRAPHS[text] = graph, frozen
    return text


# --- batch statistics ---


def _where(text: str, parts: tuple[Part, ...] | None, count: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where each channel's statistics are among `count`, and the column of zeros behind them, of channels that have
    none; None: all have."""
    columns = _columns(text, parts)
    index = torch.tensor([count if c < 0 else c for c in columns], dtype=torch.int64, device=device)
    return index, torch.zeros(2, 1, dtype=torch.float64, device=device) if min(columns, default=0) < 0 else None


_known_where = lru_cache(maxsize=1024)(_where)


@cached_constant
def _columns(text: str, parts: tuple[Part, ...] | None) -> tuple[int, ...]:
    """For each channel of the parts its column of statistics, -1: it has none."""
    program = decode(text)
    if parts is None:
        parts = tuple(Part("norm", i) for i in range(len(program.norms)))
    norms, values = _columns_of_norms(program), _columns_of_values(program)
    return tuple(c for part in parts for c in (norms if part.kind == "norm" else values)[part.number][part.start :])


def _columns_of_norms(program: Program) -> dict[int, list[int]]:
    columns = {i: [-1] * norm.channels for i, norm in enumerate(program.norms)}
    for step in program.forward:
        for b in step.bindings if isinstance(step, Fill) else ():
            if b.statistics is not None:
                columns[b.norm][b.at : b.at + b.count] = range(b.statistics, b.statistics + b.count)
    return columns


def _columns_of_values(program: Program) -> dict[int, list[int]]:
    inputs = sum(buffer.kind == "input" for buffer in program.buffers)
    channels = {i: buffer.channels for i, buffer in enumerate(program.buffers[:inputs])}
    channels |= {inputs + i: weight.out_channels for i, weight in enumerate(program.weights) if weight is not None}
    alone = [step for step in program.forward if isinstance(step, (Add, Maximum))]
    channels |= {inputs + step.node: step.to.stop - step.to.start for step in alone}
    columns = {value: [-1] * n for value, n in channels.items()}
    for step in program.forward:
        if not isinstance(step, (Copy, Measure, Product, Add, Maximum)) or step.statistics is None:
            continue
        column = step.statistics
        for value in _values(step, inputs):
            columns[value] = list(range(column, column + channels[value]))
            column += channels[value]
    return columns


def _values(step: Copy | Measure | Product | Add | Maximum, inputs: int) -> list[int]:
    """Of the graph, that an instruction takes the statistics of."""
    if isinstance(step, (Copy, Measure)):
        return [step.source.buffer]
    return [inputs + step.node] if isinstance(step, (Add, Maximum)) else [inputs + index for index in step.nodes]


# --- fake kernels ---


def _image(like: Tensor, buffer: Buffer) -> Tensor:
    return node.fake_image(like, buffer.channels, side(buffer.size, like.shape[2]), side(buffer.size, like.shape[3]))


@cached_constant
def _depend(source: Source, wants: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of each output, whether it depends on what wants a gradient; the others have none, as PyTorch has it."""
    graph = built(source)
    wanted = wanted_gradients(graph, wants)
    needs = [value in wanted.inputs for value in range(len(graph.inputs))]

    def any_of(reads: Sequence[Read]) -> bool:
        return any(needs[read.value] or read.norm in wanted.norms for read in reads)

    for index, each in enumerate(graph.nodes):
        needs.append(index in wanted.nodes or any_of(each.reads))
    return tuple(any_of(write.reads) for write in graph.outputs)


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


def _fake_inference(
    inputs: list[Tensor], params: list[Tensor], running: list[Tensor], packed: list[Tensor], program: str,
    eps: list[float], winograd: int,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """Nothing is packed for tensors without memory."""
    outputs, _, stats = _fake(inputs, params, running, None, program, eps, winograd)
    return outputs, stats, []


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
        like.new_empty_strided(shape, (0, 0, 0, 0)) if t is None else t  # nobody reads it
        for t, shape in zip(kept_images, shapes, strict=True)
    ]
    outputs = [t if kept_images[count + i] is None else node.packed(t) for i, t in enumerate(images[count:])]
    given = [
        node.packed(like.new_zeros(shape) if g is None else g) for g, shape in zip(grads, shapes[count:], strict=True)
    ]
    found = torch.ops.csp_kernels.stage_backward.default(
        given, images[:count], outputs, kept, stats, params, running, seed, text, eps, winograd
    )
    gradients: list[Tensor | None] = [None] * (count + len(params))
    there = tuple(g is not None for g in grads)
    reached = range(len(gradients)) if all(there) or text not in _GRAPHS else _reached(text, there)
    for position, gradient in zip(_gradient_positions(text), found, strict=True):
        gradients[position] = gradient if position in reached else None
    return gradients


@cached_constant
def _reached(text: str, there: tuple[bool, ...]) -> frozenset[int]:
    """Inputs and, behind them, parameters that outputs with a gradient depend on. Those of no influence get none, as
    PyTorch has it, and not zeros, by which an optimizer would decay them."""
    graph, _ = _GRAPHS[text]
    reads = [read for write, given in zip(graph.outputs, there, strict=True) if given for read in write.reads]
    nodes: set[int] = set()
    for i in reversed(range(len(graph.nodes))):
        if any(read.value == graph.value(i) for read in reads):
            nodes.add(i)
            reads += graph.nodes[i].reads
    values, norms = {read.value for read in reads}, {read.norm for read in reads}
    found = [i for i in range(len(graph.inputs)) if i in values]
    for item, at, end in _positions(graph):
        if item.index in (norms if item.kind == "norm" else nodes):
            found += range(len(graph.inputs) + at, len(graph.inputs) + end)
    return frozenset(found)


@cached_constant
def _gradient_positions(text: str) -> tuple[int, ...]:
    """Of what backward returns, among the inputs and, behind them, the parameters."""
    program = decode(text)
    count = sum(buffer.kind == "input" for buffer in program.buffers)
    return *program.wanted.inputs, *(count + i for i in _wanted_params(program))


def _twin(saved: node.Saved) -> node.Twin:
    images, (_, _, params, running, seed), (text, eps, _, count, shapes, differentiable) = saved
    if text not in _GRAPHS:
        raise RuntimeError("stage: its second derivatives need the graph, which this process has not seen: run it here")
    graph, frozen = _GRAPHS[text]
    inputs = [_original(text, images, shapes, i) for i in range(count)]
    inputs = [t if d else t.detach() for t, d in zip(inputs, differentiable, strict=True)]

    def reference(*leaves: Tensor) -> list[Tensor]:
        return reference_stage(
            graph, leaves[:count], leaves[count:], running, frozen=frozen, eps=eps, seed=seed
        )[0]  # fmt: skip

    return [*inputs, *params], reference


def _original(text: str, images: Sequence[Tensor | None], shapes: Sequence[Any], index: int) -> Tensor:
    """An input, from the output that it was copied to, if it was not kept. If backward reads it nowhere, no derivative
    depends on its values: zeros stand for it."""
    t = images[index]
    if t is not None:
        return t
    program = decode(text)
    for step in program.forward:
        if isinstance(step, Copy) and step.source.buffer == index:
            output = images[step.to.buffer]
            if output is not None and program.buffers[step.to.buffer].kind == "output":
                return output[:, step.to.start : step.to.stop]
    like = next(t for t in images if t is not None)
    return like.new_zeros(shapes[index]).requires_grad_()


_FORMULA = node.Formula(_save, _gradients, _twin)
node.register("stage", {"": _fake, "_backward": _fake_backward}, _FORMULA, {"_inference": _fake_inference})
