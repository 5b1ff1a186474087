"""What a call of a layer would do: the instructions of its program, what each costs, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from csp_kernels.backends import selected
from csp_kernels.ops import _node as node
from csp_kernels.ops._program import wanted_gradients
from csp_kernels.ops._transforms import automatic
from csp_kernels.ops.stage import checked_inputs
from csp_kernels.programs import Layer, graph_of, holders_of, images_of, operator_of, program_of, recompute_of
from csp_kernels.stage.cost import Cost, costs, side
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.program import (
    Activate,
    ActivateBackward,
    Add,
    AddBackward,
    Backward,
    Bottleneck,
    Clear,
    Copy,
    Finish,
    Maximum,
    MaximumBackward,
    Measure,
    Place,
    Product,
    ProductBackward,
    Program,
    Wanted,
    values_read,
)


@dataclass(frozen=True)
class Step:
    """One instruction of a program, and what it costs on inputs of the size that was asked about.

    text: as the program prints it. parameters: names of the convolutions whose weights it uses. shape: [N, C, H, W] of
    what it writes; of what it reads where it writes gradients; () where it works on the numbers of norms alone.
    """

    text: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    flops: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Memory:
    """One buffer of a program. kind: "input", "output", "kept" for backward or "scratch" for the time of a call.

    read_again: backward reads its values (gradients of inputs and outputs are other memory, which is not listed).
    """

    name: str
    text: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    read_again: bool


@dataclass(frozen=True)
class Explanation:
    """The program that a call would run, as data; prints as tables.

    title: what was asked about. unsupported: what the kernels cannot run, so that the reference runs the whole call;
    "" if nothing. backward: empty where nothing wants a gradient.
    """

    title: str
    buffers: tuple[Memory, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    unsupported: str = ""

    @property
    def kept(self) -> tuple[Memory, ...]:
        """What forward allocates and leaves to backward, beside inputs and outputs."""
        return tuple(memory for memory in self.buffers if memory.kind == "kept")

    @property
    def kept_bytes(self) -> int:
        return sum(memory.bytes for memory in self.kept)

    @property
    def read_again(self) -> tuple[Memory, ...]:
        """Inputs and outputs that backward reads: they may not change until then, and live that long."""
        return tuple(memory for memory in self.buffers if memory.kind in ("input", "output") and memory.read_again)

    @property
    def forward_total(self) -> Step:
        return _total(self.forward)

    @property
    def backward_total(self) -> Step:
        return _total(self.backward)

    def __str__(self) -> str:
        lines = [self.title]
        if self.unsupported:
            lines.append(f"not run by the kernels, but by the reference: {self.unsupported}")
        sections = [_steps("forward", self.forward, self.forward_total)]
        if self.backward:
            sections.append(_steps("backward", self.backward, self.backward_total))
        sections.append([["buffers", "", "KiB", "", "", ""], *map(_memory, self.buffers)])
        for table in _aligned(sections):
            lines += ["", *table]
        return "\n".join([*lines, "", *self._kept_in_words()])

    def _kept_in_words(self) -> Iterator[str]:
        kept, again = self.kept, self.read_again
        yield f"kept for backward: {_sum_in_words(kept)}"
        if again:
            yield f"read again by backward: {_sum_in_words(again)}"


def explain(module: nn.Module, *inputs: Tensor | Sequence[Tensor] | None) -> Explanation:
    """The program that `module(*inputs)` would compile and run now, and what its instructions cost; nothing is run.

    module: csp.DenseBlock, PostDenseBlock, TwoWayDenseBlock, CSPDenseStage, PartialTransition, Transition, ConcatConv
    or Stage; inputs: what it takes when it is called. It depends on what the call depends on: training or eval, frozen
    norms, which parameters and inputs require gradients and whether gradients are on, autocast, `recompute`. Meta
    tensors will do: sizes and dtypes are all that counts. FLOPs and bytes are counted from sizes, not measured:
    csp_kernels/stage/cost.py says what counts. Bytes that are kept are those that the kernels allocate, whose rows have
    channels in multiples of 16.
    A call that the reference runs (`unsupported`: hooks, other norms, what the kernels cannot do; or
    csp.use_backend("reference")) computes at other costs: these would be the kernels', were its children plain.
    Raises TypeError for another module, TypeError or ValueError for inputs that it does not take, RuntimeError for one
    whose convolutions are other modules, or a csp.Stage that would refuse the call for its children.
    """
    if not isinstance(module, Layer):
        *kinds, last = (f"csp.{kind.__name__}" for kind in get_args(Layer))
        raise TypeError(f"module: got {type(module).__name__}, expected {', '.join(kinds)} or {last}")
    graph = graph_of(module)
    images = checked_inputs(graph, images_of(module, inputs))
    program = program_of(module, graph, _wanted(module, graph, images))
    missing = module.holders()[1] or _elsewhere(module, images)
    names = {item.index: item.name for item in graph.order if item.kind == "conv"}
    table = _Table(program, images[0], names)
    return Explanation(_title(module, images, program), *table.rows(), missing)


def _wanted(module: Layer, graph: Graph, images: Sequence[Tensor]) -> Wanted | None:
    """The gradients of a call, as the operator chooses them; None: nobody wants any."""
    params: list[Tensor] = []
    for item, child in zip(graph.order, holders_of(module, graph), strict=True):
        found = [getattr(child, name, None) for name in ("weight", "bias")]
        found = found if item.kind == "norm" or found[1] is not None else found[:1]
        params += [images[0].new_empty(0) if p is None else p for p in found]  # None: of a norm without affine
    wants = [t.requires_grad for t in (*images, *params)]
    return wanted_gradients(graph, wants) if node.wants_gradients(*images, *params) else None


def _elsewhere(module: Layer, images: Sequence[Tensor]) -> str:
    """Why no kernels run this call on the device of its inputs, in words; "" if they do."""
    device = images[0].device.type
    if device in ("cpu", "meta") or (device == "cuda" and selected() in ("native", "triton")):
        return ""
    if device == "cuda" and automatic(operator_of(module), images, list(module.parameters())) != "reference":
        return ""
    if device == "cuda":
        return "the inputs are on cuda, where kernels have to be chosen or measured: csp.use_backend('triton')"
    return f"the inputs are on {device}, for which there are no kernels"


class _Table:
    """A program on inputs of the size and dtype of x; names: of the convolutions, by node."""

    def __init__(self, program: Program, x: Tensor, names: dict[int, str]) -> None:
        self.program, self.x, self.names = program, x, names

    def rows(self) -> tuple[tuple[Memory, ...], tuple[Step, ...], tuple[Step, ...]]:
        """Buffers, forward, backward."""
        program, (batch, _, height, width) = self.program, self.x.shape
        again = {place.buffer for step in program.backward for place in values_read(step)}
        buffers = tuple(self.memory(i, i in again) for i in range(len(program.buffers)))
        forward, backward = costs(program, batch, height, width)
        return buffers, self.steps(program.forward, forward), self.steps(program.backward, backward)

    def memory(self, index: int, read_again: bool) -> Memory:
        buffer = self.program.buffers[index]
        shape = self.shape(Place(index, 0, buffer.channels))
        channels = buffer.channels if buffer.kind in ("input", "output") else node.padded(buffer.channels)
        size = shape[0] * channels * shape[2] * shape[3] * self.x.element_size()
        return Memory(f"b{index}", str(buffer), buffer.kind, shape, size, read_again)

    def steps(self, steps: Sequence[Backward], counted: Sequence[Cost]) -> tuple[Step, ...]:
        return tuple(self.step(step, cost) for step, cost in zip(steps, counted, strict=True))

    def step(self, step: Backward, cost: Cost) -> Step:
        names = tuple(self.names[i] for i in _nodes(step))
        place, size = _place(step), self.x.element_size()
        shape = () if place is None else self.shape(place)
        return Step(str(step), names, shape, cost.flops, cost.read * size, cost.written * size)

    def shape(self, place: Place) -> tuple[int, ...]:
        batch, _, *pixels = self.x.shape
        size = self.program.buffers[place.buffer].size
        return (batch, place.stop - place.start, *(side(size, n) for n in pixels))


def _nodes(step: Backward) -> tuple[int, ...]:
    """Of the convolutions whose weights an instruction uses."""
    if isinstance(step, Bottleneck):
        return *step.reduce.nodes, *step.conv.nodes
    return step.nodes if isinstance(step, (Product, ProductBackward)) else ()


def _place(step: Backward) -> Place | None:
    """What an instruction writes; what it reads where it writes gradients; None: the numbers of norms alone."""
    if isinstance(step, (Copy, Product, Add, Activate, Maximum)):
        return step.to
    if isinstance(step, Bottleneck):
        return step.conv.to
    if isinstance(step, Measure):
        return step.source
    if isinstance(step, Clear):
        return step.place
    if isinstance(step, ActivateBackward):
        return step.output
    if isinstance(step, (ProductBackward, AddBackward, MaximumBackward, Finish)):
        return step.of
    return None


# --- as text ---


def _title(module: Layer, images: Sequence[Tensor], program: Program) -> str:
    shapes = ", ".join(str(list(x.shape)) for x in images)
    wanted = program.wanted
    counts = [(len(wanted.inputs), "input"), (len(wanted.nodes), "convolution"), (len(wanted.norms), "norm")]
    words = ", ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counts if n)
    dtype = str(images[0].dtype).removeprefix("torch.")
    mode = "training" if module.training else "eval"
    return (
        f"csp.{type(module).__name__}, {mode}, recompute={recompute_of(module)!r}: inputs {shapes} {dtype}, "
        f"gradients of {words or 'nothing'}"
    )


def _total(steps: Sequence[Step]) -> Step:
    flops, read, written = (sum(getattr(step, name) for step in steps) for name in _NUMBERS)
    return Step("total", (), (), flops, read, written)


_NUMBERS = ("flops", "bytes_read", "bytes_written")


def _steps(direction: str, steps: Sequence[Step], total: Step) -> list[list[str]]:
    lines = [[direction, "MFLOPs", "KiB read", "KiB written", "weights of", "instruction"]]
    for step in steps:
        numbers = [_scaled(step.flops, 1e6), _scaled(step.bytes_read, 1024), _scaled(step.bytes_written, 1024)]
        lines.append([_shape(step.shape), *numbers, "+".join(step.parameters), step.text])
    numbers = [_scaled(total.flops, 1e6), _scaled(total.bytes_read, 1024), _scaled(total.bytes_written, 1024)]
    return [*lines, ["total", *numbers, "", ""]]


def _scaled(number: int, unit: float) -> str:
    return f"{number / unit:,.1f}" if number else ""


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]" if shape else ""


def _memory(memory: Memory) -> list[str]:
    """In the columns of the instructions."""
    return [_shape(memory.shape), "", _scaled(memory.bytes, 1024), "", f"{memory.name} = {memory.text}", ""]


def _aligned(tables: Sequence[list[list[str]]]) -> list[list[str]]:
    """Columns of one width in all tables: numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*(row for table in tables for row in table), strict=True)]
    made = []
    for table in tables:
        rows = [
            [f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:4], widths[1:4]), f"{row[4]:<{widths[4]}}", row[5]]
            for row in table
        ]
        made.append(["  ".join(row).rstrip() for row in rows])
    return made


def _sum_in_words(memories: Sequence[Memory]) -> str:
    if not memories:
        return "nothing"
    size = sum(memory.bytes for memory in memories) / 1024
    return f"{size:,.1f} KiB in {', '.join(f'{memory.name} ({memory.text})' for memory in memories)}"
