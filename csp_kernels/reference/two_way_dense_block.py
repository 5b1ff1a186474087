"""PeleeNet's two-way dense block with naive concatenation (arXiv 1804.06882, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels.reference._norms import Norms, conv


class Branch(nn.Module):
    """1x1 to inter channels, then 3x3 convolutions, each with batch norm and ReLU: children conv1, norm1, conv2, ..."""

    def __init__(self, in_channels: int, inter: int, growth: int, convs: int) -> None:
        super().__init__()
        for i in range(1, convs + 1):
            source, target = (in_channels, inter) if i == 1 else (inter if i == 2 else growth, growth)
            size = 1 if i == 1 else 3
            self.add_module(f"conv{i}", nn.Conv2d(source, target, size, padding=size // 2, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(target))

    def forward(self, x: Tensor) -> Tensor:
        children: list[Any] = list(self._modules.values())  # children() would leave out what is there twice
        for convolution, norm in zip(children[::2], children[1::2], strict=True):
            x = F.relu(norm(convolution(x)))
        return x


class TwoWayDenseLayer(nn.Module):
    """Two branches side by side: [N, in_channels, H, W] -> [N, growth_rate, H, W], half of it from each."""

    def __init__(self, in_channels: int, growth_rate: int, bottleneck_width: float) -> None:
        super().__init__()
        half = growth_rate // 2
        inter = inter_channels(in_channels, growth_rate, bottleneck_width)
        self.branch1 = Branch(in_channels, inter, half, 2)
        self.branch2 = Branch(in_channels, inter, half, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x)), 1)


class TwoWayDenseBlock(nn.Module):
    """PeleeNet's dense block: [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].

    A layer appends branch1 (1x1, 3x3) and branch2 (1x1, 3x3, 3x3), growth_rate / 2 channels each, every convolution
    with batch norm and ReLU after it. The 1x1 give int(growth_rate / 2 * bottleneck_width / 4) * 4 channels, or
    int(k / 8) * 4 if that is more than half of the layer's k input channels (as PeleeNet's code), at least 4.
    Children denselayer{i}.branch1.{conv1,norm1,conv2,norm2}, denselayer{i}.branch2.{..., conv3,norm3}, i from 1.
    Raises ValueError for sizes below 1, an odd growth_rate or a bottleneck_width of 0 or less.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int = 32, bottleneck_width: float = 1) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("in_channels", in_channels), ("growth_rate", growth_rate)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if growth_rate % 2:
            raise ValueError(f"growth_rate: got {growth_rate}, expected an even number, half for each branch")
        if not bottleneck_width > 0:
            raise ValueError(f"bottleneck_width: got {bottleneck_width}, expected more than 0")
        for i in range(num_layers):
            layer = TwoWayDenseLayer(in_channels + i * growth_rate, growth_rate, bottleneck_width)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat((x, layer(x)), 1)
        return x


def inter_channels(in_channels: int, growth_rate: int, bottleneck_width: float) -> int:
    """Output channels of both 1x1 convolutions of a layer."""
    inter = int(growth_rate // 2 * bottleneck_width / 4) * 4
    return max(4, int(in_channels / 8) * 4 if inter > in_channels / 2 else inter)


def two_way_dense_block(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The functional form, same arguments and results as `csp.ops.two_way_dense_block`, unchecked.

    Any floating dtype and device; differentiable any number of times.
    """
    norms, features = Norms(len(params) // 3, running, frozen, eps), [x]

    def branch(y: Tensor, start: int, stop: int) -> Tensor:
        for i in range(start, stop, 3):
            w, weight, bias = params[i : i + 3]
            y = F.relu(norms(conv(y, w), weight, bias))
        return y

    for i in range(0, len(params), 15):
        y = torch.cat(features, 1)
        features += [branch(y, i, i + 6), branch(y, i + 6, i + 15)]
    return torch.cat(features, 1), norms.stats()
