"""Runs programs in plain PyTorch: one instruction after the other, on buffers of NaN, gradients by the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csp_kernels.reference.activations import FUNCTIONS
from csp_kernels.reference.dense_block import dropped
from csp_kernels.stage import program as P
from csp_kernels.stage.graph import Conv, Graph


def along(channels: Tensor) -> Tensor:
    return channels[:, None, None]


class Interpreter:
    """A program with its arguments; forward() gives the outputs, backward(grads) all gradients.

    params: as in csp_kernels.reference.stage. Buffers of kind "scratch" are NaN again when backward begins.
    """

    def __init__(
        self, graph: Graph, program: P.Program, inputs: Sequence[Tensor], params: Sequence[Tensor],
        running: Sequence[Tensor], frozen: Sequence[bool], eps: Sequence[float], seed: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.program, self.frozen, self.eps, self.seed = graph, program, frozen, eps, seed
        given, moments = iter(params), iter(running)
        self.weights: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        for item in graph.order:
            node = graph.nodes[item.index] if item.kind == "conv" else None
            if isinstance(node, Conv):
                self.weights[item.index] = next(given), next(given) if node.bias else None
            else:
                self.norms[item.index] = next(given), next(given)
        self.running = [(next(moments), next(moments)) if f else None for f in frozen]
        self.inputs = inputs
        n, _, h, w = inputs[0].shape
        self.buffers = [inputs[b.index] if b.kind == "input" else self.new(b, n, h, w) for b in program.buffers]
        self.statistics = torch.full((2, program.statistics), torch.nan, dtype=torch.float64)
        self.pixels = torch.zeros(program.statistics, dtype=torch.float64)
        self.affine = torch.full((3, program.columns), torch.nan, dtype=torch.float64)  # mean, scale, shift
        self.rstd = torch.full((program.columns,), torch.nan, dtype=torch.float64)

    def new(self, buffer: P.Buffer, n: int, h: int, w: int) -> Tensor:
        for half in buffer.size:
            h, w = (h // 2, w // 2) if half == "f" else ((h + 1) // 2, (w + 1) // 2)
        return torch.full((n, buffer.channels, h, w), torch.nan, dtype=torch.float64)

    # --- reading and writing ---

    def at(self, place: P.Place, buffers: Sequence[Tensor] | None = None) -> Tensor:
        return (self.buffers if buffers is None else buffers)[place.buffer][:, place.start : place.stop]

    def columns(self, segment: P.Segment) -> slice:
        assert segment.column is not None
        return slice(segment.column, segment.column + segment.place.stop - segment.place.start)

    def normalised(self, segment: P.Segment) -> Tensor:
        x = self.at(segment.place)
        if segment.column is None:
            return x
        mean, scale, shift = self.affine[:, self.columns(segment)]
        return (x - along(mean)) * along(scale) + along(shift)

    def activated(self, segment: P.Segment) -> Tensor:
        return FUNCTIONS[segment.act](self.normalised(segment), segment.slope)

    def take(self, place: P.Place, column: int | None) -> None:
        if column is not None:
            x = self.at(place)
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            columns = slice(column, column + x.shape[1])
            self.statistics[:, columns] = torch.stack((mean, var))
            self.pixels[columns] = x.numel() / x.shape[1]

    # --- forward ---

    def forward(self) -> list[Tensor]:
        for step in self.program.forward:
            self.run(step)
        return self.results("output")

    def results(self, kind: str) -> list[Tensor]:
        return [t for t, buffer in zip(self.buffers, self.program.buffers, strict=True) if buffer.kind == kind]

    def run(self, step: Any) -> None:
        method: Callable[[Any], None] = getattr(self, type(step).__name__.lower())
        method(step)

    def copy(self, step: P.Copy) -> None:
        self.at(step.to).copy_(self.at(step.source))
        self.take(step.to, step.statistics)

    def measure(self, step: P.Measure) -> None:
        self.take(step.source, step.statistics)

    def fill(self, step: P.Fill) -> None:
        for b in step.bindings:
            channels, columns = slice(b.at, b.at + b.count), slice(b.column, b.column + b.count)
            if b.statistics is None:
                moments = self.running[b.norm]
                assert moments is not None
                mean, var = (t[channels] for t in moments)
            else:
                mean, var = self.statistics[:, b.statistics : b.statistics + b.count]
            gamma, beta = (t[channels] for t in self.norms[b.norm])
            self.rstd[columns] = (var + self.eps[b.norm]).rsqrt()
            self.affine[:, columns] = torch.stack((mean, gamma * self.rstd[columns], beta))

    def convolve(self, step: Any, x: Tensor) -> Tensor:
        return self.convolve_with(step, x, *self.stacked(step.nodes))

    def stacked(self, nodes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return torch.cat([self.weights[node][0] for node in nodes]), self.weights[nodes[0]][1]

    def convolve_with(self, step: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = step.conv
        x = F.avg_pool2d(x, 2) if conv.pool else x
        y = F.conv2d(x, weight, bias, conv.stride, conv.kernel // 2, groups=conv.groups)
        return dropped(y, conv.drop_rate, self.seed, step.drop) if step.drop is not None else y

    def product(self, step: P.Product) -> None:
        y = self.convolve(step, torch.cat([self.activated(s) for s in step.segments], 1))
        if step.column is not None:
            mean, scale, shift = self.affine[:, step.column : step.column + y.shape[1]]
            y = (y - along(mean)) * along(scale) + along(shift)
        y = FUNCTIONS[step.act](y, step.slope)
        self.at(step.to).copy_(sum((self.activated(s) for s in step.residual), y))
        self.take(step.to, step.statistics)

    def bottleneck(self, step: P.Bottleneck) -> None:
        self.product(step.reduce)
        self.product(step.conv)
        self.at(step.reduce.to).fill_(torch.nan)

    def add(self, step: P.Add) -> None:
        first, *rest = [self.activated(s) for s in step.segments]
        self.at(step.to).copy_(FUNCTIONS[step.act](sum(rest, first), step.slope))
        self.take(step.to, step.statistics)

    def maximum(self, step: P.Maximum) -> None:
        (x,) = [self.activated(s) for s in step.segments]
        self.at(step.to).copy_(F.max_pool2d(x, step.size, step.stride, (step.size - 1) // 2, ceil_mode=step.size == 2))
        self.take(step.to, step.statistics)

    def activate(self, step: P.Activate) -> None:
        y = torch.cat([self.activated(s) for s in step.segments], 1)
        self.at(step.to).copy_(F.avg_pool2d(y, 2) if step.pool else y)

    # --- backward ---

    def backward(self, grads: Sequence[Tensor]) -> tuple[dict[int, Tensor], dict[int, list[Tensor]], dict[int, Any]]:
        """Of inputs, of weights and biases by node, and (dgamma, dbeta) by norm."""
        kinds = [buffer.kind for buffer in self.program.buffers]
        for t, kind in zip(self.buffers, kinds, strict=True):
            if kind == "scratch":
                t.fill_(torch.nan)
        self.affine.fill_(torch.nan)
        self.given = [grads[b.index] if b.kind == "output" else None for b in self.program.buffers]
        self.gradients = [torch.full_like(t, torch.nan) for t in self.buffers]
        self.sums = torch.zeros(2, self.program.columns, dtype=torch.float64)
        self.owed = torch.zeros(2, self.program.statistics, dtype=torch.float64)
        self.dinputs: dict[int, Tensor] = {}
        self.dweights: dict[int, list[Tensor]] = {}
        self.dnorms = {
            norm: torch.full((2, c), torch.nan, dtype=torch.float64) for norm, c in enumerate(self.graph.norms)
        }
        for step in self.program.backward:
            self.run(step)
        return self.dinputs, self.dweights, self.dnorms

    def spread(self, segments: Sequence[P.Segment], gradient: Tensor) -> None:
        """The gradient of what the segments are side by side, to their places and sums."""
        start = 0
        for segment in segments:
            stop = start + segment.place.stop - segment.place.start
            self.one(segment, gradient[:, start:stop])
            start = stop

    def one(self, segment: P.Segment, gradient: Tensor) -> None:
        with torch.enable_grad():
            n = self.normalised(segment).detach().requires_grad_()
            (dn,) = torch.autograd.grad(FUNCTIONS[segment.act](n, segment.slope), n, gradient)
        if segment.sums:
            centred = self.at(segment.place) - along(self.affine[0, self.columns(segment)])
            self.sums[:, self.columns(segment)] += torch.stack((dn.sum((0, 2, 3)), (dn * centred).sum((0, 2, 3))))
        if segment.gradient:
            scale = 1.0 if segment.column is None else along(self.affine[1, self.columns(segment)])
            target = self.at(segment.place, self.gradients)
            target.copy_(dn * scale if segment.gradient == "write" else target + dn * scale)

    def complete(self, place: P.Place, owed: int | None) -> Tensor:
        gradient = self.at(place, self.gradients)
        if owed is None:
            return gradient
        columns = slice(owed, owed + place.stop - place.start)
        mean, slope = self.owed[:, columns]
        return gradient - along(mean) - (self.at(place) - along(self.statistics[0, columns])) * along(slope)

    def settle(self, step: P.Settle) -> None:
        for b in step.bindings:
            columns, channels = slice(b.column, b.column + b.count), slice(b.at, b.at + b.count)
            dbeta, total = self.sums[:, columns]
            dgamma = total * self.rstd[columns]
            self.dnorms[b.norm][:, channels] = torch.stack((dgamma, dbeta))
            if b.statistics is not None:
                owing = slice(b.statistics, b.statistics + b.count)
                scale = self.affine[1, columns] / self.pixels[owing]
                self.owed[:, owing] += torch.stack((scale * dbeta, scale * dgamma * self.rstd[columns]))

    def clear(self, step: P.Clear) -> None:
        self.at(step.place, self.gradients).zero_()

    def activatebackward(self, step: P.ActivateBackward) -> None:
        given = self.given[step.output.buffer]
        assert given is not None
        gradient = given[:, step.output.start : step.output.stop]
        if step.pool:
            with torch.enable_grad():
                y = torch.cat([self.at(s.place) for s in step.segments], 1).detach().requires_grad_()
                (gradient,) = torch.autograd.grad(F.avg_pool2d(y, 2), y, gradient)
        self.spread(step.segments, gradient)

    def productbackward(self, step: P.ProductBackward) -> None:
        x = torch.cat([self.activated(s) for s in step.segments], 1)
        weight, bias = self.stacked(step.nodes)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
        with torch.enable_grad():
            y = self.convolve_with(step, leaves[0], leaves[1], leaves[2] if bias is not None else None)
            dx, *dweights = torch.autograd.grad(y, leaves, self.gradient_of(step))
        parts = dweights[0].split([self.weights[node][0].shape[0] for node in step.nodes])
        for node, part in zip(step.nodes, parts, strict=True):
            if node in step.wanted:
                self.dweights[node] = [part, *dweights[1:]]
        self.spread(step.segments, dx)

    def gradient_of(self, step: P.ProductBackward) -> Tensor:
        for behind in step.behind:
            given = self.given[behind.output.buffer]
            assert given is not None and not behind.segment.sums
            self.one(replace(behind.segment, gradient="write"), given[:, behind.output.start : behind.output.stop])
        return self.complete(step.of, step.owed)

    def addbackward(self, step: P.AddBackward) -> None:
        terms = [self.activated(s) for s in step.segments]
        with torch.enable_grad():
            total = sum(terms[1:], terms[0]).detach().requires_grad_()
            gradient = self.complete(step.of, step.owed)
            (gradient,) = torch.autograd.grad(FUNCTIONS[step.act](total, step.slope), total, gradient)
        for segment in step.segments:
            self.one(segment, gradient)

    def maximumbackward(self, step: P.MaximumBackward) -> None:
        with torch.enable_grad():
            x = self.activated(step.segments[0]).detach().requires_grad_()
            y = F.max_pool2d(x, step.size, step.stride, (step.size - 1) // 2, ceil_mode=step.size == 2)
            (gradient,) = torch.autograd.grad(y, x, self.complete(step.of, step.owed))
        self.one(step.segments[0], gradient)

    def finish(self, step: P.Finish) -> None:
        self.dinputs[step.index] = self.complete(step.of, step.owed)
