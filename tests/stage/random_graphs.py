"""Random graphs, and arguments for them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from csp_kernels.stage.build import Builder, through_norm
from csp_kernels.stage.graph import Conv, Graph, Read
from csp_kernels.vocabulary import ACTIVATIONS

SLOPE = 0.1


class RandomGraph:
    """Convolutions of every kind, sums, norms of readers and of producers, shared norms, slices, several outputs.

    native: only what the kernels run (csp_kernels.ops.stage.unsupported). biased: also biases, which programs do not
    have; by default unless native.
    """

    def __init__(self, rng: random.Random, native: bool = False, biased: bool | None = None) -> None:
        self.rng, self.native = rng, native
        self.biased = not native if biased is None else biased
        inputs = [rng.randint(2, 6) for _ in range(rng.randint(1, 2))]
        self.build, self.channels, self.sizes = Builder(*inputs), [*inputs], [""] * len(inputs)
        self.post: dict[int, int] = {}  # value -> norm of its producer
        for _ in range(rng.randint(2, 8)):
            kind = rng.random()
            if kind < 0.1:
                self.max_pool()
            else:
                self.sum() if kind < 0.3 else self.conv()
        unread = [v for v in range(len(inputs), len(self.channels)) if v not in self.read]
        for size in dict.fromkeys(self.sizes[v] for v in unread):
            values = [v for v in unread if self.sizes[v] == size]
            self.build.write([self.whole(v) for v in values], rng.random() < 0.2 and len(size) < 2)
        for _ in range(rng.randint(0 if unread else 1, 2)):
            self.build.write(self.reads())
        self.graph = self.finished()

    @property
    def read(self) -> set[int]:
        users = (*self.build._nodes, *self.build._outputs)
        return {read.value for user in users for read in user.reads}

    def finished(self) -> Graph:
        """Norms of producers that nothing read in full are read by one more output."""
        build = self.build
        for value, norm in self.post.items():
            build.write([build.read(value, norm, "relu")])
        return build.graph()

    def act(self) -> str:
        return self.rng.choice(ACTIVATIONS)

    def whole(self, value: int) -> Read:
        if self.rng.random() < 0.3:
            return self.build.read(value)
        return self.build.read(value, self.post.get(value) if self.rng.random() < 0.7 else None, self.act(), SLOPE)

    def reads(self) -> list[Read]:
        rng, build = self.rng, self.build
        size = rng.choice(self.sizes)
        alike = [v for v, s in enumerate(self.sizes) if s == size]
        raw = []
        values = rng.sample(alike, rng.randint(1, min(4, len(alike))))
        values += [rng.choice(values)] * (rng.random() < 0.15)
        for value in values:
            start = rng.randrange(self.channels[value]) if rng.random() < 0.3 else 0
            stop = rng.randint(start + 1, self.channels[value]) if rng.random() < 0.3 else self.channels[value]
            raw.append(build.read(value, start=start, stop=stop))
        if rng.random() < 0.4:
            return through_norm(build, raw, self.act())
        acts = [self.act() for _ in raw]
        norms = [self.post.get(r.value) if rng.random() < 0.8 else None for r in raw]
        return [
            build.read(r.value, norm, act, SLOPE, start=r.start, stop=r.stop)
            for r, norm, act in zip(raw, norms, acts, strict=True)
        ]

    def conv(self) -> None:
        rng = self.rng
        others = [node.reads for node in self.build._nodes if isinstance(node, Conv)]
        reads = rng.choice(others) if others and rng.random() < 0.3 else self.reads()
        kernel, out = rng.choice((1, 1, 3)), rng.choice((2, 3, 4, 6))
        bias = self.biased and rng.random() < 0.3
        small = len(self.sizes[reads[0].value]) == 2
        pool = kernel == 1 and not bias and not small and rng.random() < 0.15
        everything = not self.native
        stride = 2 if not small and not pool and rng.random() < 0.2 else 1
        incoming = sum(read.channels for read in reads)
        grouped = everything or kernel == 3
        groups = rng.choice([g for g in (1, 2, 3) if incoming % g == out % g == 0]) if grouped else 1
        drops = everything or (kernel == 3 and stride == groups == 1)
        drop = 0.3 if drops and not (self.native and bias) and rng.random() < 0.1 else 0.0
        value = self.build.conv(
            reads, out, kernel, stride=stride, groups=groups, bias=bias, pool=pool, drop_rate=drop
        )  # fmt: skip
        self.add(value, out, self.sizes[reads[0].value] + "f" * pool + "c" * (stride == 2))

    def sum(self) -> None:
        pairs = [
            (a, b)
            for a in range(len(self.channels))
            for b in range(len(self.channels))
            if a != b and (self.channels[a], self.sizes[a]) == (self.channels[b], self.sizes[b])
        ]
        if pairs:
            pair = self.rng.choice(pairs)
            value = self.build.sum([self.whole(v) for v in pair], self.act(), SLOPE)
            self.add(value, self.channels[pair[0]], self.sizes[pair[0]])

    def max_pool(self) -> None:
        value = self.rng.randrange(len(self.channels))
        stride = 2 if len(self.sizes[value]) < 2 and self.rng.random() < 0.4 else 1
        size = self.rng.choice((1, 3, 5, 2) if stride == 2 else (1, 3, 5))
        pooled = self.build.max_pool(self.whole(value), size, stride=stride)
        self.add(pooled, self.channels[value], self.sizes[value] + "c" * (stride == 2))

    def add(self, value: int, channels: int, size: str) -> None:
        self.channels.append(channels)
        self.sizes.append(size)
        if self.rng.random() < 0.6:
            self.post[value] = self.build.norm(channels)


def arguments(
    graph: Graph, frozen: tuple[bool, ...], size: tuple[int, int] = (9, 10)
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs of height and width `size`, parameters in the order of the graph, running statistics."""
    wide = {"dtype": torch.float64}
    inputs = [torch.randn(2, c, *size, **wide) for c in graph.inputs]
    params = []
    for item in graph.order:
        node = graph.nodes[item.index] if item.kind == "conv" else None
        if isinstance(node, Conv):
            shape = node.out_channels, node.in_channels // node.groups, node.kernel, node.kernel
            params.append(torch.randn(shape, **wide) / (shape[1] * shape[2] ** 2) ** 0.5)
            params += [torch.randn(node.out_channels, **wide)] * node.bias
        else:
            c = graph.norms[item.index]
            params += [torch.rand(c, **wide) + 0.5, torch.randn(c, **wide) * 0.3]
    moments = [
        (torch.randn(c, **wide), torch.rand(c, **wide) + 0.5) for c, f in zip(graph.norms, frozen, strict=True) if f
    ]
    return inputs, params, [t for pair in moments for t in pair]


def some(rng: random.Random, items: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(item for item in items if rng.random() < 0.6)
