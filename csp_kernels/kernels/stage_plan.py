"""What a program says before there are tensors: which instruction is the last to touch a buffer, which gradients need
not be written, and the tables by which the numbers of its norms are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from csp_kernels.stage.program import (
    Activate,
    ActivateBackward,
    Add,
    AddBackward,
    Backward,
    Behind,
    Binding,
    Bottleneck,
    Buffer,
    Clear,
    Copy,
    Fill,
    Finish,
    Maximum,
    MaximumBackward,
    Measure,
    Place,
    Product,
    ProductBackward,
    Program,
    Segment,
    Settle,
    values_read,
)
from csp_kernels.stage.text import decode


@dataclass(frozen=True)
class FillTable:
    """columns [n] int32 of affine; sources [n] int32: of each its column of statistics, or -1 - i: column i of the
    running statistics of all frozen norms side by side."""

    columns: Tensor
    sources: Tensor


@dataclass(frozen=True)
class SettleTable:
    """Of bindings whose values have one size. rows [bindings, 3] int32: first position, channels and first column of
    each. Positions: [0, count) are columns [first, first + count) of statistics, then come channels of frozen norms,
    `positions` in all. buffer: one of that size."""

    rows: Tensor
    first: int
    count: int
    positions: int
    buffer: int


@dataclass(frozen=True)
class Step:
    """An instruction. values, gradients: the buffers whose values, and whose gradients, no later one touches. written:
    of each segment of an ActivateBackward, whether its gradient is written. behind: of a ProductBackward, what its
    gradient is computed from on load, None: it is in memory. part: of a Measure or a Finish, the channels that norms
    with batch statistics use, and what lies between them; None: there are none."""

    instruction: Backward
    values: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    written: tuple[bool, ...] = ()
    behind: Behind | None = None
    fill: FillTable | None = None
    settle: tuple[SettleTable, ...] = ()
    part: Place | None = None


@dataclass(frozen=True)
class Plan:
    """read: buffers whose values backward reads. norms: their numbers in the order of their columns of affine."""

    program: Program
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    read: frozenset[int]
    norms: tuple[int, ...]


@lru_cache(maxsize=1024)
def plan(text: str, device: torch.device) -> Plan:
    """Of a program's text (ValueError if it is none); the tables are on the device."""
    program = decode(text)
    tables = Tables(program, device)
    read = frozenset(place.buffer for step in program.backward for place in values_read(step))
    forward, backward = (tuple(_steps(steps, tables)) for steps in (program.forward, program.backward))
    return Plan(program, forward, backward, read, tables.norms)


def _steps(instructions: Sequence[Backward], tables: Tables) -> Iterator[Step]:
    last_values = {p.buffer: i for i, step in enumerate(instructions) for p in _values(step)}
    last_gradients = {p.buffer: i for i, step in enumerate(instructions) for p in _gradients(step)}
    on_load = _OnLoad(instructions, tables)
    for i, step in enumerate(instructions):
        values, gradients = (
            tuple(buffer for buffer, at in last.items() if at == i) for last in (last_values, last_gradients)
        )
        written = tuple(on_load.written(i, step)) if isinstance(step, ActivateBackward) else ()
        fill = tables.fill(step) if isinstance(step, Fill) else None
        settle = tuple(tables.settle(step)) if isinstance(step, Settle) else ()
        part = tables.part(step) if isinstance(step, (Measure, Finish)) else None
        yield Step(step, values, gradients, written, on_load.behind.get(i), fill, settle, part)


def _values(step: Backward) -> Iterator[Place]:
    """Places whose values an instruction may touch."""
    if isinstance(step, Copy):
        yield from (step.source, step.to)
    elif isinstance(step, Measure):
        yield step.source
    elif isinstance(step, Bottleneck):
        yield from (*_values(step.reduce), *_values(step.conv))
    elif isinstance(step, Product):
        yield from (*_places((*step.segments, *step.residual)), step.to)
    elif isinstance(step, (Add, Activate, Maximum)):
        yield from (*_places(step.segments), step.to)
    elif isinstance(step, ActivateBackward):
        yield from _places(step.segments)
    elif isinstance(step, (ProductBackward, AddBackward, MaximumBackward)):
        yield from (*_places(step.segments), step.of)
    elif isinstance(step, Finish):
        yield step.of


def _gradients(step: Backward) -> Iterator[Place]:
    """Places whose gradients an instruction may touch."""
    if isinstance(step, Clear):
        yield step.place
    elif isinstance(step, (ActivateBackward, ProductBackward, AddBackward, MaximumBackward)):
        yield from _places(segment for segment in step.segments if segment.gradient)
    if isinstance(step, (ProductBackward, AddBackward, MaximumBackward, Finish)):
        yield step.of


def _places(segments: Iterable[Segment]) -> Iterator[Place]:
    return (segment.place for segment in segments)


def overlap(a: Place, b: Place) -> bool:
    return a.buffer == b.buffer and a.start < b.stop and b.start < a.stop


class _OnLoad:
    """Which gradients a 1x1 computes on load from that of an output instead of reading them: what the program leaves to
    it (program.Behind), and what one output writes and nothing else adds to. The kernels take one output and a norm,
    the one that what is owed comes from: where the program leaves more to them, it is written."""

    def __init__(self, instructions: Sequence[Backward], tables: Tables) -> None:
        self.behind: dict[int, Behind] = {}  # by instruction
        self.not_written: set[tuple[int, int]] = set()  # instruction, segment
        self.also_written: list[Place] = []
        for i, step in enumerate(instructions):
            if isinstance(step, ProductBackward) and step.behind:
                one = _joined(step.behind)
                if one is not None and tables.normalise(one.segment, step.owed):
                    self.behind[i] = one
                else:
                    self.also_written.append(step.of)
            elif isinstance(step, ProductBackward) and step.conv.kernel == 1:
                self._alone(i, step, instructions[:i], tables)

    def _alone(self, index: int, step: ProductBackward, before: Sequence[Backward], tables: Tables) -> None:
        users = [
            i for i, other in enumerate(before) if any(overlap(step.of, place) for place in _gradients(other))
        ]  # fmt: skip
        writer = before[users[0]] if len(users) == 1 else None
        if not isinstance(writer, ActivateBackward) or writer.pool:
            return
        at = writer.output.start
        for k, segment in enumerate(writer.segments):
            end = at + segment.place.stop - segment.place.start
            whole = segment.place == step.of and segment.gradient == "write"
            alone = sum(overlap(step.of, other.place) for other in writer.segments) == 1
            if whole and alone and tables.normalise(segment, step.owed):
                self.behind[index] = Behind(segment, Place(writer.output.buffer, at, end))
                self.not_written.add((users[0], k))
            at = end

    def written(self, index: int, step: ActivateBackward) -> Iterator[bool]:
        for k, segment in enumerate(step.segments):
            left = any(overlap(segment.place, place) for place in self.also_written)
            yield left or (bool(segment.gradient) and (index, k) not in self.not_written)


def _joined(behind: Sequence[Behind]) -> Behind | None:
    """As one, if they lie side by side in one output and are read alike."""
    first, last = behind[0], behind[-1]
    for one, after in pairwise(behind):
        by = one.segment.place.stop - one.segment.place.start
        column = None if one.segment.column is None else one.segment.column + by
        beside = one.output.buffer == after.output.buffer and one.output.stop == after.output.start
        if not beside or replace(one.segment, place=after.segment.place, column=column) != after.segment:
            return None
    place = replace(first.segment.place, stop=last.segment.place.stop)
    return Behind(replace(first.segment, place=place), replace(first.output, stop=last.output.stop))


class Tables:
    """Where the numbers of norms are."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.sources: dict[int, int] = {}  # of columns, see FillTable
        self.buffers: dict[int, int] = {}  # of columns of statistics
        starts: dict[int, int] = {}  # of norms in affine
        frozen = 0
        running: list[int] = []
        for norm in program.norms:
            running.append(frozen)
            frozen += 0 if norm.running is None else norm.channels
        for step in (*program.forward, *program.backward):
            for b in step.bindings if isinstance(step, Fill) else ():
                starts[b.norm] = b.column - b.at
                for i in range(b.count):
                    source = -1 - running[b.norm] - b.at - i if b.statistics is None else b.statistics + i
                    self.sources[b.column + i] = source
            self._measured(step)
        self.norms = tuple(sorted(starts, key=lambda norm: starts[norm]))

    def _measured(self, step: Backward) -> None:
        if isinstance(step, (Measure, Copy, Product, Add, Maximum)) and step.statistics is not None:
            place = step.source if isinstance(step, Measure) else step.to
            columns = range(step.statistics, step.statistics + place.stop - place.start)
            self.buffers |= dict.fromkeys(columns, place.buffer)

    def normalise(self, segment: Segment, owed: int | None) -> bool:
        """Whether a segment has a norm, and it uses the statistics from column `owed` on, None: any."""
        if segment.column is None:
            return False
        count = segment.place.stop - segment.place.start
        return owed is None or all(self.sources.get(segment.column + i) == owed + i for i in range(count))

    def part(self, step: Measure | Finish) -> Place | None:
        """See Step."""
        place, first = (step.source, step.statistics) if isinstance(step, Measure) else (step.of, step.owed)
        if first is None:
            return None
        columns = set(self.sources.values())
        used = [i for i in range(place.start, place.stop) if first + i - place.start in columns]
        return Place(place.buffer, used[0], used[-1] + 1) if used else None

    def fill(self, step: Fill) -> FillTable:
        columns = [b.column + i for b in step.bindings for i in range(b.count)]
        return FillTable(self._numbers(columns), self._numbers([self.sources[c] for c in columns]))

    def settle(self, step: Settle) -> Iterator[SettleTable]:
        buffers = self.program.buffers
        found = {b.statistics: self.buffers[b.statistics] for b in step.bindings if b.statistics is not None}
        for size in dict.fromkeys(buffers[i].size for i in found.values()):
            alike = [b for b in step.bindings if b.statistics is not None and _has(buffers, found[b.statistics], size)]
            yield self._settle(alike, next(i for i in found.values() if _has(buffers, i, size)))
        frozen = [b for b in step.bindings if b.statistics is None]
        if frozen:
            yield self._settle(frozen, 0)

    def _settle(self, bindings: Sequence[Binding], buffer: int) -> SettleTable:
        trained = [(b.statistics, b.statistics + b.count) for b in bindings if b.statistics is not None]
        first = min((start for start, _ in trained), default=0)
        count = max((stop for _, stop in trained), default=0) - first
        rows: list[int] = []
        positions = count
        for b in bindings:
            at = positions if b.statistics is None else b.statistics - first
            positions += b.count if b.statistics is None else 0
            rows += [at, b.count, b.column]
        return SettleTable(self._numbers(rows).view(-1, 3), first, count, positions, buffer)

    def _numbers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def _has(buffers: Sequence[Buffer], index: int, size: str) -> bool:
    return buffers[index].size == size
