"""From a graph to a program: forward in the order of the nodes, backward in the reverse order by one rule.

Every read of a value adds scale * dn to the value's gradient G and to the sums of its norm, dn being the gradient
behind the norm. When a node is reached, all readers of its value have run: the norms settle on its channels, and its
gradient is G - owed_mean - (x - mean) * owed_slope. So a norm may belong to a reader or a producer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from csp_kernels.stage.behind import outputs_behind
from csp_kernels.stage.check import check
from csp_kernels.stage.fold import Folded, fold, with_bottlenecks, with_residuals
from csp_kernels.stage.graph import Conv, Graph, MaxPool, Node, Read, Sum
from csp_kernels.stage.place import Layout, lay_out, merged, norm_columns
from csp_kernels.stage.program import (
    Activate,
    ActivateBackward,
    Add,
    AddBackward,
    Backward,
    Binding,
    Buffer,
    Clear,
    Copy,
    Fill,
    Finish,
    Forward,
    Maximum,
    MaximumBackward,
    Measure,
    Norm,
    Place,
    Product,
    ProductBackward,
    Program,
    Segment,
    Settle,
    Wanted,
    Weight,
    values_read,
)
from csp_kernels.vocabulary import RECOMPUTE


@lru_cache(maxsize=1024)
def compile_stage(
    graph: Graph, frozen: tuple[bool, ...], wanted: Wanted | None = None, recompute: str = "none"
) -> Program:
    """The program of a graph; wanted None, or nothing in it: no gradients, nothing is kept.

    frozen: norms that use running statistics. recompute: what backward computes again instead of keeping it,
    "none", "bottleneck" (1x1 convolutions that 3x3 ones alone read) or "all" (all but inputs and outputs).
    Raises ValueError for bad arguments.
    """
    check(graph)
    if len(frozen) != len(graph.norms):
        raise ValueError(f"frozen: got {len(frozen)} items, expected {len(graph.norms)}, one a norm")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(RECOMPUTE)}")
    wanted = None if wanted == Wanted() else wanted
    sources, columns = _sources(graph), norm_columns(graph)
    if wanted is None:
        graph, folded = fold(graph, frozen, columns)
    else:
        folded = {}
    layout = lay_out(graph, frozen, columns, folded, wanted is not None, recompute)
    common = _Common(graph, layout, frozen, sources, folded)
    forward = _forward(common)
    if wanted is None:
        forward = with_residuals(with_bottlenecks(forward, layout.buffers), layout.buffers)
    backward = _BackwardPass(common, wanted).run() if wanted else ()
    statistics = sum(graph.channels[value] for value in layout.statistics)
    weights, norms = _parameters(graph, frozen)
    wanted = wanted or Wanted()
    buffers = _kept_if_read(layout.buffers, backward)
    return Program(buffers, statistics, sum(graph.norms), weights, norms, wanted, forward, backward)


def _kept_if_read(buffers: Sequence[Buffer], backward: Sequence[Backward]) -> tuple[Buffer, ...]:
    """What backward does not read, as in front of the first weight that is trained, is scratch memory of forward."""
    read = {place.buffer for step in backward for place in values_read(step)}
    counts = dict.fromkeys(("kept", "scratch"), 0)
    made = []
    for i, buffer in enumerate(buffers):
        kind = "scratch" if buffer.kind == "kept" and i not in read else buffer.kind
        made.append(replace(buffer, kind=kind, index=counts.get(kind, buffer.index)))
        if kind in counts:
            counts[kind] += 1
    return tuple(made)


def _parameters(graph: Graph, frozen: Sequence[bool]) -> tuple[tuple[Weight | None, ...], tuple[Norm, ...]]:
    weights: dict[int, Weight] = {}
    norms: dict[int, Norm] = {}
    position = 0
    for item in graph.order:
        node = graph.nodes[item.index] if item.kind == "conv" else None
        if isinstance(node, Conv):
            in_channels = node.in_channels // node.groups
            weights[item.index] = Weight(position, node.out_channels, in_channels, node.kernel, node.bias)
            position += 1 + node.bias
        else:
            running = 2 * sum(frozen[: item.index]) if frozen[item.index] else None
            norms[item.index] = Norm(position, graph.norms[item.index], running)
            position += 2
    return tuple(weights.get(i) for i in range(len(graph.nodes))), tuple(norms[i] for i in range(len(graph.norms)))


class _Common:
    """What both directions look up."""

    def __init__(
        self, graph: Graph, layout: Layout, frozen: Sequence[bool], sources: Sequence[Sequence[tuple[int, int]]],
        folded: dict[int, Folded],
    ) -> None:  # fmt: skip
        self.graph, self.layout, self.frozen, self.folded = graph, layout, frozen, folded
        dropping = [i for i, node in enumerate(graph.nodes) if isinstance(node, Conv) and node.drop_rate > 0]
        self.drops = {node: i for i, node in enumerate(dropping)}
        self.bindings: dict[int, tuple[Binding, ...]] = dict.fromkeys(range(len(graph.channels)), ())
        for norm, channels in enumerate(sources):
            for value, binding in self._runs(norm, channels):
                self.bindings[value] += (binding,)

    def _runs(self, norm: int, sources: Sequence[tuple[int, int]]) -> list[tuple[int, Binding]]:
        """A norm's channels that normalise consecutive channels of one value, with the value."""
        starts = [i for i, (v, c) in enumerate(sources) if i == 0 or sources[i - 1] != (v, c - 1)]
        made = []
        for start, stop in zip(starts, [*starts[1:], len(sources)], strict=True):
            value, channel = sources[start]
            statistics = None if self.frozen[norm] else self.layout.statistics[value] + channel
            column = self.layout.columns[norm] + start
            made.append((value, Binding(norm, start, stop - start, column, statistics)))
        return made

    def fill(self, value: int, again: bool = False) -> list[Fill]:
        """Affine columns that wait for a value's statistics; again: for backward, with those that do not."""
        bindings = tuple(b for b in self.bindings[value] if again or b.statistics is not None)
        return [Fill(bindings)] if bindings else []

    def compute(self, nodes: tuple[int, ...], again: bool = False) -> Forward:
        """The instruction of a node, or of siblings; again: without statistics, which are there."""
        node, to = self.graph.nodes[nodes[0]], self.place(nodes)
        statistics = None if again else self.layout.statistics.get(self.graph.value(nodes[0]))
        if isinstance(node, Conv):
            segments, drop = self.layout.segments(node.reads), self.drops.get(nodes[0])
            product = Product(nodes, self.conv(nodes, node), segments, to, statistics, drop)
            through = self.folded.get(nodes[0])
            if through is None:
                return product
            return replace(product, column=through.column, act=through.act, slope=through.slope)
        if isinstance(node, MaxPool):
            return Maximum(nodes[0], self.layout.segments(node.reads), to, node.size, node.stride, statistics)
        segments = tuple(self.layout.segment(read) for read in node.reads)  # they are added, not side by side
        return Add(nodes[0], segments, to, node.act, node.slope if node.act == "leaky_relu" else 0.0, statistics)

    def values(self, nodes: Sequence[int]) -> list[int]:
        return [self.graph.value(index) for index in nodes]

    def place(self, nodes: Sequence[int]) -> Place:
        """Of all their values."""
        places = [self.layout.places[value] for value in self.values(nodes)]
        return Place(places[0].buffer, places[0].start, places[-1].stop)

    def conv(self, nodes: Sequence[int], first: Conv) -> Conv:
        place = self.place(nodes)
        pool = first.pool or nodes[0] in self.layout.pooled
        return replace(first, reads=(), out_channels=place.stop - place.start, pool=pool)


def _sources(graph: Graph) -> list[list[tuple[int, int]]]:
    """For each norm, value and channel that each of its channels normalises."""
    found: list[dict[int, tuple[int, int]]] = [{} for _ in graph.norms]
    for _, user in graph.users():
        for read in user.reads:
            if read.norm is not None:
                found[read.norm] |= {read.at + k: (read.value, read.start + k) for k in range(read.channels)}
    return [[channels[at] for at in sorted(channels)] for channels in found]


# --- forward ---


def _forward(common: _Common) -> tuple[Forward, ...]:
    graph, layout = common.graph, common.layout
    steps: list[Forward] = []
    fixed = tuple(b for bindings in common.bindings.values() for b in bindings if b.statistics is None)
    if fixed:
        steps.append(Fill(fixed))
    for value in range(len(graph.inputs)):
        place, statistics = layout.places[value], layout.statistics.get(value)
        if value in layout.copies:
            steps.append(Copy(layout.copies[value], place, statistics))
        elif statistics is not None:
            steps.append(Measure(place, statistics))
        steps += common.fill(value)
    for nodes in layout.siblings:
        steps.append(common.compute(nodes))
        for value in common.values(nodes):
            steps += common.fill(value)
    for i, write in enumerate(graph.outputs):
        for start, reads in layout.runs(i, write, held=False):
            to = _part(len(graph.inputs) + i, start, reads)
            steps.append(Activate(layout.segments(reads), to, write.pool))
    return tuple(steps)


def _part(buffer: int, start: int, reads: Sequence[Read]) -> Place:
    return Place(buffer, start, start + sum(read.channels for read in reads))


# --- backward ---


class _BackwardPass:
    def __init__(self, common: _Common, wanted: Wanted) -> None:
        self.common, self.wanted = common, wanted
        self.graph, self.layout = common.graph, common.layout
        self.steps: list[Backward] = []
        self.behind = outputs_behind(self.graph, self.layout)
        self.left = {value for nodes in self.behind for value in common.values(nodes)}  # no gradients in memory
        self.written = [[False] * channels for channels in self.graph.channels]
        self.there = [self.layout.buffers[place.buffer].kind != "scratch" for place in self.layout.places]
        self.needs = [value in wanted.inputs for value in range(len(self.graph.inputs))]
        for index, node in enumerate(self.graph.nodes):
            self.needs.append(index in wanted.nodes or any(self._wants(read) for read in node.reads))

    def _wants(self, read: Read) -> bool:
        """Something behind this read wants a gradient."""
        return self.needs[read.value] or self._sums(read)

    def _sums(self, read: Read) -> bool:
        """Sums of its norm are wanted: for parameters, or for what the norm owes."""
        if read.norm is None:
            return False
        return read.norm in self.wanted.norms or (self.needs[read.value] and not self.common.frozen[read.norm])

    def run(self) -> tuple[Backward, ...]:
        bindings = tuple(b for value in range(len(self.graph.channels)) for b in self.common.bindings[value])
        if bindings:
            self.steps.append(Fill(bindings))
        for i in reversed(range(len(self.graph.outputs))):
            self._output(i)
        for nodes in reversed(self.layout.siblings):
            values = self.common.values(nodes)
            for value in values:
                self._settle(value)
            if any(self.needs[value] for value in values):
                self._node(nodes, self.graph.nodes[nodes[0]])
        for value in range(len(self.graph.inputs)):
            self._settle(value)
            if self.needs[value]:
                self._clear(value, range(self.graph.channels[value]))
                self.steps.append(Finish(value, self.layout.places[value], self._owed(value)))
        return tuple(self.steps)

    def _output(self, index: int) -> None:
        write = self.graph.outputs[index]
        for held in (True, False):
            for start, reads in self.layout.runs(index, write, held):
                if any(self._wants(read) for read in reads):
                    self._compute_again(reads)
                    segments = merged(self._targets(reads))
                    place = _part(len(self.graph.inputs) + index, start, reads)
                    self.steps.append(ActivateBackward(segments, place, write.pool and not held))

    def _node(self, nodes: tuple[int, ...], node: Node) -> None:
        self._compute_again(node.reads)
        place, owed = self.common.place(nodes), self._owed(self.graph.value(nodes[0]))
        behind = self.behind.get(nodes, ())
        for value in self.common.values(nodes) if not behind else ():
            self._clear(value, range(self.graph.channels[value]))
        segments = self._targets(node.reads)
        if isinstance(node, Sum):
            slope = node.slope if node.act == "leaky_relu" else 0.0
            self.steps.append(AddBackward(tuple(segments), place, node.act, slope, owed))
        elif isinstance(node, MaxPool):
            self.steps.append(MaximumBackward(tuple(segments), place, node.size, node.stride, owed))
        else:
            conv, drop = self.common.conv(nodes, node), self.common.drops.get(nodes[0])
            wanted = tuple(index for index in nodes if index in self.wanted.nodes)
            self.steps.append(ProductBackward(nodes, conv, merged(segments), place, owed, wanted, drop, behind))

    def _settle(self, value: int) -> None:
        bindings = tuple(b for b in self.common.bindings[value] if self._settles(b, value))
        if bindings:
            self.steps.append(Settle(bindings))

    def _settles(self, binding: Binding, value: int) -> bool:
        return binding.norm in self.wanted.norms or (self.needs[value] and binding.statistics is not None)

    def _owed(self, value: int) -> int | None:
        return self.layout.statistics.get(value)

    def _targets(self, reads: Sequence[Read]) -> list[Segment]:
        """With what becomes of their gradients: each is written by the first that has one, and added to by others."""
        made = []
        for read in reads:
            gradient = ""
            if self.needs[read.value] and read.value not in self.left:
                channels = range(read.start, read.stop)
                written = self.written[read.value]
                gradient = "add" if any(written[c] for c in channels) else "write"
                if gradient == "add":
                    self._clear(read.value, channels)
                for c in channels:
                    written[c] = True
            made.append(replace(self.layout.segment(read), gradient=gradient, sums=self._sums(read)))
        return made

    def _clear(self, value: int, channels: range) -> None:
        """Zeros in what no reader has written of these channels."""
        written, place = self.written[value], self.layout.places[value]
        missing = [c for c in channels if not written[c]]
        starts = [c for c in missing if c - 1 not in missing]
        stops = [c + 1 for c in missing if c + 1 not in missing]
        for start, stop in zip(starts, stops, strict=True):
            self.steps.append(Clear(Place(place.buffer, place.start + start, place.start + stop)))
        for c in missing:
            written[c] = True

    def _compute_again(self, reads: Sequence[Read]) -> None:
        """Values that were not kept, with those that they are made of, unless they are there. A node's own value is
        there when its turn comes: what reads it had it computed."""
        missing: set[tuple[int, ...]] = set()
        waiting = [read.value for read in reads]
        while waiting:
            value = waiting.pop()
            if not self.there[value]:
                index = value - len(self.graph.inputs)
                nodes = next(nodes for nodes in self.layout.siblings if index in nodes)
                for sibling in self.common.values(nodes):
                    self.there[sibling] = True
                missing.add(nodes)
                waiting += [read.value for read in self.graph.nodes[index].reads]
        for nodes in sorted(missing):
            self.steps.append(self.common.compute(nodes, again=True))
