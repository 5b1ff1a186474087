"""A graph in plain PyTorch: every concatenation is made and every norm applied to each slice that is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csp_kernels.reference._norms import statistics, to
from csp_kernels.reference.activations import FUNCTIONS
from csp_kernels.reference.dense_block import dropped
from csp_kernels.stage.graph import Conv, Graph, MaxPool, Read, Write


def stage(
    graph: Graph,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    seed: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The outputs, and stats [2, channels of all norms] float64: batch mean and biased variance, 0 of frozen norms.

    inputs: [N, channels, H, W] each. params: as graph.order lists them, weight (and bias, if it has one) of a
    convolution, weight and bias of a norm; None is ones or zeros. running: mean and variance of each frozen norm.
    Any floating dtype and device; differentiable any number of times.
    """
    run = _Run(graph, params, running, frozen, eps)
    values = list(inputs)
    drops = 0
    for i, node in enumerate(graph.nodes):
        read = [run.read(values, r) for r in node.reads]
        if isinstance(node, Conv):
            y = run.conv(i, node, torch.cat(read, 1))
            if node.drop_rate > 0:
                y = dropped(y, node.drop_rate, seed, drops)
                drops += 1
        elif isinstance(node, MaxPool):
            y = F.max_pool2d(read[0], node.size, node.stride, (node.size - 1) // 2, ceil_mode=node.size == 2)
        else:
            y = FUNCTIONS[node.act](sum(read[1:], read[0]), node.slope)
        values.append(y)
    outputs = [_pooled(torch.cat([run.read(values, r) for r in write.reads], 1), write) for write in graph.outputs]
    return outputs, run.stats(inputs[0])


class _Run:
    """Parameters by node and norm, and the statistics found on the way."""

    def __init__(
        self, graph: Graph, params: Sequence[Tensor | None], running: Sequence[Tensor], frozen: Sequence[bool] | None,
        eps: float | Sequence[float],
    ) -> None:  # fmt: skip
        count = len(graph.norms)
        self.frozen = [False] * count if frozen is None else list(frozen)
        self.eps = [eps] * count if isinstance(eps, (int, float)) else list(eps)
        given, moments = iter(params), iter(running)
        self.convs: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self.norms: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        for item in graph.order:
            node = graph.nodes[item.index] if item.kind == "conv" else None
            if isinstance(node, Conv):
                self.convs[item.index] = next(given), next(given) if node.bias else None
            else:
                self.norms[item.index] = next(given), next(given)
        self.moments = [(next(moments), next(moments)) if f else None for f in self.frozen]
        self.known: dict[tuple[object, ...], Tensor] = {}  # what was read
        self.found: list[dict[tuple[int, int], Tensor]] = [{} for _ in graph.norms]  # statistics by channels read

    def read(self, values: Sequence[Tensor], read: Read) -> Tensor:
        """Once, however many nodes read the same."""
        key = read.value, read.start, read.stop, read.norm, read.at, read.act, read.slope
        if key not in self.known:
            self.known[key] = self._read(values, read)
        return self.known[key]

    def _read(self, values: Sequence[Tensor], read: Read) -> Tensor:
        x = values[read.value][:, read.start : read.stop]
        if read.norm is not None:
            x = self.normalised(x, read.norm, slice(read.at, read.at + read.channels))
        return FUNCTIONS[read.act](x, read.slope)

    def normalised(self, x: Tensor, norm: int, channels: slice) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # of parameters and statistics
        weight, bias = (None if t is None else to(t[channels], dtype) for t in self.norms[norm])
        moments = self.moments[norm]
        mean, var = (None, None) if moments is None else (to(t[channels], dtype) for t in moments)
        self.found[norm][channels.start, channels.stop] = statistics(x, moments is None)
        return F.batch_norm(x, mean, var, weight, bias, moments is None, 0.0, self.eps[norm])

    def stats(self, like: Tensor) -> Tensor:
        """[2, channels of all norms] float64."""
        pieces = [piece for found in self.found for piece in _joined(found)]
        return torch.cat(pieces, 1) if pieces else like.new_zeros((2, 0), dtype=torch.float64)

    def conv(self, index: int, node: Conv, x: Tensor) -> Tensor:
        weight, bias = self.convs[index]
        assert weight is not None
        x = F.avg_pool2d(x, 2) if node.pool else x
        bias = to(bias, x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, node.stride, node.kernel // 2, groups=node.groups)


def _joined(found: dict[tuple[int, int], Tensor]) -> Iterator[Tensor]:
    """[2, channels] of a norm in pieces; reads may share channels."""
    end = 0
    for start, stop in sorted(found):
        if stop > end:
            yield found[start, stop][:, end - start :]
            end = stop


def _pooled(x: Tensor, write: Write) -> Tensor:
    return F.avg_pool2d(x, 2) if write.pool else x
