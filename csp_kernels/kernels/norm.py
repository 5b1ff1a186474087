"""What norms still owe the gradient of a value: dx = G - ((x - mean) * slope + offset), paid when the gradient is next
read. The vectors, of a number a channel, are computed in float64."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import launch
from csp_kernels.kernels.launch import Correction, blocks

BLOCK = 128  # channels a program: with 256, sm_100 spills


@triton.jit
def lost(mean, low):
    """What low, the mean as its dtype has it, lacks: nothing of an infinite one."""
    wide = low.to(tl.float64)
    return tl.where(mean == wide, 0.0, mean - wide)


@triton.jit
def _owed_kernel(owed, owed_pitch, mean, out, n, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    """owed [2, n] -> out [3, n]: mean, SIGN * slope, SIGN * offset."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < n
    m = tl.load(mean + c, inside, 0.0)
    slope = tl.load(owed + owed_pitch + c, inside, 0.0)
    low = m.to(out.dtype.element_ty)
    offset = tl.load(owed + c, inside, 0.0) - tl.where(slope == 0.0, 0.0, slope * lost(m.to(tl.float64), low))
    tl.store(out + c, low, inside)
    tl.store(out + n + c, (slope * SIGN).to(out.dtype.element_ty), inside)
    tl.store(out + 2 * n + c, (offset * SIGN).to(out.dtype.element_ty), inside)


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


def due(owed: Tensor, mean: Tensor, like: Tensor, added: bool = False) -> Correction:
    """owed [2, n] float64 view (mean, slope), mean [n] -> what to subtract, or to add, in the type of like."""
    n = owed.shape[1]
    out = like.new_empty((3, n))
    sign = -1.0 if added else 1.0
    _owed_kernel[(blocks(n, BLOCK),)](owed, owed.stride(0), mean, out, n, SIGN=sign, BLOCK=BLOCK)
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
