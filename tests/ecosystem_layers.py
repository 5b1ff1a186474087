"""One of each fused layer behind a convolution, beside its twin of plain modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from modes import twins
from torch import Tensor, nn

import csp_kernels as csp

CHANNELS = 6
WHERE = (csp, csp.reference)


class Fused(nn.Module):
    """One layer on [N, CHANNELS, H, W], whatever it takes and gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if "PartialTransition" in type(self.layer).__name__:
            return self.layer(x[:, :2] if self.layer.part_channels else None, x[:, 2:])
        if "ConcatConv" in type(self.layer).__name__:
            y = self.layer([x[:, :2], x[:, 2:]])
            return y if isinstance(y, Tensor) else torch.cat([y[0] * 2, y[1]], 1)
        return self.layer(x)


def stage(where: Any, layer: str, **options: Any) -> nn.Module:
    return where.CSPDenseStage(CHANNELS, 4, 2, 2, 2, layer=layer, part_ratio=1 / 3, **options)


LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    "dense": lambda where: where.DenseBlock(2, CHANNELS, 3, 2),
    "dense, bottleneck": lambda where: where.DenseBlock(
        2, CHANNELS, 3, 2, **({"recompute": "bottleneck"} if where is csp else {})
    ),
    "post": lambda where: where.PostDenseBlock(2, CHANNELS, 3, 2),
    "two_way": lambda where: where.TwoWayDenseBlock(2, CHANNELS, 4),
    "transition": lambda where: where.Transition(CHANNELS, 4),
    "join": lambda where: where.ConcatConv([2, 4], 5, act="silu"),
    "fork": lambda where: where.ConcatConv([2, 4], [2, 3], act="mish"),
    "csp, post": lambda where: where.PartialTransition(2, 4, 3, 5),
    "first, pre": lambda where: where.PartialTransition(2, 4, 3, 5, fusion="first", order="pre"),
    "last, pre": lambda where: where.PartialTransition(2, 4, 3, 5, fusion="last", order="pre", pool=None),
    "stage pre": lambda where: stage(where, "pre"),
    "stage pre, bottleneck": lambda where: stage(where, "pre", recompute="bottleneck"),
    "stage post": lambda where: stage(where, "post", fusion="first"),
    "stage two_way": lambda where: stage(where, "two_way", fusion="last", pool=None),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name: str, change: Callable[[nn.Module], Any] = nn.Module.train) -> tuple[nn.Module, nn.Module]:
    """The layer and its twin in float64 with the same random parameters."""
    both = [nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), Fused(LAYERS[name](where))) for where in WHERE]
    twins(*both, change)
    return both[0], both[1]


def image(n: int = 2, channels: int = 3, size: int = 4) -> Tensor:
    return torch.randn(n, channels, size, size, dtype=torch.float64)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
