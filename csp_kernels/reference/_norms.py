"""Batch norms of the functional references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


@torch.no_grad()
def statistics(t: Tensor, wanted: bool = True) -> Tensor:
    """[N, c, H, W] -> [2, c] float64: mean and biased variance; zeros if not wanted or without a value."""
    if not wanted or t.numel() == 0:
        return t.new_zeros((2, t.shape[1]), dtype=torch.float64)
    var, mean = torch.var_mean(t.double(), (0, 2, 3), correction=0)
    return torch.stack((mean, var))


class Norms:
    """Batch norms called in their order, each with batch statistics or, where frozen, with the running ones given."""

    def __init__(
        self, count: int, running: Sequence[Tensor], frozen: Sequence[bool] | None, eps: float | Sequence[float]
    ) -> None:
        frozen = [False] * count if frozen is None else frozen
        eps = [eps] * count if isinstance(eps, (int, float)) else eps
        self._norms = iter(list(zip(frozen, eps, strict=True)))
        self._running = iter(list(running))
        self._columns: list[Tensor] = []

    def __call__(self, t: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """[N, c, H, W] -> [N, c, H, W]"""
        frozen, eps = next(self._norms)
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32  # of parameters and statistics
        mean, var = (next(self._running).to(dtype), next(self._running).to(dtype)) if frozen else (None, None)
        self._columns.append(statistics(t, not frozen))
        return F.batch_norm(t, mean, var, to(weight, dtype), to(bias, dtype), not frozen, 0.0, eps)

    def stats(self) -> Tensor:
        """[2, columns] float64: batch mean and biased variance of each norm's channels, in order."""
        return torch.cat(self._columns, 1)


def conv(x: Tensor, weight: Tensor | None) -> Tensor:
    """The convolution that keeps H and W, in the dtype of x."""
    assert weight is not None
    return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[2] // 2)
