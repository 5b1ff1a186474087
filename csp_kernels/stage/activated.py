"""Costly activations that several nodes read, computed once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from csp_kernels.stage.graph import Graph, Node, Read, Sum, Write
from csp_kernels.vocabulary import COSTLY


def activated_once(graph: Graph) -> Graph:
    """With a value of its own for what several nodes read through the same costly activation: one more value is kept,
    and neither its exponentials nor their derivatives are computed again for every reader."""
    counts = Counter(read for _, user in graph.users() for read in user.reads if read.act in COSTLY)
    nodes: list[Node] = []
    first = len(graph.inputs)
    numbers = {i: i for i in range(first)}  # values of the graph -> of the new one
    known: dict[Read, int] = {}
    moved: dict[int, int] = {}

    def through(read: Read) -> Read:
        if counts[read] < 2:
            return replace(read, value=numbers[read.value])
        if read not in known:
            plain = replace(read, value=numbers[read.value], act="identity", slope=0.0)
            nodes.append(Sum((plain,), read.act, read.slope))
            known[read] = first + len(nodes) - 1
        return Read(known[read], 0, read.channels)

    for i, node in enumerate(graph.nodes):
        reads = tuple(map(through, node.reads))
        nodes.append(replace(node, reads=reads))
        moved[i] = len(nodes) - 1
        numbers[first + i] = first + len(nodes) - 1
    outputs = tuple(Write(tuple(map(through, write.reads)), write.pool) for write in graph.outputs)
    order = tuple(replace(item, index=moved[item.index]) if item.kind == "conv" else item for item in graph.order)
    return Graph(graph.inputs, tuple(nodes), graph.norms, outputs, order)
