"""How a stage is computed: instructions on buffers, as data.

A buffer holds pixels x channels. Every value lies raw in some channels of one: norms and activations are applied on
load. Nothing here depends on the batch, height or width.

Arrays of numbers beside the buffers, [columns] each:
  statistics   batch mean and variance of the channels of values that a training norm normalises
  affine       of all norms' channels: what a read through a norm becomes, act((x - mean) * scale + shift); an
               instruction names the first column. Norms whose channels are read side by side have columns side by side.
  sums         backward, like affine: sums over pixels of dn and of dn * (x - mean), dn the gradient behind the norm
  owed         backward, like statistics: what training norms take off a value's gradient,
               G - owed_mean - (x - mean) * owed_slope (docs/algorithms.md)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from csp_kernels.stage.graph import Conv, Graph


@dataclass(frozen=True)
class Buffer:
    """kind: "input" and "output" with their index, "kept" for backward, "scratch". size: see check.sizes."""

    kind: str
    index: int
    channels: int
    size: str

    def __str__(self) -> str:
        return f"{self.kind}{self.index}[{self.channels}]" + (f" {self.size}" if self.size else "")


@dataclass(frozen=True)
class Place:
    """Channels [start, stop) of a buffer; of a value or several."""

    buffer: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"b{self.buffer}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Segment:
    """What is read: a place, through affine columns from `column` on (None: no norm) and an activation.

    Backward also: gradient, what becomes of the gradient of the place ("", "write", "add"); sums, whether those of the
    columns are wanted.
    """

    place: Place
    column: int | None = None
    act: str = "identity"
    slope: float = 0.0
    gradient: str = ""
    sums: bool = False

    def __str__(self) -> str:
        text = _through(str(self.place), self)
        marks = [self.gradient] * bool(self.gradient) + ["sums"] * self.sums
        return f"{text}<{' '.join(marks)}>" if marks else text


@dataclass(frozen=True)
class Binding:
    """Channels [at, at + count) of a norm: their first columns of affine, and of statistics (None: it is frozen)."""

    norm: int
    at: int
    count: int
    column: int
    statistics: int | None

    def __str__(self) -> str:
        source = "running" if self.statistics is None else f"s{self.statistics}"
        return f"norm{self.norm}[{self.at}:{self.at + self.count}] a{self.column} {source}"


@dataclass(frozen=True)
class Weight:
    """Of a convolution [out_channels, in_channels (of a group), kernel, kernel]: its number among the parameters, and
    whether its bias follows."""

    position: int
    out_channels: int
    in_channels: int
    kernel: int
    bias: bool


@dataclass(frozen=True)
class Norm:
    """Number of its weight among the parameters, its bias follows; running: that of its running mean among the running
    statistics, where the variance follows (None: it uses the batch's)."""

    position: int
    channels: int
    running: int | None


@dataclass(frozen=True)
class Wanted:
    """Gradients that somebody wants, sorted: of which inputs, of the parameters of which nodes and norms."""

    inputs: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    norms: tuple[int, ...] = ()

    @staticmethod
    def all(graph: Graph) -> Wanted:
        nodes = tuple(i for i, node in enumerate(graph.nodes) if isinstance(node, Conv))
        return Wanted(tuple(range(len(graph.inputs))), nodes, tuple(range(len(graph.norms))))


@dataclass(frozen=True)
class Copy:
    """to = source; statistics: first column of those of what is copied, None: not wanted."""

    source: Place
    to: Place
    statistics: int | None = None

    def __str__(self) -> str:
        return f"{self.to} = copy {self.source}{_statistics(self.statistics)}"


@dataclass(frozen=True)
class Measure:
    """Statistics of an input, where it lies."""

    source: Place
    statistics: int

    def __str__(self) -> str:
        return f"measure {self.source}{_statistics(self.statistics)}"


@dataclass(frozen=True)
class Fill:
    """Affine columns of norms, from statistics or running ones."""

    bindings: tuple[Binding, ...]

    def __str__(self) -> str:
        return f"fill {', '.join(map(str, self.bindings))}"


@dataclass(frozen=True)
class Product:
    """to = convolution of segments side by side, with the weights of one node of the graph or of several, one below
    the other, which read the same (conv.out_channels: of all). drop: its number among those that drop.

    Inference: to = act(norm(convolution)), through affine columns from `column` on (None: no norm) of norms that use
    running statistics. residual: of one segment at most, which is added to that.
    """

    nodes: tuple[int, ...]
    conv: Conv
    segments: tuple[Segment, ...]
    to: Place
    statistics: int | None = None
    drop: int | None = None
    column: int | None = None
    act: str = "identity"
    slope: float = 0.0
    residual: tuple[Segment, ...] = ()

    def __str__(self) -> str:
        return f"{self.to} = {' + '.join([self.result, *map(str, self.residual)])}{_statistics(self.statistics)}"

    @property
    def result(self) -> str:
        """What is written, in words."""
        return _through(f"{_conv(self.conv)} {_weights(self.nodes)}({_list(self.segments)})", self)


@dataclass(frozen=True)
class Bottleneck:
    """Inference: a 1x1 of one segment through norm and ReLU, and the 3x3 that alone reads what it gives. That is in the
    cache strip by strip and need not be written: reduce.to is memory that nothing else reads."""

    reduce: Product
    conv: Product

    def __str__(self) -> str:
        product = f"{_conv(self.conv.conv)} {_weights(self.conv.nodes)}({self.reduce.result})"
        return f"{self.conv.to} = {product}"


@dataclass(frozen=True)
class Add:
    """to = act(sum of the segments), the value of a node."""

    node: int
    segments: tuple[Segment, ...]
    to: Place
    act: str
    slope: float
    statistics: int | None = None

    def __str__(self) -> str:
        return f"{self.to} = {self.act}({' + '.join(map(str, self.segments))}){_statistics(self.statistics)}"


@dataclass(frozen=True)
class Maximum:
    """to = maximum over size x size pixels of the one segment around each `stride`-th, the value of a node; of size 2:
    over each second and the one behind it, in both directions."""

    node: int
    segments: tuple[Segment, ...]
    to: Place
    size: int
    stride: int
    statistics: int | None = None

    def __str__(self) -> str:
        return f"{self.to} = {_max(self)}({_list(self.segments)}){_statistics(self.statistics)}"


@dataclass(frozen=True)
class Activate:
    """to = segments side by side, pooled where `pool`: an output, or its part from to.start on."""

    segments: tuple[Segment, ...]
    to: Place
    pool: bool = False

    def __str__(self) -> str:
        return f"{self.to} = {'pool' if self.pool else 'activate'}({_list(self.segments)})"


@dataclass(frozen=True)
class Settle:
    """dgamma and dbeta of norms' channels, from their sums; what those with statistics owe is added up."""

    bindings: tuple[Binding, ...]

    def __str__(self) -> str:
        return f"settle {', '.join(map(str, self.bindings))}"


@dataclass(frozen=True)
class Clear:
    """The gradient of a place = 0: nothing that reads it has a gradient for it, or only for some of it."""

    place: Place

    def __str__(self) -> str:
        return f"d{self.place} = 0"


@dataclass(frozen=True)
class ActivateBackward:
    """From the gradient of an output: gradients and sums of the segments."""

    segments: tuple[Segment, ...]
    output: Place
    pool: bool = False

    def __str__(self) -> str:
        return f"{_list(self.segments)} <- d{self.output}{' pooled' if self.pool else ''}"


@dataclass(frozen=True)
class Behind:
    """What an output reads of a value, and where it lies there: the value's gradient follows from the output's,
    scale * act'(norm(value)) * d(output)."""

    segment: Segment
    output: Place

    def __str__(self) -> str:
        return f"{self.segment} of d{self.output}"


@dataclass(frozen=True)
class ProductBackward:
    """From the gradient of what a convolution gave: those of weight (and bias), and of the segments.

    owed: first column of what is taken off the gradient that is read, None: nothing. wanted: nodes whose parameters
    want gradients. behind: a 1x1 whose value outputs alone read, all of it, each from a multiple of 16 channels on and
    all through one activation: its gradient is nowhere in memory, but computed on load from theirs.
    """

    nodes: tuple[int, ...]
    conv: Conv
    segments: tuple[Segment, ...]
    of: Place
    owed: int | None
    wanted: tuple[int, ...]
    drop: int | None = None
    behind: tuple[Behind, ...] = ()

    def __str__(self) -> str:
        weights = "".join(f"dw{node}, " for node in self.wanted)
        gradient = f"({', '.join(map(str, self.behind))})" if self.behind else f"d{self.of}"
        source = f"{_conv(self.conv)} {_weights(self.nodes)} {gradient}{_owed(self.owed)}"
        return f"{weights}{_list(self.segments)} <- {source}"


@dataclass(frozen=True)
class AddBackward:
    """From the gradient of a sum: those of the segments."""

    segments: tuple[Segment, ...]
    of: Place
    act: str
    slope: float
    owed: int | None

    def __str__(self) -> str:
        return f"{_list(self.segments)} <- {self.act} sum d{self.of}{_owed(self.owed)}"


@dataclass(frozen=True)
class MaximumBackward:
    """From the gradient of a maximum: that of the pixel that it is, the first where there are several."""

    segments: tuple[Segment, ...]
    of: Place
    size: int
    stride: int
    owed: int | None

    def __str__(self) -> str:
        return f"{_list(self.segments)} <- {_max(self)} d{self.of}{_owed(self.owed)}"


@dataclass(frozen=True)
class Finish:
    """The gradient of an input = that of its place, less what is owed."""

    index: int
    of: Place
    owed: int | None

    def __str__(self) -> str:
        return f"dinput{self.index} = d{self.of}{_owed(self.owed)}"


Forward = Copy | Measure | Fill | Product | Add | Activate | Bottleneck | Maximum
Backward = Settle | Clear | ActivateBackward | ProductBackward | AddBackward | MaximumBackward | Finish | Forward


@dataclass(frozen=True)
class Program:
    """buffers, how many columns there are, and what is done on them. Backward begins with what it computes again.

    weights: of each node, None for a sum or a maximum. norms: of the graph. wanted: what backward computes.
    """

    buffers: tuple[Buffer, ...]
    statistics: int
    columns: int
    weights: tuple[Weight | None, ...]
    norms: tuple[Norm, ...]
    wanted: Wanted
    forward: tuple[Forward, ...]
    backward: tuple[Backward, ...]

    def __str__(self) -> str:
        lines = [f"b{i} = {buffer}" for i, buffer in enumerate(self.buffers)]
        lines += ["forward:", *(f"  {item}" for item in self.forward)]
        lines += ["backward:", *(f"  {item}" for item in self.backward)] if self.backward else []
        return "\n".join(lines)


def values_read(step: Backward) -> Iterator[Place]:
    """Of what an instruction of backward reads values, not gradients alone (csrc/program.h has the same rule)."""
    if isinstance(step, (Product, Add, Maximum)):  # computed again
        yield from (segment.place for segment in step.segments)
    if isinstance(step, (ProductBackward, AddBackward, MaximumBackward, Finish)) and step.owed is not None:
        yield step.of
    if isinstance(step, ProductBackward) and step.behind:
        yield step.of
    if isinstance(step, (ActivateBackward, ProductBackward, AddBackward, MaximumBackward)):
        yield from (segment.place for segment in step.segments if needs_value(step, segment))


def needs_value(step: ActivateBackward | ProductBackward | AddBackward | MaximumBackward, segment: Segment) -> bool:
    """Whether the gradients that come of this segment depend on its values."""
    if isinstance(step, MaximumBackward) and segment.gradient:
        return True
    if isinstance(step, ProductBackward) and (step.wanted or (segment.gradient and step.conv.kernel == 3)):
        return True
    if segment.sums or (isinstance(step, AddBackward) and step.act != "identity"):
        return True
    return bool(segment.gradient) and (segment.act != "identity" or segment.column is not None)


def _through(text: str, by: Segment | Product) -> str:
    """act(norm(text))"""
    act = f"{by.act} {by.slope:g}" if by.act == "leaky_relu" else by.act
    text = text if by.column is None else f"a{by.column}({text})"
    return text if by.act == "identity" else f"{act}({text})"


def _list(segments: Sequence[Segment]) -> str:
    return ", ".join(map(str, segments))


def _statistics(column: int | None) -> str:
    return "" if column is None else f" -> s{column}"


def _owed(column: int | None) -> str:
    return "" if column is None else f" - owed s{column}"


def _weights(nodes: Sequence[int]) -> str:
    return "+".join(f"w{node}" for node in nodes)


def _max(step: Maximum | MaximumBackward) -> str:
    return f"max{step.size}x{step.size}" + f" stride{step.stride}" * (step.stride > 1)


def _conv(conv: Conv) -> str:
    parts = [f"conv{conv.kernel}x{conv.kernel}"]
    parts += [f"stride{conv.stride}"] * (conv.stride > 1) + [f"groups{conv.groups}"] * (conv.groups > 1)
    parts += ["bias"] * conv.bias + ["pool"] * conv.pool + [f"drop{conv.drop_rate:g}"] * (conv.drop_rate > 0)
    return " ".join(parts)
