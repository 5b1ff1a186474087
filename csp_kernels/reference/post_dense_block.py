"""The dense block in the order convolution, batch norm, ReLU, with naive concatenation (arXiv 1911.11929, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels.reference._norms import Norms, conv


class PostDenseLayer(nn.Module):
    """1x1, batch norm, ReLU, 3x3, batch norm, ReLU: [N, in_channels, H, W] -> [N, growth_rate, H, W]."""

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(growth_rate)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class PostDenseBlock(nn.Module):
    """Post-activation dense block: [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].

    Children denselayer{i}.{conv1,norm1,conv2,norm2}, i from 1. Raises ValueError for sizes below 1.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int = 32, bn_size: int = 4) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "in_channels": in_channels, "growth_rate": growth_rate, "bn_size": bn_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        for i in range(num_layers):
            self.add_module(f"denselayer{i + 1}", PostDenseLayer(in_channels + i * growth_rate, growth_rate, bn_size))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def post_dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The functional form, same arguments and results as `csp.ops.post_dense_block`, unchecked.

    Any floating dtype and device; differentiable any number of times.
    """
    norms, features = Norms(len(params) // 3, running, frozen, eps), [x]
    for i in range(0, len(params), 6):
        y = torch.cat(features, 1)
        for w, weight, bias in (params[i : i + 3], params[i + 3 : i + 6]):
            y = F.relu(norms(conv(y, w), weight, bias))
        features.append(y)
    return torch.cat(features, 1), norms.stats()
