"""Where the values of a stage and their gradients lie: views [pixels, channels] of the operator's tensors and of
scratch memory, which is there from the first instruction that touches it to the last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from csp_kernels.kernels import statistics
from csp_kernels.kernels.launch import Geometry
from csp_kernels.kernels.stage_plan import Step
from csp_kernels.ops._node import padded
from csp_kernels.stage.cost import side
from csp_kernels.stage.program import Buffer, Place, Segment


class Memory:
    """Of one call. Tensors are [pixels, channels] views, one a buffer; None: scratch memory, made when it is needed."""

    def __init__(self, buffers: Sequence[Buffer], like: Tensor, values: Sequence[Tensor | None]) -> None:
        """like: an input."""
        self.buffers, self.like = buffers, like
        self.values = list(values)
        self.gradients: list[Tensor | None] = [None] * len(buffers)
        # Channels whose gradient is in memory of another: first, behind the last, view.
        self.lent: list[list[tuple[int, int, Tensor]]] = [[] for _ in buffers]
        n, _, h, w = like.shape
        self.sizes = [(n, side(b.size, h), side(b.size, w)) for b in buffers]

    def geometry(self, place: Place, pool: bool = False, stride: int = 1) -> Geometry:
        return Geometry(*self.sizes[place.buffer], pool, stride)

    def pixels(self, buffer: int) -> int:
        n, h, w = self.sizes[buffer]
        return n * h * w

    def scratch(self, buffer: int, channels: int) -> Tensor:
        """[pixels of this buffer, channels], uninitialised, rows of whole vectors."""
        return self.like.new_empty((self.pixels(buffer), padded(channels)))[:, :channels]

    def _new(self, buffer: int) -> Tensor:
        """As the operator has it where it is given: outputs are packed."""
        b = self.buffers[buffer]
        packed = b.kind in ("input", "output")
        return self.like.new_empty((self.pixels(buffer), b.channels)) if packed else self.scratch(buffer, b.channels)

    def value(self, place: Place) -> Tensor:
        """[pixels, channels] view; of a value that nobody reads it may be memory that nobody has written."""
        memory = self.values[place.buffer]
        if memory is None:
            memory = self.values[place.buffer] = self._new(place.buffer)
        return memory[:, place.start : place.stop]

    def own_gradient(self, place: Place) -> Tensor:
        """To be written."""
        memory = self.gradients[place.buffer]
        if memory is None:
            memory = self.gradients[place.buffer] = self._new(place.buffer)
        self._cut(place)
        return memory[:, place.start : place.stop]

    def target(self, segment: Segment) -> tuple[Tensor | None, Tensor | None]:
        """Where the gradient of what a segment reads goes, and what it is added to."""
        if not segment.gradient:
            return None, None
        source = self.gradient(segment.place) if segment.gradient == "add" else None
        return self.own_gradient(segment.place), source

    def lend_gradient(self, place: Place, view: Tensor) -> None:
        """What this view holds is the gradient of the place; nobody writes to the view any more."""
        self._cut(place)
        self.lent[place.buffer].append((place.start, place.stop, view))

    def _cut(self, place: Place) -> None:
        """Nothing of this place is lent."""
        kept: list[tuple[int, int, Tensor]] = []
        for start, stop, view in self.lent[place.buffer]:
            if start < place.start:
                end = min(stop, place.start)
                kept.append((start, end, view[:, : end - start]))
            if stop > place.stop:
                begin = max(start, place.stop)
                kept.append((begin, stop, view[:, begin - start :]))
        self.lent[place.buffer] = kept

    def gradient(self, place: Place) -> Tensor:
        """So far, in one piece; to be read."""
        inside = [(a, b, v) for a, b, v in self.lent[place.buffer] if a < place.stop and place.start < b]
        for start, stop, view in inside:
            if start <= place.start and place.stop <= stop:
                return view[:, place.start - start : place.stop - start]
        for start, stop, view in inside:
            first, last = max(start, place.start), min(stop, place.stop)
            own = self.own_gradient(Place(place.buffer, first, last))
            statistics.copy_split(view[:, first - start : last - start], own, None)
        return self.own_gradient(place)

    def release(self, step: Step) -> None:
        """Gives back what no later instruction touches; what the operator returns is the caller's too."""
        for buffer in step.values:
            if self.buffers[buffer].kind == "scratch":
                self.values[buffer] = None
        for buffer in step.gradients:
            self.gradients[buffer] = None
            self.lent[buffer] = []
