"""The instructions of a program's forward pass, each by the kernels that it takes. Backward runs them too, for what it
computes again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csp_kernels.kernels import activate, conv3x3, cuda, elementwise, maximum, mix, statistics
from csp_kernels.kernels.activate import RELU, Activation
from csp_kernels.kernels.launch import Geometry, Norm
from csp_kernels.kernels.stage_memory import Memory
from csp_kernels.kernels.stage_norms import Norms
from csp_kernels.kernels.stage_plan import Step
from csp_kernels.stage.program import (
    Activate,
    Add,
    AddBackward,
    Backward,
    Bottleneck,
    Copy,
    Fill,
    Maximum,
    MaximumBackward,
    Measure,
    Place,
    Product,
    ProductBackward,
    Program,
    Segment,
)
from csp_kernels.vocabulary import ACTIVATIONS


def width(place: Place) -> int:
    return place.stop - place.start


def activation(by: Segment | Product | Add | AddBackward) -> Activation:
    return Activation(ACTIVATIONS.index(by.act), by.slope)


def plain(segment: Segment) -> bool:
    """Read as it is."""
    return segment.column is None and segment.act == "identity"


def on_load(segment: Segment) -> bool:
    """Whether products read it in place, as it is or through norm and ReLU; else it is activated in scratch memory."""
    return segment.act == "relu" or plain(segment)


class Forward:
    """One call."""

    def __init__(
        self, program: Program, memory: Memory, norms: Norms, params: Sequence[Tensor], seed: Tensor | None,
        precision: str,
    ) -> None:  # fmt: skip
        """precision: of float32 products, "ieee" or "tf32"."""
        self.program, self.memory, self.norms, self.seed, self.precision = program, memory, norms, seed, precision
        self.weights = [None if w is None else params[w.position] for w in program.weights]
        self.rectified: list[Place] = []  # values that are not negative

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.step(step)
            self.memory.release(step)

    def step(self, step: Step) -> None:
        instruction = step.instruction
        if isinstance(instruction, Fill):
            assert step.fill is not None
            self.norms.fill(step.fill)
        elif isinstance(instruction, Measure):
            self.measure(instruction, step.part)
        else:
            self.compute(instruction)

    def compute(self, instruction: Backward) -> None:
        """One that computes values."""
        if isinstance(instruction, Copy):
            source, to = (self.memory.value(place) for place in (instruction.source, instruction.to))
            statistics.copy_split(source, to, self.statistics(instruction.statistics, instruction.to))
        elif isinstance(instruction, Product):
            self.product(instruction)
        elif isinstance(instruction, Bottleneck):
            self.bottleneck(instruction)
        elif isinstance(instruction, Add):
            terms, out = self.terms(instruction.segments), self.memory.value(instruction.to)
            into = self.statistics(instruction.statistics, instruction.to)
            elementwise.add(terms, activation(instruction), out, into)
        elif isinstance(instruction, Activate):
            self.activate(instruction)
        elif isinstance(instruction, Maximum):
            self.maximum(instruction)
        else:
            raise TypeError(f"program: got {type(instruction).__name__}, expected an instruction of this pass")

    def measure(self, step: Measure, part: Place | None) -> None:
        """part: see Step."""
        if part is not None:
            into = self.statistics(step.statistics + part.start - step.source.start, part)
            statistics.copy_split(self.memory.value(part), None, into)

    def statistics(self, column: int | None, place: Place) -> Tensor | None:
        """Where those of a value go."""
        return None if column is None else self.norms.stats[:, column : column + width(place)]

    def norm(self, segment: Segment) -> Norm | None:
        return None if segment.column is None else self.norms.columns(segment.column, width(segment.place))

    def loaded(self, segment: Segment) -> Norm | None:
        """What products read a segment through: norm and ReLU, or nothing."""
        if segment.column is None and segment.act == "relu":
            return self.norms.identity(width(segment.place))
        return self.norm(segment)

    def activated(self, segment: Segment, to: Tensor) -> None:
        """to [pixels, channels] view = act(norm(segment))."""
        value, geometry = self.memory.value(segment.place), self.memory.geometry(segment.place)
        activate.forward(value, self.norm(segment), to, geometry, activation(segment))

    def activate(self, step: Activate) -> None:
        at = step.to.start
        for segment in step.segments:
            end = at + width(segment.place)
            value, to = self.memory.value(segment.place), self.memory.value(Place(step.to.buffer, at, end))
            geometry = self.memory.geometry(segment.place, step.pool)
            activate.forward(value, self.norm(segment), to, geometry, activation(segment))
            at = end

    def terms(self, segments: Sequence[Segment]) -> list[elementwise.Term]:
        return [elementwise.Term(self.memory.value(s.place), self.norm(s), activation(s)) for s in segments]

    def maximum(self, step: Maximum) -> None:
        x, out = self.values(step.segments[0]), self.memory.value(step.to)
        maximum.forward(x, out, self.windows(step), step.size, self.statistics(step.statistics, step.to))

    def windows(self, step: Maximum | MaximumBackward) -> Geometry:
        return self.memory.geometry(step.segments[0].place, stride=step.stride)

    def values(self, segment: Segment) -> Tensor:
        """[pixels, channels] of what a segment reads: where it lies or, through norm and activation, in scratch
        memory."""
        if plain(segment):
            return self.memory.value(segment.place)
        to = self.memory.scratch(segment.place.buffer, width(segment.place))
        self.activated(segment, to)
        return to

    # --- products ---

    def read_by(self, step: Product | ProductBackward) -> Geometry:
        """Of what a product reads."""
        return self.memory.geometry(step.segments[0].place, step.conv.pool, step.conv.stride)

    def product(self, step: Product) -> None:
        if step.conv.kernel == 3:
            return self.product3x3(step)
        segments = [self.read(segment) for segment in step.segments]
        into, out = self.statistics(step.statistics, step.to), self.memory.value(step.to)
        mix.forward(segments, self.stacked(step), out, self.read_by(step), self.precision, into, self.after(step))
        if step.act == "relu" and not step.residual:
            self.rectified.append(step.to)

    def read(self, segment: Segment) -> mix.Segment:
        """As a 1x1 takes it."""
        if on_load(segment):
            return mix.Segment(self.memory.value(segment.place), self.loaded(segment))
        return mix.Segment(self.values(segment))

    def stacked(self, step: Product | ProductBackward) -> Tensor:
        """[out of all nodes, in]"""
        each = [self.weight(node).flatten(1) for node in step.nodes]
        return torch.cat(each) if len(each) > 1 else each[0]

    def weight(self, node: int) -> Tensor:
        weight = self.weights[node]
        assert weight is not None, "a sum has no weight"
        return weight

    def after(self, step: Product) -> elementwise.After | None:
        """The norm, the activation and the residual that are folded into a product."""
        if step.column is None and step.act == "identity" and not step.residual:
            return None
        count = width(step.to)
        norm = self.norms.identity(count) if step.column is None else self.norms.columns(step.column, count)
        return elementwise.After(norm, activation(step), next(iter(self.terms(step.residual)), None))

    def product3x3(self, step: Product) -> None:
        z, norm = self.read3x3(step)
        into, out = self.statistics(step.statistics, step.to), self.memory.value(step.to)
        weight, after = self.weight(step.nodes[0]), self.after(step)
        dropout = self.dropout(step)
        conv3x3.forward(z, norm, weight, out, self.read_by(step), self.precision, into, dropout, after)
        if step.act == "relu" and not step.residual:
            self.rectified.append(step.to)

    def read3x3(self, step: Product | ProductBackward) -> tuple[Tensor, Norm | None]:
        """The one input of a 3x3, and what it is read through: several segments are gathered in scratch memory."""
        first = step.segments[0]
        if len(step.segments) == 1 and on_load(first):
            norm = self.loaded(first)
            # CUDA C++ reads through a ReLU, which leaves what is not negative as it is
            norm = self.norms.identity(width(first.place)) if norm is None and self.is_rectified(first.place) else norm
            return self.memory.value(first.place), norm
        z, at = self.memory.scratch(first.place.buffer, sum(width(s.place) for s in step.segments)), 0
        for segment in step.segments:
            self.activated(segment, z[:, at : at + width(segment.place)])
            at += width(segment.place)
        return z, None

    def is_rectified(self, place: Place) -> bool:
        return any(r.buffer == place.buffer and r.start <= place.start and place.stop <= r.stop for r in self.rectified)

    def dropout(self, step: Product | ProductBackward) -> conv3x3.Dropout | None:
        if step.drop is None or self.seed is None:
            return None
        return conv3x3.Dropout(step.conv.drop_rate, self.seed, step.drop)

    def bottleneck(self, step: Bottleneck) -> None:
        """By one kernel of CUDA C++ where that is estimated to be faster."""
        (segment,), reduce, conv = step.reduce.segments, step.reduce, step.conv
        features, weight, out = self.memory.value(segment.place), self.weight(conv.nodes[0]), self.memory.value(conv.to)
        geometry = self.memory.geometry(conv.to)
        if not cuda.takes_layer(features, weight, out, geometry):
            self.product(reduce)
            return self.product(conv)
        norms = self.loaded(segment), self.after(reduce)
        assert norms[0] is not None and norms[1] is not None and norms[1].act.code == RELU.code
        cuda.layer(features, norms[0], self.stacked(reduce), norms[1].norm, weight, out, geometry)
