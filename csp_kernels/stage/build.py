"""Makes graphs: the builders of this folder, one for each kind of block, are written with it."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.check import check
from csp_kernels.stage.graph import Conv, Graph, MaxPool, Node, Parameters, Read, Sum, Write


class Builder:
    """Makes a graph one node after the other; values and norms are the numbers that its methods return."""

    def __init__(self, *inputs: int) -> None:
        self._inputs = inputs
        self._nodes: list[Node] = []
        self._norms: list[int] = []
        self._outputs: list[Write] = []
        self._order: list[Parameters] = []

    def channels(self, value: int) -> int:
        known = (*self._inputs, *(node.out_channels for node in self._nodes))
        if not 0 <= value < len(known):
            raise ValueError(f"value: got {value}, expected one of 0 to {len(known) - 1}, which exist here")
        return known[value]

    def norm(self, channels: int, name: str = "") -> int:
        """A batch norm, for reads to use."""
        self._norms.append(channels)
        return self._listed(name, "norm", len(self._norms) - 1)

    def conv(
        self,
        reads: Sequence[Read],
        out_channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        pool: bool = False,
        drop_rate: float = 0.0,
        name: str = "",
    ) -> int:
        """The value of a convolution."""
        node = Conv(_listed(reads), out_channels, kernel, stride, groups, bias, pool, drop_rate)
        self._nodes.append(node)
        self._listed(name, "conv", len(self._nodes) - 1)
        return len(self._inputs) + len(self._nodes) - 1

    def sum(self, reads: Sequence[Read], act: str = "identity", slope: float = 0.0) -> int:
        """The value of a sum."""
        self._nodes.append(Sum(_listed(reads), act, slope))
        return len(self._inputs) + len(self._nodes) - 1

    def max_pool(self, read: Read, size: int, *, stride: int = 1) -> int:
        """The value of a maximum over size x size pixels around each, or each second in each second row; or over 2x2
        each (size 2, stride 2)."""
        self._nodes.append(MaxPool((read,), size, stride))
        return len(self._inputs) + len(self._nodes) - 1

    def write(self, reads: Sequence[Read], pool: bool = False) -> None:
        """The next output."""
        self._outputs.append(Write(_listed(reads), pool))

    def read(
        self, value: int, norm: int | None = None, act: str = "identity", slope: float = 0.0, *, start: int = 0,
        stop: int | None = None,
    ) -> Read:  # fmt: skip
        """Channels of a value, all by default; a norm's channels are those of the value."""
        stop = self.channels(value) if stop is None else stop
        return Read(value, start, stop, norm, 0 if norm is None else start, act, slope)

    def graph(self) -> Graph:
        """What was built; ValueError where it is no graph."""
        made = Graph(
            self._inputs, tuple(self._nodes), tuple(self._norms), tuple(self._outputs), tuple(self._order)
        )  # fmt: skip
        check(made)
        return made

    def _listed(self, name: str, kind: str, index: int) -> int:
        self._order.append(Parameters(name or f"{kind}{index}", kind, index))
        return index


def _listed(reads: Sequence[Read]) -> tuple[Read, ...]:
    if isinstance(reads, Read) or not all(isinstance(read, Read) for read in reads):
        raise TypeError(f"reads: got {reads!r}, expected a sequence of what Builder.read returns")
    return tuple(reads)


def through_norm(build: Builder, reads: Sequence[Read], act: str = "relu", name: str = "") -> list[Read]:
    """The same slices through a new batch norm over all of them, and an activation: the order of DenseNet."""
    norm = build.norm(sum(read.channels for read in reads), name)
    made, at = [], 0
    for read in reads:
        made.append(Read(read.value, read.start, read.stop, norm, at, act))
        at += read.channels
    return made


def conv_norm(
    build: Builder, reads: Sequence[Read], out_channels: int, kernel: int = 1, act: str = "relu", slope: float = 0.0, *,
    prefix: str = "", names: tuple[str, str] = ("conv", "norm"), groups: int = 1,
) -> Read:  # fmt: skip
    """A convolution and the batch norm and activation behind it: how its readers read the value."""
    conv, norm = (f"{prefix}{name}" for name in names) if prefix else ("", "")
    value = build.conv(reads, out_channels, kernel, groups=groups, name=conv)
    return build.read(value, build.norm(out_channels, norm), act, slope)
