"""Where the values of a graph lie, and in which columns the numbers of its norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from csp_kernels.stage.check import sizes
from csp_kernels.stage.fold import Folded
from csp_kernels.stage.graph import Conv, Graph, Read, Sum, Write
from csp_kernels.stage.program import Buffer, Place, Segment


@dataclass(frozen=True)
class Layout:
    """places: of every value. copies: inputs that an output holds, and so were copied there, with their own place.

    held: of each output the reads whose values lie there, with their first channel. pooled: nodes that average what
    they read for an output that is to be averaged. statistics: first column of a value that a training norm normalises.
    columns: first column of each norm. siblings: nodes that are computed as one, the first first; every node is in one
    such tuple.
    """

    buffers: tuple[Buffer, ...]
    places: tuple[Place, ...]
    copies: dict[int, Place]
    held: tuple[dict[int, Read], ...]
    pooled: frozenset[int]
    statistics: dict[int, int]
    columns: tuple[int, ...]
    siblings: tuple[tuple[int, ...], ...]

    def runs(self, output: int, write: Write, held: bool) -> list[tuple[int, list[Read]]]:
        """Reads of an output side by side that lie there, or that do not, with the first channel of each run."""
        runs: list[tuple[int, list[Read]]] = []
        start, before = 0, False
        for read in write.reads:
            now = (start in self.held[output]) == held
            if now and not before:
                runs.append((start, []))
            if now:
                runs[-1][1].append(read)
            start, before = start + read.channels, now
        return runs

    def segments(self, reads: Sequence[Read]) -> tuple[Segment, ...]:
        """Of reads side by side: neighbours in a buffer, with the same activation and norms side by side, are one."""
        return merged([self.segment(read) for read in reads])

    def segment(self, read: Read) -> Segment:
        place = self.places[read.value]
        column = None if read.norm is None else self.columns[read.norm] + read.at
        slope = read.slope if read.act == "leaky_relu" else 0.0
        return Segment(Place(place.buffer, place.start + read.start, place.start + read.stop), column, read.act, slope)


def merged(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours that can be read as one made one."""
    made: list[Segment] = []
    for segment in segments:
        if made and (joined := _joined(made[-1], segment)):
            made[-1] = joined
        else:
            made.append(segment)
    return tuple(made)


def _joined(a: Segment, b: Segment) -> Segment | None:
    apart = a.place.buffer != b.place.buffer or a.place.stop != b.place.start
    column = None if a.column is None else a.column + a.place.stop - a.place.start
    if apart or replace(a, place=b.place, column=column) != b:
        return None
    return replace(a, place=Place(a.place.buffer, a.place.start, b.place.stop))


def lay_out(
    graph: Graph, frozen: Sequence[bool], columns: tuple[int, ...], folded: dict[int, Folded], keep: bool,
    recompute: str,
) -> Layout:  # fmt: skip
    """columns: see norm_columns. folded: see fold. keep: for backward."""
    placing = _Placing(graph, folded, keep, recompute)
    placing.into_outputs()
    placing.siblings_side_by_side()
    placing.side_by_side()
    siblings = placing.siblings()
    normalised = {read.value for _, user in graph.users() for read in user.reads if _trains(read, frozen)}
    for values in ([graph.value(i) for i in nodes] for nodes in siblings):
        normalised |= {*values} if normalised & {*values} else set()
    statistics, count = {}, 0
    for value in sorted(normalised, key=lambda v: (placing.places[v].buffer, placing.places[v].start)):
        statistics[value] = count
        count += graph.channels[value]
    places = tuple(placing.places[value] for value in range(len(graph.channels)))
    held, pooled = tuple(placing.held), frozenset(placing.pooled)
    return Layout(
        tuple(placing.buffers), places, placing.copies, held, pooled, statistics, columns, siblings
    )  # fmt: skip


def _trains(read: Read, frozen: Sequence[bool]) -> bool:
    return read.norm is not None and not frozen[read.norm]


def norm_columns(graph: Graph) -> tuple[int, ...]:
    """First column of each norm: those that one node reads side by side have columns side by side. The nodes that read
    most come first."""
    columns: dict[int, int] = {}
    end = 0
    for reads in sorted((user.reads for _, user in graph.users()), key=len, reverse=True):
        for read in reads:
            if read.norm is not None and read.norm not in columns:
                columns[read.norm] = end
                end += graph.norms[read.norm]
    return tuple(columns[norm] for norm in range(len(graph.norms)))


def _same_reads(graph: Graph) -> list[tuple[int, ...]]:
    """Nodes that could be one 1x1 convolution; every other node is alone."""
    groups: dict[object, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        alone = not isinstance(node, Conv) or node.kernel != 1 or node.groups != 1 or node.bias or node.drop_rate > 0
        groups.setdefault(i if alone else node.reads, []).append(i)  # what pools lies elsewhere: in size it differs
    return [tuple(nodes) for nodes in groups.values()]


def _bottlenecks(graph: Graph) -> set[int]:
    """Values of 1x1 that 3x3 convolutions alone read, and of 3x3 like that which themselves read bottlenecks alone."""
    others = {
        r.value for _, user in graph.users() for r in user.reads if not (isinstance(user, Conv) and user.kernel == 3)
    }
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        value = graph.value(index)
        if not isinstance(node, Conv) or value in others:
            continue
        if node.kernel == 1 or all(read.value in found for read in node.reads):
            found.add(value)
    return found


class _Placing:
    """Gives every value a place: its output's, if one holds it as it is, or one beside what it is read with."""

    def __init__(self, graph: Graph, folded: dict[int, Folded], keep: bool, recompute: str) -> None:
        self.graph, self.folded, self.keep, self.recompute = graph, folded, keep, recompute
        self.bottlenecks = _bottlenecks(graph)
        self.sizes = sizes(graph)
        inputs = [Buffer("input", i, c, "") for i, c in enumerate(graph.inputs)]
        ends = self.sizes[len(graph.channels) :]
        outputs = [
            Buffer("output", i, w.channels, size) for i, (w, size) in enumerate(zip(graph.outputs, ends, strict=True))
        ]
        self.buffers = inputs + outputs
        self.places = {i: Place(i, 0, c) for i, c in enumerate(graph.inputs)}
        self.copies: dict[int, Place] = {}
        self.held: list[dict[int, Read]] = [{} for _ in graph.outputs]
        self.pooled: set[int] = set()

    def into_outputs(self) -> None:
        """An output of whole values as they are holds them, if one of them is a node's; inputs are copied there."""
        for i, write in enumerate(self.graph.outputs):
            values = [read.value for read in write.reads]
            fresh = [v for v in values if v not in self.places]
            inputs = [v for v in values if v < len(self.graph.inputs) and v not in self.copies]
            if fresh and len({*fresh, *inputs}) == len(values) and self._holds(write):
                self.copies |= {v: self.places[v] for v in inputs}
                self._hold(i, write)
            elif write.pool:
                self._pool_first(i, write)

    def _hold(self, output: int, write: Write, only: frozenset[int] | None = None) -> None:
        """Places the values of an output's reads there; only: of these nodes' values."""
        start = 0
        for read in write.reads:
            if only is None or read.value in only:
                self.held[output][start] = read
                self.places[read.value] = Place(len(self.graph.inputs) + output, start, start + read.channels)
            start += read.channels

    def _pool_first(self, output: int, write: Write) -> None:
        """A 1x1 that this output alone reads, as it is: averaging in front is the same, and a quarter of the work."""
        counts = Counter(read.value for _, user in self.graph.users() for read in user.reads)
        values = frozenset(
            read.value
            for read in write.reads
            if counts[read.value] == 1 and read.value not in self.places and self._commutes(read)
        )
        for value in values:
            self.sizes[value] += "f"
            self.pooled.add(value - len(self.graph.inputs))
        self._hold(output, write, values)

    def _commutes(self, read: Read) -> bool:
        index = read.value - len(self.graph.inputs)
        node = self.graph.nodes[index]
        if not isinstance(node, Conv) or node.bias or node.pool or node.drop_rate:
            return False
        plain = node.kernel == node.stride == node.groups == 1
        return plain and index not in self.folded and read == Read(read.value, 0, self.graph.channels[read.value])

    def _holds(self, write: Write) -> bool:
        whole = [Read(read.value, 0, self.graph.channels[read.value]) for read in write.reads]
        return not write.pool and list(write.reads) == whole

    def siblings_side_by_side(self) -> None:
        """1x1 convolutions of the same reads, which are read once for all of them."""
        for nodes in (nodes for nodes in _same_reads(self.graph) if len(nodes) > 1):
            values = [self.graph.value(i) for i in nodes if self.graph.value(i) not in self.places]
            for kind in ("kept", "scratch"):
                self._new(kind, [v for v in values if self._kind(v) == kind])

    def siblings(self) -> tuple[tuple[int, ...], ...]:
        """Those that lie side by side."""
        found: list[tuple[int, ...]] = []
        for nodes in _same_reads(self.graph):
            start = 0
            for i, (a, b) in enumerate(zip(nodes, [*nodes[1:], None], strict=True)):
                if b is None or not self._touch(a, b):
                    found.append(nodes[start : i + 1])
                    start = i + 1
        return tuple(sorted(found))

    def _touch(self, a: int, b: int) -> bool:
        """Nodes whose values lie side by side, and what is folded into them too."""
        first, second = self.places[self.graph.value(a)], self.places[self.graph.value(b)]
        together = first.buffer == second.buffer and first.stop == second.start
        before, behind = self.folded.get(a), self.folded.get(b)
        if before is None or behind is None:
            return together and before is behind
        return together and behind == replace(before, column=before.column + first.stop - first.start)

    def side_by_side(self) -> None:
        """The longest lists of values that are read together first; what is kept and what is not never lie together."""
        groups: list[list[int]] = []
        for _, user in self.graph.users():
            values = self._together(user.reads)
            groups += [[value] for value in values] if isinstance(user, Sum) else [values]  # terms may lie anywhere
        for values in sorted(groups, key=len, reverse=True):
            missing = [v for v in values if v not in self.places]
            for kind in ("kept", "scratch"):
                self._new(kind, [v for v in missing if self._kind(v) == kind])

    def _together(self, reads: Sequence[Read]) -> list[int]:
        """Values of nodes, each once."""
        return list(dict.fromkeys(read.value for read in reads if read.value >= len(self.graph.inputs)))

    def _kind(self, value: int) -> str:
        """ "bottleneck": what lies between a 1x1 and the last 3x3 behind it is computed again."""
        again = self.recompute == "all" or (self.recompute == "bottleneck" and value in self.bottlenecks)
        return "kept" if self.keep and not again else "scratch"

    def _new(self, kind: str, values: Sequence[int]) -> None:
        """A buffer for values of one size side by side."""
        for size in dict.fromkeys(self.sizes[v] for v in values):
            alike = [v for v in values if self.sizes[v] == size]
            channels = sum(self.graph.channels[v] for v in alike)
            self.buffers.append(Buffer(kind, sum(b.kind == kind for b in self.buffers), channels, size))
            self._lay(len(self.buffers) - 1, alike)

    def _lay(self, buffer: int, values: Sequence[int]) -> None:
        start = 0
        for value in values:
            self.places[value] = Place(buffer, start, start + self.graph.channels[value])
            start += self.graph.channels[value]
