"""The dense block as a module with torchvision's parameters, run as one operator."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csp_kernels import ops, reference
from csp_kernels.backends import selected
from csp_kernels.ops.dense_block import RECOMPUTE


class DenseBlock(reference.DenseBlock):
    """Dense block, nothing concatenated: [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].

    Each layer is batch norm, ReLU, 1x1 to bn_size * growth_rate, batch norm, ReLU, 3x3 to growth_rate, dropout
    (DenseNet-BC, arXiv 1608.06993, section 3). Children denselayer{i}.{norm1,conv1,norm2,conv2} hold the parameters
    under torchvision's state_dict keys; the norms are plain nn.BatchNorm2d and count as such: momentum, eps, affine,
    track_running_stats, train and eval (a norm in eval mode is frozen) act as usual. The children are not called, so
    their hooks do not run.

    recompute: "none" keeps features and bottlenecks for backward, "bottleneck" features alone (one more 1x1 product).
    dtypes, memory formats and errors: `csp.ops.dense_block`. Blocks with other norms (SyncBatchNorm) or changed
    convolutions run layer by layer as the reference does, with one warning; RuntimeError if "native" was chosen.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int = 32,
        bn_size: int = 4,
        *,
        drop_rate: float = 0.0,
        recompute: str = "none",
    ) -> None:
        super().__init__(num_layers, in_channels, growth_rate, bn_size, drop_rate=drop_rate)
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(RECOMPUTE)}")
        self.recompute = recompute
        self._warned = False

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self.children())
        reason = _not_plain(layers)
        if reason:
            return self._layer_by_layer(x, reason)
        norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
        frozen = [not norm.training and norm.running_mean is not None for norm in norms]
        fixed = [norm for norm, flag in zip(norms, frozen, strict=True) if flag]
        y, stats = ops.dense_block(
            x,
            [p for layer in layers for p in _parameters(layer)],
            [t for norm in fixed for t in (norm.running_mean, norm.running_var)],
            frozen=frozen,
            eps=[norm.eps for norm in norms],
            drop_rate=self.drop_rate if self.training else 0.0,
            recompute=self.recompute,
        )
        if not all(frozen):
            _update_running(norms, stats, y.shape[1], y.numel() // y.shape[1])
        return y

    def _layer_by_layer(self, x: Tensor, reason: str) -> Tensor:
        if selected() == "native":
            raise RuntimeError(f"backend 'native': {reason}; choose use_backend('auto') or 'reference'")
        if not self._warned:
            self._warned = True
            warnings.warn(f"csp.DenseBlock runs its plain PyTorch reference: {reason}", RuntimeWarning, stacklevel=3)
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}, recompute={self.recompute!r}"


def _parameters(layer: Any) -> tuple[Tensor | None, ...]:
    norm1, norm2 = layer.norm1, layer.norm2
    return norm1.weight, norm1.bias, layer.conv1.weight, norm2.weight, norm2.bias, layer.conv2.weight


def _not_plain(layers: Sequence[nn.Module]) -> str:
    """Which child the operator cannot stand for, and why; "" if there is none."""
    for i, layer in enumerate(layers):
        for name in ("norm1", "norm2"):
            norm = getattr(layer, name)
            if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
                return f"denselayer{i + 1}.{name} is a {type(norm).__name__}, not an nn.BatchNorm2d"
        for name, padding in (("conv1", (0, 0)), ("conv2", (1, 1))):
            if not _is_plain(getattr(layer, name), padding):
                return f"denselayer{i + 1}.{name} is not a plain nn.Conv2d with stride 1, padding {padding} and no bias"
    return ""


def _is_plain(conv: nn.Module, padding: tuple[int, int]) -> bool:
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward or conv.bias is not None:
        return False
    place = (conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return place == ((1, 1), padding, (1, 1), "zeros")


def _columns(norms: Sequence[nn.BatchNorm2d], channels: int) -> Iterator[tuple[int, int]]:
    """Columns of stats [2, channels + L * b] of each norm: a prefix of the features, or its bottleneck."""
    start = channels
    for norm1, norm2 in zip(norms[::2], norms[1::2], strict=True):
        yield 0, norm1.num_features
        yield start, start + norm2.num_features
        start += norm2.num_features


@torch.no_grad()
def _update_running(norms: Sequence[Any], stats: Tensor, channels: int, count: int) -> None:
    """Advance the running statistics as nn.BatchNorm2d does, from batch means and variances over `count` values."""
    tracked = [pair for pair in zip(norms, _columns(norms, channels), strict=True) if _tracks(pair[0])]
    counters = [norm.num_batches_tracked for norm, _ in tracked if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    if count == 0:  # an empty batch counts as one and changes nothing else
        return
    stats = torch.stack((stats[0], stats[1] * (count / (count - 1))))  # mean, unbiased variance
    groups: dict[tuple[float | None, torch.dtype], list[tuple[Any, tuple[int, int]]]] = {}
    for norm, columns in tracked:
        groups.setdefault((norm.momentum, norm.running_mean.dtype), []).append((norm, columns))
    for (momentum, dtype), group in groups.items():
        mean, var = stats.to(dtype).unbind()
        new = [row[i:j] for row in (mean, var) for _, (i, j) in group]
        old = [norm.running_mean for norm, _ in group] + [norm.running_var for norm, _ in group]
        if momentum is not None:
            torch._foreach_mul_(old, 1 - momentum)
            torch._foreach_add_(old, new, alpha=momentum)
        else:  # cumulative average
            shares = [norm.num_batches_tracked.to(dtype).reciprocal() for norm, _ in group] * 2
            for buffer, value, share in zip(old, new, shares, strict=True):
                buffer.lerp_(value, share)


def _tracks(norm: nn.BatchNorm2d) -> bool:
    return norm.training and norm.track_running_stats and norm.running_mean is not None
