"""The numbers of a stage's norms, one kernel an instruction however many norms it is about: affine columns, sums, what
is owed (csp_kernels/stage/program.py)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import norm
from csp_kernels.kernels.launch import Correction, Norm, blocks, sum_dtype
from csp_kernels.kernels.norm import BLOCK
from csp_kernels.kernels.stage_plan import FillTable, Plan, SettleTable
from csp_kernels.ops._node import padded


@triton.jit
def _fill(
    columns, sources, stats, stats_pitch, running, running_pitch, gamma, beta, eps, affine, moments, pitch, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """stats, running [2, any] mean and variance -> affine [3, pitch]: mean, scale and shift, which holds what the dtype
    loses of the mean; moments [2, pitch]: 1 / standard deviation, and what is lost. See FillTable."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    c = tl.load(columns + i, inside, 0)
    source = tl.load(sources + i, inside, 0)
    m = tl.zeros((BLOCK,), tl.float64)
    v = tl.zeros((BLOCK,), tl.float64) + 1.0
    if stats is not None:
        trained = inside & (source >= 0)
        m = tl.load(stats + source, trained, 0.0)
        v = tl.load(stats + stats_pitch + source, trained, 1.0)
    if running is not None:
        frozen = inside & (source < 0)
        m = tl.where(frozen, tl.load(running + (-1 - source), frozen, 0.0).to(tl.float64), m)
        v = tl.where(frozen, tl.load(running + running_pitch + (-1 - source), frozen, 1.0).to(tl.float64), v)
    r = 1.0 / tl.sqrt(v + tl.load(eps + c, inside, 0.0))
    s = tl.load(gamma + c, inside, 0.0).to(tl.float64) * r
    low = m.to(affine.dtype.element_ty)
    missing = norm.lost(m, low)
    shift = tl.load(beta + c, inside, 0.0).to(tl.float64) - missing * s
    tl.store(affine + c, low, inside)
    tl.store(affine + pitch + c, s.to(affine.dtype.element_ty), inside)
    tl.store(affine + 2 * pitch + c, shift.to(affine.dtype.element_ty), inside)
    if moments is not None:
        tl.store(moments + c, r, inside)
        tl.store(moments + pitch + c, missing, inside)


@triton.jit
def _settle(
    rows, bindings, sums, moments, gamma, gradients, pitch, owed, owed_pitch, count, positions, P, BLOCK: tl.constexpr
):  # fmt: skip
    """sums [2, pitch] of dn and dn * (x - mean) -> gradients [2, pitch] of weight and bias; added up into owed [2,
    count] view (mean, slope). P: pixels of the values. See SettleTable."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float64)
    slope = tl.zeros((BLOCK,), tl.float64)
    for b in tl.range(bindings):
        at = tl.load(rows + b * 3)
        inside = (i >= at) & (i < at + tl.load(rows + b * 3 + 1))
        c = i - at + tl.load(rows + b * 3 + 2)
        bias = tl.load(sums + c, inside, 0.0)
        r = tl.load(moments + c, inside, 0.0)
        missing = tl.load(moments + pitch + c, inside, 0.0)
        weight = r * (tl.load(sums + pitch + c, inside, 0.0) - missing * bias)
        tl.store(gradients + c, weight.to(gradients.dtype.element_ty), inside)
        tl.store(gradients + pitch + c, bias.to(gradients.dtype.element_ty), inside)
        s = tl.load(gamma + c, inside, 0.0).to(tl.float64) * r / P
        mean += s * bias
        slope += s * r * weight
    if owed is not None:
        inside = i < count
        tl.store(owed + i, tl.load(owed + i, inside, 0.0) + mean, inside)
        to = owed + owed_pitch + i
        tl.store(to, tl.load(to, inside, 0.0) + slope, inside)


class Norms:
    """Those of one call, in columns of affine, of which norms that are read side by side have theirs side by side."""

    def __init__(
        self, plan: Plan, params: Sequence[Tensor], running: Sequence[Tensor], eps: Sequence[float], stats: Tensor,
        like: Tensor, backward: bool,
    ) -> None:  # fmt: skip
        """stats [2, statistics] float64: filled by forward, read by backward. like: an input."""
        self.stats, self.wide, self.like = stats, sum_dtype(like.dtype), like
        norms = [plan.program.norms[i] for i in plan.norms]
        self.starts = dict(zip(plan.norms, accumulate((n.channels for n in norms), initial=0), strict=False))
        self.gamma, self.beta = (_beside([params[n.position + k] for n in norms]) for k in (0, 1))
        frozen = [n.running for n in plan.program.norms if n.running is not None]
        self.running = torch.stack([torch.cat([running[i + k] for i in frozen]) for k in (0, 1)]) if frozen else None
        self.eps = _eps(tuple(plan.norms), tuple(n.channels for n in norms), tuple(eps), like.device)
        self.pitch = padded(max(plan.program.columns, plan.program.statistics))
        self.affine = like.new_empty((3, self.pitch), dtype=self.wide)
        self.identities: dict[int, Norm] = {}
        if backward:
            self.sums, self.owed = stats.new_zeros((4, self.pitch)).chunk(2)
            self.moments = stats.new_empty((2, self.pitch))
            self.gradients = like.new_empty((2, self.pitch), dtype=self.wide)
        self.backward = backward

    def fill(self, table: FillTable) -> None:
        n, stats, running = len(table.columns), self.stats, self.running
        _fill[(blocks(n, BLOCK),)](
            table.columns, table.sources, stats if stats.shape[1] else None, stats.stride(0),
            running, 0 if running is None else running.stride(0), self.gamma, self.beta, self.eps, self.affine,
            self.moments if self.backward else None, self.pitch, n, BLOCK=BLOCK,
        )  # fmt: skip

    def settle(self, table: SettleTable, pixels: int) -> None:
        owed = self.owed[:, table.first : table.first + table.count] if table.count else None
        _settle[(blocks(table.positions, BLOCK),)](
            table.rows, len(table.rows), self.sums, self.moments, self.gamma, self.gradients, self.pitch,
            owed, self.owed.stride(0), table.count, table.positions, pixels, BLOCK=BLOCK,
        )  # fmt: skip

    def gradients_of(self, norm: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of its weight and bias [n], views; like: its weight."""
        at = slice(self.starts[norm], self.starts[norm] + len(like))
        return self.gradients[0, at], self.gradients[1, at]

    def columns(self, first: int, count: int) -> Norm:
        """What a read through these columns of affine is."""
        return Norm(*self.affine[:, first : first + count].unbind())

    def identity(self, count: int) -> Norm:
        """For a read through a ReLU alone."""
        if count not in self.identities:
            vectors = self.like.new_zeros((3, count), dtype=self.wide)
            vectors[1] = 1.0
            self.identities[count] = Norm(*vectors.unbind())
        return self.identities[count]

    def due(self, first: int | None, count: int, added: bool = False) -> Correction | None:
        """What is taken off the gradient of a value whose columns of statistics begin at `first`, None: nothing. added:
        negated."""
        if first is None:
            return None
        at = slice(first, first + count)
        return norm.due(self.owed[:, at], self.stats[0, at], self.affine, added)


def _beside(tensors: Sequence[Tensor]) -> Tensor | None:
    """[columns]; None of none."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0] if tensors else None


@lru_cache(maxsize=1024)
def _eps(norms: tuple[int, ...], channels: tuple[int, ...], eps: tuple[float, ...], device: torch.device) -> Tensor:
    """[columns] float64: of these norms, which have so many channels."""
    values = [eps[norm] for norm, count in zip(norms, channels, strict=True) for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64, device=device)
