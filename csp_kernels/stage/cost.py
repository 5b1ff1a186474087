"""What each instruction of a program costs: multiplications and additions, and what it moves from and to memory.

Counted from sizes, not measured: every read and write of pixels once, as if nothing stayed in a cache between two
instructions; weights and the numbers of norms are small and not counted. FLOPs are 2 per multiplication of the direct
form of a convolution; norms, activations and sums count as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from csp_kernels.stage.program import (
    Activate,
    ActivateBackward,
    Add,
    AddBackward,
    Backward,
    Bottleneck,
    Buffer,
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
    Segment,
    needs_value,
)


@dataclass(frozen=True)
class Cost:
    """Of one instruction: FLOPs, and the numbers (elements, not bytes) that it reads and writes."""

    flops: int = 0
    read: int = 0
    written: int = 0


def costs(program: Program, batch: int, height: int, width: int) -> tuple[list[Cost], list[Cost]]:
    """Of each instruction, forward and backward, on inputs of this size."""
    pixels = [batch * prod(side(buffer.size, n) for n in (height, width)) for buffer in program.buffers]
    count = _Count(program.buffers, pixels)
    return [count.cost(step) for step in program.forward], [count.cost(step) for step in program.backward]


def side(size: str, pixels: int) -> int:
    """Height or width of a buffer, from that of the inputs: see check.sizes."""
    for half in size:
        pixels = pixels // 2 if half == "f" else (pixels + 1) // 2
    return pixels


class _Count:
    def __init__(self, buffers: Sequence[Buffer], pixels: Sequence[int]) -> None:
        self.buffers, self.pixels = buffers, pixels

    def size(self, *places: Place) -> int:
        return sum(self.pixels[place.buffer] * (place.stop - place.start) for place in places)

    def places(self, segments: Iterable[Segment]) -> int:
        return self.size(*(segment.place for segment in segments))

    def cost(self, step: Backward) -> Cost:
        if isinstance(step, Copy):
            return Cost(0, self.size(step.source), self.size(step.to))
        if isinstance(step, Measure):
            return Cost(0, self.size(step.source), 0)
        if isinstance(step, Product):
            flops = self.products(step, step.to, step.segments)
            return Cost(flops, self.places((*step.segments, *step.residual)), self.size(step.to))
        if isinstance(step, Bottleneck):
            both = [self.products(product, product.to, product.segments) for product in (step.reduce, step.conv)]
            return Cost(sum(both), self.places(step.reduce.segments), self.size(step.conv.to))
        if isinstance(step, (Add, Activate, Maximum)):
            return Cost(0, self.places(step.segments), self.size(step.to))
        if isinstance(step, Clear):
            return Cost(0, 0, self.size(step.place))
        if isinstance(step, Finish):
            return Cost(0, self.complete(step.of, step.owed), self.size(step.of))
        if isinstance(step, (ActivateBackward, AddBackward, MaximumBackward, ProductBackward)):
            return self.backward(step)
        return Cost()  # on the numbers of norms alone

    def backward(self, step: ActivateBackward | AddBackward | MaximumBackward | ProductBackward) -> Cost:
        if isinstance(step, ActivateBackward):
            wanted = [s for s in step.segments if s.gradient or s.sums]
            incoming, flops = self.size(step.output) if wanted else 0, 0
        elif isinstance(step, ProductBackward) and step.behind:
            incoming, flops = self.size(step.of, *(behind.output for behind in step.behind)), 0
        else:
            incoming, flops = self.complete(step.of, step.owed), 0
        weight = isinstance(step, ProductBackward) and bool(step.wanted)
        if isinstance(step, ProductBackward):
            through = [segment for segment in step.segments if segment.gradient or segment.sums]
            flops = self.products(step, step.of, through) + weight * self.products(step, step.of, step.segments)
        values = [s for s in step.segments if needs_value(step, s)]
        added = [segment for segment in step.segments if segment.gradient == "add"]
        written = [segment for segment in step.segments if segment.gradient]
        return Cost(flops, incoming + self.places(values) + self.places(added), self.places(written))

    def complete(self, place: Place, owed: int | None) -> int:
        """Numbers read for a value's gradient: with the value, where something is taken off."""
        return self.size(place) * (1 if owed is None else 2)

    def products(self, step: Product | ProductBackward, made: Place, segments: Iterable[Segment]) -> int:
        """FLOPs of the channels of these segments with all that is made of them."""
        channels = sum(segment.place.stop - segment.place.start for segment in segments)
        return 2 * self.size(made) * channels // step.conv.groups * step.conv.kernel**2
