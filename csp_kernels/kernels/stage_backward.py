"""The instructions of a program's backward pass, each by the kernels that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from csp_kernels.kernels import activate, conv3x3, elementwise, maximum, mix, statistics
from csp_kernels.kernels.launch import Correction, Geometry
from csp_kernels.kernels.norm import pay
from csp_kernels.kernels.stage_forward import Forward, activation, on_load, plain, width
from csp_kernels.kernels.stage_plan import Step, overlap
from csp_kernels.stage.program import (
    ActivateBackward,
    AddBackward,
    Backward,
    Behind,
    Clear,
    Finish,
    MaximumBackward,
    Place,
    ProductBackward,
    Segment,
    Settle,
)


class BackwardPass(Forward):
    """One call. given: gradients of outputs, [pixels, channels] views by buffer. inputs: where those of wanted inputs
    go, views by number."""

    given: dict[int, Tensor]
    inputs: dict[int, Tensor]

    def start(self, given: dict[int, Tensor], inputs: dict[int, Tensor]) -> None:
        self.given, self.inputs = given, inputs
        self.weight_gradients: dict[int, Tensor] = {}  # by node, [out, in, kernel, kernel]
        for index, view in inputs.items():
            self.memory.gradients[index] = view

    def step(self, step: Step) -> None:
        instruction = step.instruction
        if isinstance(instruction, ActivateBackward):
            self.activate_backward(instruction, step.written)
        elif isinstance(instruction, ProductBackward) and instruction.conv.kernel == 1:
            self.product_backward(instruction, step.behind)
        elif isinstance(instruction, Settle):
            for table in step.settle:
                self.norms.settle(table, self.memory.pixels(table.buffer))
        elif isinstance(instruction, Finish):
            self.finish(instruction, step.part)
        else:
            super().step(step)

    def compute(self, instruction: Backward) -> None:
        if isinstance(instruction, ProductBackward):
            self.product3x3_backward(instruction)
        elif isinstance(instruction, AddBackward):
            self.add_backward(instruction)
        elif isinstance(instruction, MaximumBackward):
            self.maximum_backward(instruction)
        elif isinstance(instruction, Clear):
            self.memory.own_gradient(instruction.place).zero_()
        else:
            super().compute(instruction)

    # --- through norms and activations ---

    def activate_backward(self, step: ActivateBackward, written: Sequence[bool]) -> None:
        """written: see Step."""
        at = step.output.start
        for segment, writes in zip(step.segments, written, strict=True):
            d = self.given[step.output.buffer][:, at : at + width(segment.place)]
            at += width(segment.place)
            gradient = segment.gradient or "write" if writes else ""
            geometry = self.memory.geometry(segment.place, step.pool)
            self.spread(replace(segment, gradient=gradient), d, geometry)

    def sums(self, segment: Segment) -> Tensor | None:
        """Where those of a segment's norm are added up."""
        if not segment.sums or segment.column is None:
            return None
        return self.norms.sums[:, segment.column : segment.column + width(segment.place)]

    def spread(self, segment: Segment, d: Tensor, geometry: Geometry) -> None:
        """From the gradient of what is read through norm and activation (and 2x2 average, if the geometry pools), which
        nobody writes to any more: that of the place, and sums."""
        if not segment.gradient and not segment.sums:
            return
        if plain(segment) and segment.gradient == "write" and not geometry.pool:
            return self.memory.lend_gradient(segment.place, d)
        g, source = self.memory.target(segment)
        value = None if plain(segment) else self.memory.value(segment.place)
        activate.backward(d, value, self.norm(segment), g, geometry, activation(segment), source, self.sums(segment))

    # --- products ---

    def product_backward(self, step: ProductBackward, behind: Behind | None) -> None:
        """behind: see Step."""
        apart = [not on_load(s) or _read_twice(s, step.segments) for s in step.segments]
        segments = [self.beside(s, step) if a else self.target(s) for s, a in zip(step.segments, apart, strict=True)]
        d, z, correction = self.output_gradient(step, behind)
        wanted, weight = bool(step.wanted), self.stacked(step)
        dweight, _ = mix.backward(segments, d, z, correction, weight, self.read_by(step), self.precision, wanted)
        for segment, made, away in zip(step.segments, segments, apart, strict=True):
            if away and made.g is not None:
                self.spread(segment, made.g, self.memory.geometry(segment.place))
        if wanted:
            self.hand_out(step, dweight)

    def target(self, segment: Segment) -> mix.Segment:
        """Of a 1x1: read in place."""
        g, source = self.memory.target(segment)
        value, norm = self.memory.value(segment.place), self.loaded(segment)
        wanted = g is not None or segment.sums
        return mix.Segment(value, norm, g, source is not None, source, self.sums(segment), wanted)

    def beside(self, segment: Segment, step: ProductBackward) -> mix.Segment:
        """Of a 1x1: read, and its gradient written, in scratch memory."""
        count, buffer = width(segment.place), segment.place.buffer
        x = self.memory.scratch(buffer, count)
        if step.wanted:
            self.activated(segment, x)
        return mix.Segment(x, None, self.memory.scratch(buffer, count) if segment.gradient or segment.sums else None)

    def output_gradient(
        self, step: ProductBackward, behind: Behind | None
    ) -> tuple[Tensor, Tensor | None, Correction | mix.ActivationGradient | None]:
        """d, z and correction of mix.backward."""
        correction, value = self.norms.due(step.owed, width(step.of), added=True), self.memory.value(step.of)
        if behind is None:
            return self.memory.gradient(step.of), None if correction is None else value, correction
        norm, at = self.norm(behind.segment), behind.output
        assert norm is not None, "the plan leaves what has no norm to ActivateBackward"
        slope, offset = (None, None) if correction is None else (correction.slope, correction.offset)
        d = self.given[at.buffer][:, at.start : at.stop]
        return d, value, mix.ActivationGradient(norm, activation(behind.segment), slope, offset)

    def hand_out(self, step: ProductBackward, dweight: Tensor) -> None:
        """dweight [out of all nodes, in]: to those that want theirs."""
        sizes = [self.weight(node).shape[0] for node in step.nodes]
        for node, part in zip(step.nodes, dweight.split(sizes), strict=True):
            if node in step.wanted:
                self.weight_gradients[node] = (part if len(sizes) == 1 else part.clone())[:, :, None, None]

    def product3x3_backward(self, step: ProductBackward) -> None:
        first, weight = step.segments[0], self.weight(step.nodes[0])
        gathered = len(step.segments) > 1 or not on_load(first)
        channels = sum(width(s.place) for s in step.segments)
        if gathered and not step.wanted:  # nobody reads them
            z, norm = self.memory.scratch(first.place.buffer, channels), None
        else:
            z, norm = self.read3x3(step)
        features, gradient = self.memory.value(step.of), self.memory.gradient(step.of)
        slices = features, gradient, self.norms.due(step.owed, width(step.of)), weight, z, norm
        geometry, dropout = self.read_by(step), self.dropout(step)
        if gathered and any(s.gradient or s.sums for s in step.segments):
            dz = self.memory.scratch(first.place.buffer, channels)
            conv3x3.dgrad(*slices, dz, geometry, self.precision, dropout)
            self.spread_parts(step.segments, dz)
        elif first.gradient or first.sums:
            g, source = self.memory.target(first)
            conv3x3.dgrad(*slices, g, geometry, self.precision, dropout, source, self.sums(first))
        if step.wanted:
            dweight = conv3x3.wgrad(*slices, geometry, self.precision, dropout)
            self.weight_gradients[step.nodes[0]] = dweight

    def spread_parts(self, segments: Sequence[Segment], d: Tensor) -> None:
        """d: of segments side by side."""
        at = 0
        for segment in segments:
            part = d[:, at : at + width(segment.place)]
            self.spread(segment, part, self.memory.geometry(segment.place))
            at += width(segment.place)

    # --- the others ---

    def add_backward(self, step: AddBackward) -> None:
        d, correction = self.memory.gradient(step.of), self.norms.due(step.owed, width(step.of))
        direct: Segment | None = None
        if correction is not None or step.act != "identity":
            direct = _written_as_it_is(step.segments)
            to = self.memory.scratch(step.of.buffer, width(step.of))
            to = to if direct is None else self.memory.own_gradient(direct.place)
            value = None if correction is None else self.memory.value(step.of)
            elementwise.backward(d, value, correction, self.terms(step.segments), activation(step), to)
            d = to
        for segment in step.segments:
            if segment is not direct:
                self.spread(segment, d, self.memory.geometry(segment.place))

    def maximum_backward(self, step: MaximumBackward) -> None:
        segment, windows = step.segments[0], self.windows(step)
        positions = maximum.positions_of(self.values(segment), windows, step.size)
        d, correction = self.memory.gradient(step.of), self.norms.due(step.owed, width(step.of))
        if correction is not None:  # each pixel is read by several
            to = self.memory.scratch(step.of.buffer, width(step.of))
            pay(d, self.memory.value(step.of), correction, to)
            d = to
        dx = self.memory.scratch(segment.place.buffer, width(segment.place))
        maximum.backward(d, positions, dx, windows, step.size)
        self.spread(segment, dx, self.memory.geometry(segment.place))

    def finish(self, step: Finish, part: Place | None) -> None:
        """part: see Step."""
        d, dx, start = self.memory.gradient(step.of), self.inputs[step.index], step.of.start
        owing = slice(0, 0) if part is None else slice(part.start - start, part.stop - start)
        if part is not None and step.owed is not None:
            correction = self.norms.due(step.owed + owing.start, width(part))
            assert correction is not None
            pay(d[:, owing], self.memory.value(part), correction, dx[:, owing])
        for others in (slice(owing.start), slice(owing.stop, None)):
            if d.data_ptr() != dx.data_ptr() and dx[:, others].shape[1]:
                statistics.copy_split(d[:, others], dx[:, others], None)


def _written_as_it_is(segments: Sequence[Segment]) -> Segment | None:
    """Of a sum: the term whose gradient is that of the sum and is written, and no other term's. None if there are two
    such terms: both are lent one memory, so neither may add to it later."""
    found = [s for s in segments if plain(s) and s.gradient == "write"]
    return found[0] if len(found) == 1 and not _read_twice(found[0], segments) else None


def _read_twice(segment: Segment, segments: Sequence[Segment]) -> bool:
    """Whether another one reads some of the same channels: their gradients are then added one after the other."""
    return sum(overlap(segment.place, other.place) for other in segments) > 1
