"""Residual blocks: of ResNet (arXiv 1512.03385, Fig. 5), ResNeXt (arXiv 1611.05431) and DarkNet (arXiv 1804.02767)."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph, Read
from csp_kernels.vocabulary import COSTLY


def residual_block(
    in_channels: int, out_channels: int, mid: int, *, block: str = "bottleneck", groups: int = 1, act: str = "relu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """x [in_channels] -> y [out_channels]; the choices are those of `add_residual_block`."""
    build = Builder(in_channels)
    x = [build.read(0)]
    build.write(add_residual_block(build, x, out_channels, mid, block=block, groups=groups, act=act, slope=slope))
    return build.graph()


def add_residual_block(
    build: Builder, x: Sequence[Read], out: int, mid: int, *, block: str, groups: int = 1, act: str = "relu",
    slope: float = 0.0, names: tuple[str, str] = ("conv", "norm"), prefix: str = "",
) -> list[Read]:  # fmt: skip
    """How y [out] is read, side by side:
        "bottleneck": 1x1, 3x3 (groups), 1x1 without activation, add, activation;
        "dark":       1x1, 3x3 (groups), add;
        "basic":      3x3 (groups), 3x3 without activation, add, activation.

    Of unequal numbers of channels only the leading common ones are added (DarkNet's shortcut). What an activation that
    is cheap follows is kept as it is in front of it, and read through it: then backward need not add up again.
    """

    def unit(reads: Sequence[Read], channels: int, kernel: int, name: str, linear: bool = False) -> Read:
        return conv_norm(
            build, reads, channels, kernel, "identity" if linear else act, slope, prefix=f"{prefix}{name}.",
            names=names, groups=groups if kernel == 3 and not linear else 1,
        )  # fmt: skip

    if block == "basic":
        y = unit([unit(x, mid, 3, "conv1")], out, 3, "conv2", linear=True)
    else:
        y = unit([unit(x, mid, 1, "conv1")], out if block == "dark" else mid, 3, "conv2")
    if block == "bottleneck":
        y = unit([y], out, 1, "conv3", linear=True)
    behind = ("identity", 0.0) if block == "dark" else (act, slope)
    return [_joined(build, terms, *behind) for terms in _terms(y, x)]


def _joined(build: Builder, terms: Sequence[Read], act: str, slope: float) -> Read:
    """How act(sum of the terms) is read."""
    if act in COSTLY:
        return build.read(build.sum(terms, act, slope))
    return build.read(build.sum(terms), None, act, slope)


def _terms(y: Read, x: Sequence[Read]) -> list[list[Read]]:
    """y cut where the reads of x end: what is added up, slice by slice."""
    found, start = [], 0
    for read in x:
        stop = min(start + read.channels, y.channels)
        if start < stop:
            found.append([part(y, start, stop), part(read, 0, stop - start)])
        start = stop
    return [*found, *([[part(y, start, y.channels)]] if start < y.channels else [])]


def part(read: Read, start: int, stop: int) -> Read:
    """Some of the channels that it reads."""
    at = read.at if read.norm is None else read.at + start
    return Read(read.value, read.start + start, read.start + stop, read.norm, at, read.act, read.slope)
