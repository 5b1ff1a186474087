"""Cuts the largest regions out of a trace that a stage can express, and makes graphs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from csp_kernels.fusion.memory import kept_as_they_are
from csp_kernels.fusion.trace import Operation, Trace, Value
from csp_kernels.ops.stage import unsupported
from csp_kernels.stage.activated import activated_once
from csp_kernels.stage.build import Builder
from csp_kernels.stage.graph import Graph, Read
from csp_kernels.stage.residual_block import part
from csp_kernels.vocabulary import COSTLY


@dataclass(frozen=True)
class Region:
    """operations: their numbers in the trace. holders: paths of the modules that hold the parameters of the graph, in
    its order. inputs, outputs: values. On images of trace.SIZE: flops: of its convolutions; size: height and width of
    its inputs; kept: numbers that autograd keeps of the operations as they are."""

    operations: tuple[int, ...]
    graph: Graph
    holders: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: int
    size: tuple[int, int]
    kept: int


def returned(trace: Trace) -> set[int]:
    """Values that forward returns."""
    return {leaf.number for leaf in tree_flatten(trace.result)[0] if isinstance(leaf, Value)}


def cut(trace: Trace) -> tuple[list[Region], list[str]]:
    """The regions, and why others with convolutions are none, in words. Without a convolution a norm and a maximum make
    one: what is between them is not written then."""
    uses = _Uses(trace)
    regions: list[Region] = []
    reasons: list[str] = []
    waiting = uses.components()
    while waiting:
        numbers = waiting.pop(0)
        operations = [trace.operations[i] for i in numbers]
        kinds = {op.kind for op in operations}
        if "conv" not in kinds and not {"norm", "max_pool"} <= kinds:
            continue
        if "conv" in kinds and not _pays(operations, trace):
            (conv,) = (op for op in operations if op.kind == "conv")
            reasons.append(f"{conv.path}: one convolution, which is as fast as it is{uses.synchronised(conv)}")
            continue
        try:
            regions.append(_Region(trace, uses, numbers).made())
        except _Sizes:
            parts = uses.components(within=numbers)
            waiting = [*parts, *waiting] if len(parts) > 1 else waiting
            reasons += [f"{operations[0].path}: its inputs differ in size"] * (len(parts) == 1)
        except ValueError as error:
            reasons.append(f"{operations[0].path or operations[0].frame}: {error}")
    return regions, reasons


def _pays(operations: Sequence[Operation], trace: Trace) -> bool:
    """Whether a stage of them is faster than they are (docs/fusion.md): not one convolution alone, but for a 3x3 with
    stride 2 of float32, and with what follows it one with stride 1 of enough channels or with stride 2 of few, and a
    1x1 with a join or an average."""
    convs = [op for op in operations if op.kind == "conv"]
    if len(convs) > 1:
        return True
    options, channels = convs[0].options, trace.shapes[convs[0].inputs[0]][1]
    if options["groups"] > 1:
        return False
    if options["kernel"] == 1:
        return any(op.kind in ("cat", "avg_pool", "add") for op in operations)
    if options["stride"] == 2 and channels >= 32 and _is_float32(trace.modules[convs[0].path]):
        return True
    return len(operations) > 1 and (channels < 64 if options["stride"] == 2 else channels >= 16)


def _is_float32(module: Any) -> bool:
    """Whether a module computes in float32: a plan is one for autocast as it is now."""
    autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return not autocast and module.weight.dtype is torch.float32


class _Sizes(ValueError):
    """The inputs of a region differ in size."""


class _Uses:
    """Who makes a value and who reads it, and what a stage can express."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.returned = trace, returned(trace)
        self.maker = {v: i for i, op in enumerate(trace.operations) for v in op.outputs}
        self.readers: dict[int, list[int]] = {}
        for i, op in enumerate(trace.operations):
            for v in dict.fromkeys(op.inputs):
                self.readers.setdefault(v, []).append(i)
        paths = [op.path for op in trace.operations if op.kind in ("conv", "norm")]
        self.repeated = {path for path in paths if paths.count(path) > 1}  # of modules that are called again
        self.fits = [False] * len(trace.operations)
        for i in reversed(range(len(trace.operations))):
            self.fits[i] = self._fits(trace.operations[i])

    def _shrinks(self, i: int) -> bool:
        op = self.trace.operations[i]
        return self.trace.shapes[op.inputs[0]][2:] != self.trace.shapes[op.outputs[0]][2:] if op.inputs else False

    def only_reader(self, value: int) -> int | None:
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.returned else None

    def synchronised(self, conv: Operation) -> str:
        """Which norm that processes share follows it, in words; "" if none does."""
        reader = self.only_reader(conv.outputs[0])
        norm = None if reader is None else self.trace.modules.get(self.trace.operations[reader].path)
        return f"; a {type(norm).__name__} follows, which is no stage's" if isinstance(norm, nn.SyncBatchNorm) else ""

    def _fits(self, op: Operation) -> bool:
        if op.kind == "call" or (op.kind in ("conv", "norm") and op.path in self.repeated):
            return False
        if op.kind == "dropout":
            maker = self.maker.get(op.inputs[0])
            conv = None if maker is None else self.trace.operations[maker]
            return conv is not None and _drops(conv) and self.only_reader(op.inputs[0]) is not None
        if op.kind == "max_pool":
            return bool(op.options["size"] <= 3)  # larger ones are faster as they are
        if op.kind == "avg_pool":
            if self.averaged_conv(op) is not None:
                return True
            (value,) = op.outputs
            readers = [i for i in self.readers.get(value, []) if self.fits[i]]
            alone = len(readers) == len(self.readers.get(value, [])) and value not in self.returned
            return not readers or (alone and all(_averages(self.trace.operations[i]) for i in readers))
        return True

    def averaged_conv(self, op: Operation) -> Operation | None:
        """The 1x1 that an average alone reads: averages in front of it give the same, of a quarter of the products."""
        maker = self.maker.get(op.inputs[0])
        conv = None if maker is None else self.trace.operations[maker]
        if conv is None or not _averages(conv) or conv.path in self.repeated or self.only_reader(op.inputs[0]) is None:
            return None
        before = self.maker.get(conv.inputs[0])
        return None if before is not None and self.trace.operations[before].kind == "avg_pool" else conv

    def components(self, within: Sequence[int] | None = None) -> list[tuple[int, ...]]:
        """Operations of one region each: no way leads out of it and back. within: of those of one such region, where
        a new one begins behind whatever makes maps smaller."""
        levels: list[int] = []
        inside = range(len(self.trace.operations)) if within is None else within
        for i, op in enumerate(self.trace.operations):
            makers = [self.maker[v] for v in op.inputs if v in self.maker]
            ends = [self.fits[m] and not self.fits[i] if within is None else self._shrinks(m) for m in makers]
            levels.append(max((levels[m] + end for m, end in zip(makers, ends, strict=True)), default=0))
        parent = list(range(len(levels)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for value, readers in self.readers.items():
            around = ([self.maker[value]] if value in self.maker else []) + readers
            together = [i for i in around if self.fits[i] and i in inside]
            for i in together:
                same = next(j for j in together if levels[j] == levels[i])
                parent[root(i)] = root(same)
        found: dict[int, list[int]] = {}
        for i in inside:
            if self.fits[i]:
                found.setdefault(root(i), []).append(i)
        return [tuple(numbers) for numbers in found.values()]


def _drops(op: Operation) -> bool:
    """Whether dropout behind it can be part of it."""
    plain = op.kind == "conv" and op.options["kernel"] == 3 and op.options["stride"] == op.options["groups"] == 1
    return plain and not op.options["bias"]


def _averages(op: Operation) -> bool:
    """Whether averaging in front of it can be part of it."""
    plain = op.kind == "conv" and op.options["kernel"] == op.options["stride"] == op.options["groups"] == 1
    return plain and not op.options["bias"]


class _Region:
    """Makes the graph of some operations."""

    def __init__(self, trace: Trace, uses: _Uses, numbers: Sequence[int]) -> None:
        self.trace, self.uses, self.numbers, inside = trace, uses, numbers, {*numbers}
        operations = [trace.operations[i] for i in numbers]
        own = {v for op in operations for v in op.outputs}
        self.inputs = tuple(dict.fromkeys(v for op in operations for v in op.inputs if v not in own))
        self.outputs = tuple(
            v
            for op in operations
            for v in op.outputs
            if v in uses.returned or any(i not in inside for i in uses.readers.get(v, []))
        )
        shapes = [trace.shapes[v] for v in self.inputs]
        if any(shape[2:] != shapes[0][2:] or shape[0] != shapes[0][0] for shape in shapes):
            raise _Sizes
        self.build = Builder(*(shape[1] for shape in shapes))
        self.reads: dict[int, list[Read]] = {v: [self.build.read(i)] for i, v in enumerate(self.inputs)}
        self.averaged: set[int] = set()
        self.holders: list[str] = []
        self.flops = 0

    def made(self) -> Region:
        for i in self.numbers:
            op = self.trace.operations[i]
            if op.outputs[0] not in self.reads:
                self.reads[op.outputs[0]] = getattr(self, f"_{op.kind}")(op)
        for value in self.outputs:
            self.build.write(self.reads[value], value in self.averaged)
        graph = activated_once(self.build.graph())
        if reason := unsupported(graph):
            raise ValueError(reason)
        _, _, height, width = self.trace.shapes[self.inputs[0]]
        kept = kept_as_they_are([self.trace.operations[i] for i in self.numbers], self.trace.shapes)
        numbers, holders, size = tuple(self.numbers), tuple(self.holders), (height, width)
        return Region(numbers, graph, holders, self.inputs, self.outputs, self.flops, size, kept)

    def _behind(self, op: Operation, kind: str) -> Operation | None:
        """The operation of this kind that alone reads what this one gives."""
        reader = self.uses.only_reader(op.outputs[0])
        found = None if reader is None or reader not in self.numbers else self.trace.operations[reader]
        return found if found is not None and found.kind == kind else None

    def _raw(self, read: Read) -> Read:
        """What it reads as a value of its own."""
        return self.build.read(self.build.sum([read]))

    def _conv(self, op: Operation) -> list[Read]:
        given, options = self.reads[op.inputs[0]], op.options
        drop, average = self._behind(op, "dropout"), self._behind(op, "avg_pool")
        pool = op.inputs[0] in self.averaged or (average is not None and self.uses.averaged_conv(average) is op)
        self.holders.append(op.path)
        value = self.build.conv(
            given, options["out"], options["kernel"], stride=options["stride"], groups=options["groups"],
            bias=options["bias"], pool=pool, drop_rate=drop.options["p"] if drop else 0.0, name=op.path or "conv",
        )  # fmt: skip
        channels = self.trace.shapes[op.inputs[0]][1] // options["groups"]
        self.flops += 2 * prod(self.trace.shapes[op.outputs[0]][1:]) * channels * options["kernel"] ** 2
        return [self.build.read(value)]

    def _dropout(self, op: Operation) -> list[Read]:
        return self.reads[op.inputs[0]]  # it is the convolution's

    def _norm(self, op: Operation) -> list[Read]:
        raw = [read.norm is None and read.act == "identity" for read in self.reads[op.inputs[0]]]
        given = [r if is_raw else self._raw(r) for r, is_raw in zip(self.reads[op.inputs[0]], raw, strict=True)]
        norm, at, made = self.build.norm(sum(read.channels for read in given), op.path or "norm"), 0, []
        self.holders.append(op.path)
        for read in given:
            made.append(replace(read, norm=norm, at=at, act=op.options["act"], slope=op.options["slope"]))
            at += read.channels
        return made

    def _act(self, op: Operation) -> list[Read]:
        given = [read if read.act == "identity" else self._raw(read) for read in self.reads[op.inputs[0]]]
        return [replace(read, act=op.options["act"], slope=op.options["slope"]) for read in given]

    def _cat(self, op: Operation) -> list[Read]:
        return [read for value in op.inputs for read in self.reads[value]]

    def _slice(self, op: Operation) -> list[Read]:
        start, stop = op.options["start"], op.options["stop"]
        made, at = [], 0
        for read in self.reads[op.inputs[0]]:
            first, last = max(start - at, 0), min(stop - at, read.channels)
            if first < last:
                made.append(part(read, first, last))
            at += read.channels
        return made

    def _add(self, op: Operation) -> list[Read]:
        """Terms cut where the reads of either end. What a cheap activation follows is kept in front of it."""
        a, b = (self.reads[value] for value in op.inputs)
        behind = self._behind(op, "act")
        act = behind.options if behind is not None and behind.options["act"] in COSTLY else None
        made = []
        for start, stop in _pieces(a, b):
            terms = [_cut(reads, start, stop) for reads in (a, b)]
            value = self.build.sum(terms, act["act"], act["slope"]) if act else self.build.sum(terms)
            made.append(self.build.read(value))
        if act and behind is not None:
            self.reads[behind.outputs[0]] = made
        return made

    def _max_pool(self, op: Operation) -> list[Read]:
        size, stride = op.options["size"], op.options["stride"]
        return [
            self.build.read(self.build.max_pool(read, size, stride=stride)) for read in self.reads[op.inputs[0]]
        ]  # fmt: skip

    def _avg_pool(self, op: Operation) -> list[Read]:
        if self.uses.averaged_conv(op) is None:
            self.averaged.add(op.outputs[0])
        return self.reads[op.inputs[0]]


def _ends(reads: Sequence[Read]) -> list[int]:
    ends = [0]
    for read in reads:
        ends.append(ends[-1] + read.channels)
    return ends


def _pieces(a: Sequence[Read], b: Sequence[Read]) -> list[tuple[int, int]]:
    ends = sorted({*_ends(a), *_ends(b)})
    return list(pairwise(ends))


def _cut(reads: Sequence[Read], start: int, stop: int) -> Read:
    """Channels [start, stop) of reads side by side, which lie in one of them."""
    ends = _ends(reads)
    i = max(k for k, end in enumerate(ends[:-1]) if end <= start)
    return part(reads[i], start - ends[i], stop - ends[i])
