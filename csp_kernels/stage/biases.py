"""Biases of convolutions as parts of norms, so that programs and kernels know none.

What reads z + b through a batch norm reads z through one whose beta is larger: by gamma rsqrt(var + eps) b with running
statistics, by nothing with those of the batch, which b moves along. What reads z + b as it is reads z through a norm of
its own with mean 0, variance 1, gamma 1 and beta b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from csp_kernels.stage.graph import Conv, Graph, Node, Parameters, Read, Write


@dataclass(frozen=True)
class Piece:
    """Channels [start, stop) of a node's bias; node None: as many zeros."""

    node: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Unbiased:
    """graph: without biases. Its norms are those that it had and, behind them, those whose beta is a bias.

    pieces: of each norm, the biases under its channels side by side; (): none.
    """

    graph: Graph
    pieces: tuple[tuple[Piece, ...], ...]


def has_biases(graph: Graph) -> bool:
    return any(isinstance(node, Conv) and node.bias for node in graph.nodes)


def without_biases(graph: Graph) -> Unbiased:
    """The order of its parameters is that of the graph without the biases, then the new norms."""
    nodes = {graph.value(i): i for i, node in enumerate(graph.nodes) if isinstance(node, Conv) and node.bias}
    reads = [read for _, user in graph.users() for read in user.reads if read.value in nodes]
    bare: dict[int, list[int]] = {value: [] for value in nodes}  # channels that are read without a norm
    for read in reads:
        bare[read.value] += range(read.start, read.stop) if read.norm is None else ()
    used = {value: sorted({*channels}) for value, channels in bare.items() if channels}
    norms = {value: len(graph.norms) + i for i, value in enumerate(used)}

    def through(user: tuple[Read, ...]) -> tuple[Read, ...]:
        return tuple(
            replace(read, norm=norms[read.value], at=used[read.value].index(read.start))
            if read.norm is None and read.value in norms
            else read
            for read in user
        )

    under: list[list[tuple[int | None, int]]] = [[(None, c) for c in range(width)] for width in graph.norms]
    for read in reads:
        if read.norm is not None:
            own = [(nodes[read.value], c) for c in range(read.start, read.stop)]
            under[read.norm][read.at : read.at + read.channels] = own
    under += [[(nodes[value], c) for c in channels] for value, channels in used.items()]
    made = Graph(
        graph.inputs,
        tuple(_without(replace(node, reads=through(node.reads))) for node in graph.nodes),
        (*graph.norms, *(len(channels) for channels in used.values())),
        tuple(Write(through(write.reads), write.pool) for write in graph.outputs),
        (*graph.order, *(Parameters(f"bias of v{value}", "norm", norm) for value, norm in norms.items())),
    )
    return Unbiased(made, tuple(tuple(_runs(channels)) for channels in under))


def _without(node: Node) -> Node:
    return replace(node, bias=False) if isinstance(node, Conv) else node


def _runs(channels: list[tuple[int | None, int]]) -> Iterator[Piece]:
    """Nothing where there is no bias."""
    if all(node is None for node, _ in channels):
        return
    start = 0
    for i in range(1, len(channels) + 1):
        node, first = channels[start]
        if i == len(channels) or channels[i] != (node, first + i - start):
            yield Piece(node, first, first + i - start)
            start = i
