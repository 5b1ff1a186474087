"""The transitions of a cross stage partial stage (CSPNet, arXiv 1911.11929, Eq. 4, Fig. 3), and DenseNet's one."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, through_norm
from csp_kernels.stage.graph import Graph, Read


def partial_transition(
    part: int, dense: int, mid: int, out: int, *, fusion: str = "csp", order: str = "post", pool: bool = True
) -> Graph:
    """part [part], dense [dense] -> y [out]; part 0: no such input. The choices are those of `PartialTransition`."""
    build = Builder(part, dense) if part else Builder(dense)
    *bypass, last = [build.read(i) for i in range(2 if part else 1)]
    add_partial_transition(build, bypass, [last], mid, out, fusion=fusion, order=order, pool=pool)
    return build.graph()


def transition(in_channels: int, out_channels: int, pool: bool = True) -> Graph:
    """DenseNet's: batch norm, ReLU, 1x1, 2x2 averages."""
    build = Builder(in_channels)
    reads = through_norm(build, [build.read(0)], name="norm")
    build.write([build.read(build.conv(reads, out_channels, pool=pool, name="conv"))])
    return build.graph()


def add_partial_transition(
    build: Builder, bypass: Sequence[Read], dense: Sequence[Read], mid: int, out: int, *, fusion: str, order: str,
    pool: bool, prefix: str = "",
) -> None:  # fmt: skip
    """Writes u([bypass, t(dense)]) ("csp"), u([bypass, dense]) ("first") or [bypass, t(dense)] ("last").

    Pooling and a 1x1 can change places, so it is u's; without u the output is pooled.
    """
    reads = [*bypass, *(dense if fusion == "first" else [_unit(build, dense, mid, order, False, f"{prefix}t.")])]
    if fusion == "last":
        build.write(reads, pool)
    else:
        build.write([_unit(build, reads, out, order, pool, f"{prefix}u.")])


def _unit(build: Builder, reads: Sequence[Read], out: int, order: str, pool: bool, prefix: str) -> Read:
    """One transition: 1x1, batch norm, ReLU ("post"), or batch norm, ReLU, 1x1 ("pre"); the norm is listed first."""
    if order == "pre":
        reads = through_norm(build, reads, name=f"{prefix}norm")
        return build.read(build.conv(reads, out, pool=pool, name=f"{prefix}conv"))
    norm = build.norm(out, f"{prefix}norm")
    return build.read(build.conv(reads, out, pool=pool, name=f"{prefix}conv"), norm, "relu")
