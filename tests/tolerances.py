"""The one table of tolerances. Errors are relative in the 2-norm and measured against the float64 reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csp_kernels import native

# allowed on top of twice the naive reference's own error, per square root of the reduction length;
# float64 is its own yardstick (naive error 0), so its floor has to cover badly conditioned sums too
FLOOR = {torch.float64: 3e-14, torch.float32: 2e-8, torch.float16: 3e-5, torch.bfloat16: 3e-4}
# allowed for float32 matmul precision "high" and "medium", which permit Winograd F(4x4, 3x3)
HIGH = 2e-6
# and where "high" products take two bfloat16 parts of each value, 1x1 ones as well: on tiles (AMX)
HIGH_ON_TILES = 2e-5


def error(got: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """||got - exact|| / scale in float64, scale ||exact|| by default (1 where that is 0); NaN if anything is."""
    assert got.shape == exact.shape, f"{list(got.shape)}, expected {list(exact.shape)}"
    scale = exact.double().norm().item() if scale is None else scale
    return (got.double() - exact.double()).norm().item() / (scale or 1.0)


def limit(naive: float, dtype: torch.dtype, reduction: int) -> float:
    """Largest error allowed beside the naive reference's error in the same storage dtype."""
    return 2 * naive + FLOOR[dtype] * math.sqrt(reduction)


def high_limit(reduction: int, mean_over_std: float = 0.0) -> float:
    """Of precision "high" and "medium". mean_over_std: of what products read, and round with its mean."""
    if native.isa() == "v4amx":
        return HIGH_ON_TILES * math.sqrt(reduction) * max(1.0, mean_over_std)
    return HIGH * math.sqrt(reduction)
