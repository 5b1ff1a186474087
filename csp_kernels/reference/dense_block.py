"""The dense block with naive concatenation in plain PyTorch (DenseNet-BC, arXiv 1608.06993, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks

from csp_kernels.reference._norms import statistics, to


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1, batch norm, ReLU, 3x3: [N, in_channels, H, W] -> [N, growth_rate, H, W]."""

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(_activated(self.norm1, x))  # [N, bn_size * growth_rate, H, W]
        y = self.conv2(_activated(self.norm2, z))
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU of the norm, in place as torchvision's, unless a backward hook or another norm may need its own output."""
    hooks = norm._backward_hooks, norm._backward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks
    return F.relu(norm(x), inplace=type(norm) is nn.BatchNorm2d and not any(hooks))


class DenseBlock(nn.Module):
    """Dense block that concatenates: [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].

    Children denselayer{i}.{norm1,conv1,norm2,conv2}, i from 1: torchvision's state_dict keys.
    Raises ValueError for sizes below 1 or a drop_rate outside [0, 1).
    """

    def __init__(
        self, num_layers: int, in_channels: int, growth_rate: int = 32, bn_size: int = 4, *, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "in_channels": in_channels, "growth_rate": growth_rate, "bn_size": bn_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate: got {drop_rate}, expected 0 <= drop_rate < 1")
        for i in range(num_layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, float(drop_rate))
            self.add_module(f"denselayer{i + 1}", layer)

    @property
    def drop_rate(self) -> float:
        """That of the first layer; setting it sets that of all."""
        return next((float(layer.drop_rate) for layer in self.children() if isinstance(layer, DenseLayer)), 0.0)

    @drop_rate.setter
    def drop_rate(self, rate: float) -> None:
        for layer in self.children():
            if isinstance(layer, DenseLayer):
                layer.drop_rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    drop_rate: float = 0.0,
    recompute: str = "none",
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The functional form, same arguments and results as `csp.ops.dense_block`, unchecked.

    Any floating dtype and device; differentiable any number of times. Stores everything: `recompute` does nothing.
    seed: drop what the fused operator drops with it; None drops as F.dropout does.
    """
    norms = len(params) // 3
    frozen = [False] * norms if frozen is None else frozen
    eps = [eps] * norms if isinstance(eps, (int, float)) else eps
    given = iter(running)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # of parameters and statistics

    def activate(t: Tensor, norm: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # [N, c, H, W]
        mean, var = (next(given).to(dtype), next(given).to(dtype)) if frozen[norm] else (None, None)
        weight, bias = to(weight, dtype), to(bias, dtype)
        return F.relu(F.batch_norm(t, mean, var, weight, bias, not frozen[norm], 0.0, eps[norm]), inplace=True)

    features, widths = [x], []
    for layer in range(norms // 2):
        weight1, bias1, conv1, weight2, bias2, conv2 = params[6 * layer : 6 * layer + 6]
        assert conv1 is not None and conv2 is not None
        z = F.conv2d(activate(torch.cat(features, 1), 2 * layer, weight1, bias1), conv1.to(x.dtype))
        y = F.conv2d(activate(z, 2 * layer + 1, weight2, bias2), conv2.to(x.dtype), padding=1)
        features.append(dropped(y, drop_rate, seed, layer) if drop_rate > 0 else y)
        widths.append(statistics(z, not frozen[2 * layer + 1]))
    y = torch.cat(features, 1)
    return y, torch.cat([statistics(y, not all(frozen[::2])), *widths], 1)


def dropped(y: Tensor, rate: float, seed: Tensor | None, layer: int) -> Tensor:
    """y [N, g, H, W] with elements dropped: with a seed, by the kernels' hash of seed, layer, pixel and channel."""
    if seed is None:
        return F.dropout(y, rate)
    n, g, h, w = y.shape
    pixel, channel = torch.arange(n * h * w, device=y.device), torch.arange(g, device=y.device)
    index = (pixel * 4096).view(n, 1, h, w) + channel.view(1, g, 1, 1)

    def times(t: Tensor, factor: int) -> Tensor:  # unsigned, modulo 2^32; int64 products wrap
        return (t * factor) & 0xFFFFFFFF

    key = times((seed ^ (seed >> 32)) & 0xFFFFFFFF, 0x9E3779B9) + layer * 0x85EBCA6B
    hashed = (index & 0xFFFFFFFF) ^ times(index >> 32, 0x27D4EB2F) ^ (key & 0xFFFFFFFF)
    hashed = times(hashed ^ (hashed >> 16), 0x7FEB352D)
    hashed = times(hashed ^ (hashed >> 15), 0x846CA68B)
    hashed = hashed ^ (hashed >> 16)
    return (y * (1 / (1 - rate))).masked_fill(hashed < int(rate * 4294967295.0), 0.0)
