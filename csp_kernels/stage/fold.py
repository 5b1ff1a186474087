"""Inference: norms that use running statistics become part of the convolutions in front of them, sums with a residual
too, and what lies between a 1x1 and the 3x3 behind it need not be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from csp_kernels.stage.graph import Conv, Graph, Node, Read, Write
from csp_kernels.stage.program import (
    Activate,
    Add,
    Bottleneck,
    Buffer,
    Copy,
    Forward,
    Maximum,
    Measure,
    Place,
    Product,
    Segment,
)


@dataclass(frozen=True)
class Folded:
    """What a value holds instead of what its convolution gives, v: act(norm(v)), affine columns from `column` on."""

    column: int
    act: str
    slope: float


def fold(graph: Graph, frozen: Sequence[bool], columns: Sequence[int]) -> tuple[Graph, dict[int, Folded]]:
    """Where all that read the value of a convolution read it through the same norm and activation, it takes them over:
    the graph that reads those values as they are, and what they hold, by node. columns: first one of each norm."""
    reads: dict[int, list[Read]] = {value: [] for value in range(len(graph.channels))}
    for _, user in graph.users():
        for read in user.reads:
            reads[read.value].append(read)
    found = {}
    for index, node in enumerate(graph.nodes):
        if not isinstance(node, Conv) or node.bias or node.drop_rate or (node.groups > 1 and node.kernel == 1):
            continue
        behind = {_behind(graph, read, frozen, columns) for read in reads[graph.value(index)]}
        folded = behind.pop() if len(behind) == 1 else None
        if folded is not None:
            found[index] = folded
    values = {graph.value(index) for index in found}
    nodes: tuple[Node, ...] = tuple(replace(node, reads=_plain(node.reads, values)) for node in graph.nodes)
    outputs = tuple(Write(_plain(write.reads, values), write.pool) for write in graph.outputs)
    return replace(graph, nodes=nodes, outputs=outputs), found


def _behind(graph: Graph, read: Read, frozen: Sequence[bool], columns: Sequence[int]) -> Folded | None:
    """Of the whole value, also where some of it is read: None if the norm has no channels for the rest."""
    if read.norm is None or not frozen[read.norm]:
        return None
    first = read.at - read.start
    if first < 0 or first + graph.channels[read.value] > graph.norms[read.norm]:
        return None
    return Folded(columns[read.norm] + first, read.act, read.slope)


def _plain(reads: Sequence[Read], values: set[int]) -> tuple[Read, ...]:
    """Those of these values without norm and activation."""
    return tuple(Read(read.value, read.start, read.stop) if read.value in values else read for read in reads)


def with_bottlenecks(steps: Sequence[Forward], buffers: Sequence[Buffer]) -> tuple[Forward, ...]:
    """With one instruction for a 1x1 and the 3x3 that alone reads it."""
    made: list[Forward] = []
    for step in steps:
        last = made[-1] if made else None
        if isinstance(last, Product) and isinstance(step, Product) and _is_bottleneck(last, step):
            alone = sum(_overlap(place, last.to) for other in steps for place in _read(other)) == 1
            if alone and buffers[last.to.buffer].kind == "scratch":
                made[-1] = Bottleneck(last, step)
                continue
        made.append(step)
    return tuple(made)


def with_residuals(steps: Sequence[Forward], buffers: Sequence[Buffer]) -> tuple[Forward, ...]:
    """With sums of two as part of the product that gives one of the terms, if nothing else reads that, nor is it an
    output, and the other is there before."""
    made = list(steps)
    for add in (step for step in steps if isinstance(step, Add) and _is_residual(step)):
        for term, other in (add.segments, add.segments[::-1]):
            product = next((s for s in made if isinstance(s, Product) and Segment(s.to) == term), None)
            if product is None or product.residual or product.statistics is not None or product.drop is not None:
                continue
            if buffers[product.to.buffer].kind != "scratch":
                continue
            alone = sum(_overlap(place, product.to) for step in made for place in _read(step)) == 1
            at = made.index(product)
            if alone and not any(_overlap(other.place, place) for step in made[at:] for place in _written(step)):
                made[at] = replace(product, to=add.to, residual=(other,))
                made.remove(add)
                break
    return tuple(made)


def _is_residual(add: Add) -> bool:
    return len(add.segments) == 2 and add.act == "identity" and add.statistics is None


def _written(step: Forward) -> tuple[Place, ...]:
    if isinstance(step, Bottleneck):
        return (step.reduce.to, step.conv.to)
    return (step.to,) if isinstance(step, (Copy, Product, Add, Activate, Maximum)) else ()


def _is_bottleneck(reduce: Product, conv: Product) -> bool:
    through = [*((s.act, s.column) for s in reduce.segments), (reduce.act, reduce.column)]
    through_relu = len(through) == 2 and all(act == "relu" and column is not None for act, column in through)
    conv3x3 = conv.conv.kernel == 3 and conv.drop is None and conv.statistics is None and not reduce.residual
    conv3x3 = conv3x3 and conv.column is None and conv.act == "identity" and not conv.residual
    whole = (
        reduce.conv.kernel == reduce.conv.stride == conv.conv.stride == conv.conv.groups == 1 and not reduce.conv.pool
    )
    return through_relu and whole and conv3x3 and conv.segments == (Segment(reduce.to),)


def _read(step: Forward) -> tuple[Place, ...]:
    """Places of whole segments that an instruction reads."""
    if isinstance(step, Bottleneck):
        return _read(step.reduce)
    if isinstance(step, (Copy, Measure)):
        return (step.source,)
    residual = step.residual if isinstance(step, Product) else ()
    return (
        tuple(s.place for s in (*step.segments, *residual))
        if isinstance(step, (Product, Add, Activate, Maximum))
        else ()
    )


def _overlap(a: Place, b: Place) -> bool:
    return a.buffer == b.buffer and a.start < b.stop and b.start < a.stop
