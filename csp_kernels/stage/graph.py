"""What a convolutional stage computes, as data: convolutions, sums and maxima that read slices of values side by side.

A value is a tensor [N, channels, H, W]: first the graph's inputs, then what each node gives. Nothing is concatenated: a
node reads slices of several values, each through a batch norm and an activation or as it is,

    read = act(norm(value[:, start:stop]))

so a norm belongs to the reads that use it, not to a node. A dense layer's norm (batch norm before the convolution,
arXiv 1608.06993) is used by one node, on slices of several values; the norm behind a convolution by every reader of the
value it normalises. The dataclasses are frozen and hold no tensors: equal graphs are equal and hash alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Read:
    """Channels [start, stop) of a value, through channels [at, at + stop - start) of a norm (None: none), then act.

    slope: of leaky_relu, for negative numbers.
    """

    value: int
    start: int
    stop: int
    norm: int | None = None
    at: int = 0
    act: str = "identity"
    slope: float = 0.0

    @property
    def channels(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        text = f"v{self.value}[{self.start}:{self.stop}]"
        if self.norm is not None:
            text = f"norm{self.norm}[{self.at}:{self.at + self.channels}]({text})"
        return text if self.act == "identity" else f"{_act(self.act, self.slope)}({text})"


@dataclass(frozen=True)
class Conv:
    """A convolution of what it reads, side by side: kernel 1, or 3 with padding 1.

    stride 2: not with pool. pool: averages over 2x2 pixels of what is read (the last row or column of an odd size is
    left out), in front of a 1x1 without bias, where that equals pooling behind it. drop_rate: dropout of the result.
    """

    reads: tuple[Read, ...]
    out_channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False
    pool: bool = False
    drop_rate: float = 0.0

    @property
    def in_channels(self) -> int:
        return sum(read.channels for read in self.reads)

    def __str__(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels}"]
        parts += [f"stride {self.stride}"] * (self.stride > 1) + [f"groups {self.groups}"] * (self.groups > 1)
        parts += ["bias"] * self.bias + ["pool"] * self.pool + [f"drop {self.drop_rate:g}"] * (self.drop_rate > 0)
        return f"conv{self.kernel}x{self.kernel}[{', '.join(parts)}]({_side_by_side(self.reads)})"


@dataclass(frozen=True)
class Sum:
    """act(first + second + ...), the residual join: a value of its own, since several nodes may read it.

    Of one read, a copy: beside the values that it is read with it is one segment with them, which kernels read faster.
    """

    reads: tuple[Read, ...]
    act: str = "identity"
    slope: float = 0.0

    @property
    def out_channels(self) -> int:
        return self.reads[0].channels if self.reads else 0

    def __str__(self) -> str:
        text = " + ".join(map(str, self.reads))
        return text if self.act == "identity" else f"{_act(self.act, self.slope)}({text})"


@dataclass(frozen=True)
class MaxPool:
    """The maximum over size x size pixels, size odd, around each pixel, or each second in each second row (stride 2).

    Of one read. Pixels beyond the map do not count. Size 1 with stride 2 is x[:, :, ::2, ::2]. Size 2, with stride 2
    alone, is of 2x2 pixels each, of fewer where the map ends: nn.MaxPool2d(2, 2, ceil_mode=True).
    """

    reads: tuple[Read, ...]
    size: int
    stride: int = 1

    @property
    def out_channels(self) -> int:
        return sum(read.channels for read in self.reads)

    def __str__(self) -> str:
        stride = f"[stride {self.stride}]" if self.stride > 1 else ""
        return f"max{self.size}x{self.size}{stride}({_side_by_side(self.reads)})"


@dataclass(frozen=True)
class Write:
    """An output tensor: reads side by side; pool: averages over 2x2 pixels of them."""

    reads: tuple[Read, ...]
    pool: bool = False

    @property
    def channels(self) -> int:
        return sum(read.channels for read in self.reads)

    def __str__(self) -> str:
        text = _side_by_side(self.reads)
        return f"pool({text})" if self.pool else text


Node = Conv | Sum | MaxPool


@dataclass(frozen=True)
class Parameters:
    """Those of one part of a graph: kind "conv" with the index of its node, or "norm" with that of the norm."""

    name: str
    kind: str
    index: int


@dataclass(frozen=True)
class Graph:
    """inputs: channels of each. norms: channels of each. order: the parameters, as operators and modules list them.

    A convolution has weight [out_channels, in_channels / groups, kernel, kernel] and, with bias, bias [out_channels]; a
    norm weight, bias, running mean and running variance [channels]. stage/check.py says what a graph must be,
    stage/build.py makes one.
    """

    inputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    norms: tuple[int, ...]
    outputs: tuple[Write, ...]
    order: tuple[Parameters, ...]

    def __hash__(self) -> int:
        """Computed once: every call of the operator looks several things up by its graph."""
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = hash((self.inputs, self.nodes, self.norms, self.outputs, self.order))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash, which is another one in another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def channels(self) -> tuple[int, ...]:
        """Of every value."""
        return (*self.inputs, *(node.out_channels for node in self.nodes))

    def value(self, node: int) -> int:
        """What a node gives."""
        return len(self.inputs) + node

    def users(self) -> Iterator[tuple[str, Node | Write]]:
        """All that reads, in the order in which it runs, with the name that errors and `print` give it."""
        yield from ((f"v{self.value(i)}", node) for i, node in enumerate(self.nodes))
        yield from ((f"output {i}", write) for i, write in enumerate(self.outputs))

    def __str__(self) -> str:
        lines = [f"v{i} = input {i} [{c}]" for i, c in enumerate(self.inputs)]
        lines += [f"{name} = {user}" for name, user in self.users()]
        return "\n".join(lines)


def without_dropout(graph: Graph) -> Graph:
    """The graph of evaluation."""
    nodes = tuple(replace(node, drop_rate=0.0) if isinstance(node, Conv) else node for node in graph.nodes)
    return graph if nodes == graph.nodes else replace(graph, nodes=nodes)


def _act(act: str, slope: float) -> str:
    return f"leaky_relu {slope:g}" if act == "leaky_relu" else act


def _side_by_side(reads: Sequence[Read]) -> str:
    return ", ".join(map(str, reads))
