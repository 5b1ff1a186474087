"""Which values' gradients need not be written: those of 1x1 convolutions that outputs alone read."""

from __future__ import annotations

from collections.abc import Iterator

from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.stage.place import Layout
from csp_kernels.stage.program import Behind, Place
from csp_kernels.vocabulary import COSTLY

VECTOR = 16  # channels from a multiple of which a kernel can begin


def outputs_behind(graph: Graph, layout: Layout) -> dict[tuple[int, ...], tuple[Behind, ...]]:
    """By nodes that are computed as one 1x1: what outputs read of their values, side by side and all of it, where
    nothing else reads them and one activation follows that is cheap to differentiate."""
    elsewhere = {read.value for node in graph.nodes for read in node.reads} | _held_or_averaged(graph, layout)
    found = {}
    for nodes in layout.siblings:
        values = {graph.value(index) for index in nodes}
        first = graph.nodes[nodes[0]]
        if isinstance(first, Conv) and first.kernel == 1 and not values & elsewhere:
            behind = sorted(_reads(graph, values, layout), key=lambda b: b.segment.place.start)
            places = [layout.places[graph.value(index)] for index in nodes]
            if _side_by_side(behind, Place(places[0].buffer, places[0].start, places[-1].stop)):
                found[nodes] = tuple(behind)
    return found


def _held_or_averaged(graph: Graph, layout: Layout) -> set[int]:
    """Values that lie in an output as they are, or of which an output has averages."""
    held = {read.value for reads in layout.held for read in reads.values()}
    return held | {read.value for write in graph.outputs if write.pool for read in write.reads}


def _reads(graph: Graph, values: set[int], layout: Layout) -> Iterator[Behind]:
    """What outputs read of these values."""
    for i, write in enumerate(graph.outputs):
        start = 0
        for read in write.reads:
            if read.value in values:
                yield Behind(layout.segment(read), Place(len(graph.inputs) + i, start, start + read.channels))
            start += read.channels


def _side_by_side(behind: list[Behind], of: Place) -> bool:
    at = of.start
    for b in behind:
        if b.segment.place.start != at or (at - of.start) % VECTOR or b.segment.act in COSTLY:
            return False
        at = b.segment.place.stop
    activations = {(b.segment.act, b.segment.slope) for b in behind}
    return at == of.stop and len(activations) == 1
