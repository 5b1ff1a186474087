"""Batch norms around the products: vectors of a value a channel, computed in float64, and what a norm still owes the
gradient of its input. dx = G - ((x - mean) * slope + offset) is paid when the gradient is next read."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import launch
from csp_kernels.kernels.launch import Correction, Norm, blocks

BLOCK = 128  # channels a program: with 256, sm_100 spills


@triton.jit
def _lost(mean, low):
    """What low, the mean as its dtype has it, lacks: nothing of an infinite one."""
    wide = low.to(tl.float64)
    return tl.where(mean == wide, 0.0, mean - wide)


@triton.jit
def _affine_kernel(mean, var, gamma, beta, out, pitch, n, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """out [3, n]: mean, scale and shift of `Norm`; shift holds what the dtype of out loses of the mean."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0).to(tl.float64)
    v = tl.load(var + c, inside, 1.0).to(tl.float64)
    s = tl.load(gamma + c, inside, 0.0).to(tl.float64) / tl.sqrt(v + EPS)
    low = m.to(out.dtype.element_ty)
    shift = tl.load(beta + c, inside, 0.0).to(tl.float64) - _lost(m, low) * s
    tl.store(out + c, low, inside)
    tl.store(out + pitch + c, s.to(out.dtype.element_ty), inside)
    tl.store(out + 2 * pitch + c, shift.to(out.dtype.element_ty), inside)


@triton.jit
def _settle_kernel(
    sums,
    sums_pitch,
    mean,
    var,
    gamma,
    dgamma,
    dbeta,
    owed,
    owed_pitch,
    correction,
    n,
    P,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums [2, n] of dn and dn * (x - mean) -> dgamma, dbeta, and what the norm takes from the gradient of its input:
    added to owed [2, n] (mean, slope), or written to correction [3, n] (mean, slope, offset); either may be None."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0).to(tl.float64)
    r = 1.0 / tl.sqrt(tl.load(var + c, inside, 1.0).to(tl.float64) + EPS)
    low = m.to(dgamma.dtype.element_ty)
    lost = _lost(m, low)
    bias = tl.load(sums + c, inside, 0.0).to(tl.float64)
    weight = r * (tl.load(sums + sums_pitch + c, inside, 0.0).to(tl.float64) - lost * bias)
    tl.store(dbeta + c, bias.to(dbeta.dtype.element_ty), inside)
    tl.store(dgamma + c, weight.to(dgamma.dtype.element_ty), inside)
    s = tl.load(gamma + c, inside, 0.0).to(tl.float64) * r / P
    if owed is not None:
        at = owed + owed_pitch + c
        tl.store(owed + c, tl.load(owed + c, inside, 0.0) + s * bias, inside)
        tl.store(at, tl.load(at, inside, 0.0) + s * r * weight, inside)
    if correction is not None:
        slope = -s * r * weight
        tl.store(correction + c, low, inside)
        tl.store(correction + n + c, slope.to(correction.dtype.element_ty), inside)
        tl.store(correction + 2 * n + c, (-s * bias - slope * lost).to(correction.dtype.element_ty), inside)


@triton.jit
def _owed_kernel(owed, owed_pitch, mean, out, n, BLOCK: tl.constexpr):
    """owed [2, n] -> out [3, n]: mean, slope, offset."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0)
    slope = tl.load(owed + owed_pitch + c, inside, 0.0)
    low = m.to(out.dtype.element_ty)
    offset = tl.load(owed + c, inside, 0.0) - tl.where(slope == 0.0, 0.0, slope * _lost(m.to(tl.float64), low))
    tl.store(out + c, low, inside)
    tl.store(out + n + c, slope.to(out.dtype.element_ty), inside)
    tl.store(out + 2 * n + c, offset.to(out.dtype.element_ty), inside)


@triton.jit
def _pay_kernel(
    grad, grad_pitch, x, x_pitch, mean, slope, offset, out, out_pitch, P, N,
    UNIT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    N = N * UNIT
    p = (tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP))[:, None]
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    ok = (p < P) & (n < N)
    m, s, t = tl.load(mean + n, n < N, 0.0), tl.load(slope + n, n < N, 0.0), tl.load(offset + n, n < N, 0.0)
    f = tl.load(x + p * (x_pitch * UNIT) + n, ok, 0.0).to(mean.dtype.element_ty)
    g = tl.load(grad + p * (grad_pitch * UNIT) + n, ok, 0.0).to(mean.dtype.element_ty)
    taken = tl.where(s == 0.0, t, (f - m) * s + t)  # where nothing is owed, NaN in x is not seen
    tl.store(out + p * (out_pitch * UNIT) + n, (g - taken).to(out.dtype.element_ty), ok)


class BatchNorm(NamedTuple):
    """One norm of a call: its statistics, parameters and whether they are fixed."""

    mean: Tensor  # [n] of the batch, float64, or running
    var: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    frozen: bool

    def load(self, out: Tensor | None = None) -> Norm:
        """out [3, n] view: where to write mean, scale and shift."""
        n = len(self.gamma)
        out = self.gamma.new_empty((3, n)) if out is None else out
        moments = self.mean, self.var, self.gamma, self.beta
        _affine_kernel[(blocks(n, BLOCK),)](*moments, out, out.stride(0), n, EPS=self.eps, BLOCK=BLOCK)
        return Norm(*out.unbind())

    def settle(self, sums: Tensor, pixels: int, owed: Tensor | None = None) -> tuple[Tensor, Tensor, Correction | None]:
        """sums [2, n] view, of dn and dn * (x - mean), -> gradients of weight and bias; what the norm takes from its
        input's gradient: added to owed [2, n] float64 if given."""
        n = len(self.gamma)
        dgamma, dbeta = torch.empty_like(self.gamma), torch.empty_like(self.beta)
        correction = self.gamma.new_empty((3, n)) if owed is None and not self.frozen else None
        owed, pitch = (None, 0) if owed is None or self.frozen else (owed, owed.stride(0))
        moments = self.mean, self.var, self.gamma
        _settle_kernel[(blocks(n, BLOCK),)](
            sums, sums.stride(0), *moments, dgamma, dbeta, owed, pitch, correction, n, pixels, EPS=self.eps, BLOCK=BLOCK
        )
        return dgamma, dbeta, None if correction is None else Correction(*correction.unbind())


def due(owed: Tensor, mean: Tensor, like: Tensor) -> Correction:
    """owed [2, n] float64 view (mean, slope), mean [n] -> what to subtract, in the type of like."""
    n = owed.shape[1]
    out = like.new_empty((3, n))
    _owed_kernel[(blocks(n, BLOCK),)](owed, owed.stride(0), mean, out, n, BLOCK=BLOCK)
    return Correction(*out.unbind())


def pay(grad: Tensor, x: Tensor, owed: Correction, out: Tensor) -> None:
    """out [P, n] view = grad - ((x - mean) * slope + offset); out may be grad."""
    pixels, n = x.shape
    u = launch.unit(n, grad.stride(0), x.stride(0), out.stride(0))
    block = launch.power(n, 16, 128)
    rows = 2048 // block
    _pay_kernel[(blocks(pixels, rows), blocks(n, block))](
        grad, grad.stride(0) // u, x, x.stride(0) // u, owed.mean, owed.slope, owed.offset, out, out.stride(0) // u,
        pixels, n // u, UNIT=u, BP=rows, BN=block,
    )  # fmt: skip
