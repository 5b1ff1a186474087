"""Arguments of a stage whose convolutions have biases, for the graph without them (stage/biases.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csp_kernels._tracing import cached_constant
from csp_kernels.stage.biases import Piece, without_biases
from csp_kernels.stage.graph import Conv, Graph

unbiased = cached_constant(without_biases)


_LOWERED: list[Graph] = []


@cached_constant
def number_of(graph: Graph) -> int:
    """By which `lowered` finds this graph without its biases: torch.compile passes on no graph that it has not got."""
    _LOWERED.append(without_biases(graph).graph)
    return len(_LOWERED) - 1


def lowered(number: int) -> Graph:
    return _LOWERED[number]


class Arguments(NamedTuple):
    """params, running, frozen and eps of the graph without biases; moved: of each of its norms what the biases add to
    the mean of its batch, None: nothing."""

    params: list[Tensor]
    running: list[Tensor]
    frozen: list[bool]
    eps: list[float]
    moved: list[Tensor | None]


def arguments(
    graph: Graph, params: Sequence[Tensor], running: Sequence[Tensor], frozen: Sequence[bool], eps: Sequence[float]
) -> Arguments:
    """From those of the graph; none of params is missing, all have one dtype."""
    without = unbiased(graph)
    weights, norms, biases = _by_node(graph, params)
    moments = iter(running)
    own = [(next(moments), next(moments)) if flag else None for flag in frozen]
    moved = [_shift(pieces, biases) for pieces in without.pieces]
    for i, shift in enumerate(moved[: len(own)]):
        if shift is not None:
            norms[i] = norms[i][0], norms[i][1] + _of_beta(shift, norms[i][0], own[i], eps[i])
    for shift in moved[len(own) :]:
        assert shift is not None
        ones = torch.ones_like(shift, requires_grad=False)
        norms[len(norms)] = ones, shift
        own.append((torch.zeros_like(ones), ones))
    found = [t for item in without.graph.order for t in (weights if item.kind == "conv" else norms)[item.index]]
    flags = [moments is not None for moments in own]
    numbers = [*eps, *[0.0] * (len(own) - len(eps))]
    return Arguments(found, [t for pair in own if pair for t in pair], flags, numbers, moved)


def with_means(stats: Tensor, moved: Sequence[Tensor | None], frozen: Sequence[bool], widths: Sequence[int]) -> Tensor:
    """stats [2, channels of all norms]: the means with what the biases add to them."""
    shifts = [
        stats.new_zeros(width) if shift is None or flag else shift.detach().to(stats.dtype)
        for shift, flag, width in zip(moved, frozen, widths, strict=False)
    ]
    return torch.stack((stats[0] + torch.cat(shifts), stats[1])) if shifts else stats


_Split = tuple[dict[int, tuple[Tensor]], dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]


def _by_node(graph: Graph, params: Sequence[Tensor]) -> _Split:
    """Weights by node, weights and biases by norm, biases by node."""
    given = iter(params)
    weights: dict[int, tuple[Tensor]] = {}
    norms: dict[int, tuple[Tensor, Tensor]] = {}
    biases: dict[int, Tensor] = {}
    for item in graph.order:
        node = graph.nodes[item.index] if item.kind == "conv" else None
        if not isinstance(node, Conv):
            norms[item.index] = next(given), next(given)
            continue
        weights[item.index] = (next(given),)
        if node.bias:
            biases[item.index] = next(given)
    return weights, norms, biases


def _shift(pieces: Sequence[Piece], biases: dict[int, Tensor]) -> Tensor | None:
    """The biases under a norm, side by side."""
    if not pieces:
        return None
    like = next(iter(biases.values()))
    parts = [
        like.new_zeros(piece.stop - piece.start) if piece.node is None else biases[piece.node][piece.start : piece.stop]
        for piece in pieces
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_beta(shift: Tensor, gamma: Tensor, moments: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """What a norm's beta grows by. The statistics of a batch move along: nothing is left, and the gradient is 0."""
    if moments is None:
        return shift * 0
    return shift * gamma * (moments[1].to(gamma.dtype) + eps).rsqrt()
