"""The dense block as a module with torchvision's parameters, run as one operator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
        layers = [_children(layer) for layer in self.children()]
        reason = _not_plain(layers)
        if reason:
            return self._layer_by_layer(x, reason)
        norms = [norm for norm1, _, norm2, _ in layers for norm in (norm1, norm2)]
        means = [norm.running_mean for norm in norms]
        frozen = [not norm.training and mean is not None for norm, mean in zip(norms, means, strict=True)]
        y, stats = ops.dense_block(
            x,
            [p for n1, c1, n2, c2 in layers for p in (n1.weight, n1.bias, c1.weight, n2.weight, n2.bias, c2.weight)],
            [t for i, flag in enumerate(frozen) if flag for t in (means[i], norms[i].running_var)],
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


def _children(layer: nn.Module) -> tuple[Any, Any, Any, Any]:
    """norm1, conv1, norm2, conv2; past nn.Module.__getattr__, which costs as much as a small operator."""
    modules = layer._modules
    return modules["norm1"], modules["conv1"], modules["norm2"], modules["conv2"]


def _not_plain(layers: Sequence[tuple[Any, Any, Any, Any]]) -> str:
    """Which child the operator cannot stand for, and why; "" if there is none."""
    for i, (norm1, conv1, norm2, conv2) in enumerate(layers):
        for name, norm in (("norm1", norm1), ("norm2", norm2)):
            if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
                return f"denselayer{i + 1}.{name} is a {type(norm).__name__}, not an nn.BatchNorm2d"
        for name, conv, pad in (("conv1", conv1, (0, 0)), ("conv2", conv2, (1, 1))):
            if not _is_plain(conv, pad):
                return f"denselayer{i + 1}.{name} is not a plain nn.Conv2d with stride 1, padding {pad} and no bias"
    return ""


def _is_plain(conv: nn.Module, padding: tuple[int, int]) -> bool:
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward or conv.bias is not None:
        return False
    place = (conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return place == ((1, 1), padding, (1, 1), "zeros")


def _columns(norms: Sequence[nn.BatchNorm2d], channels: int) -> list[tuple[int, int]]:
    """(start, length) in stats [2, channels + L * b] of each norm: a prefix of the features, or its bottleneck."""
    columns, start = [], channels
    for norm1, norm2 in zip(norms[::2], norms[1::2], strict=True):
        columns += [(0, norm1.num_features), (start, norm2.num_features)]
        start += norm2.num_features
    return columns


@torch.no_grad()
def _update_running(norms: Sequence[Any], stats: Tensor, channels: int, count: int) -> None:
    """Advance the running statistics as nn.BatchNorm2d does, from batch means and variances over `count` values."""
    counters: list[Tensor] = []
    groups: dict[tuple[float | None, torch.dtype], list[tuple[Tensor, Tensor, Tensor | None, int, int]]] = {}
    for norm, (start, length) in zip(norms, _columns(norms, channels), strict=True):
        if not (norm.training and norm.track_running_stats):
            continue
        mean, counter = norm.running_mean, norm.num_batches_tracked
        if counter is not None:
            counters.append(counter)
        if mean is not None:
            entry = mean, norm.running_var, counter, start, length
            groups.setdefault((norm.momentum, mean.dtype), []).append(entry)
    if counters:
        torch._foreach_add_(counters, 1)
    if count == 0:  # an empty batch counts as one and changes nothing else
        return
    for (momentum, dtype), group in groups.items():
        mean, var = stats[0].to(dtype), (stats[1] * (count / (count - 1))).to(dtype)  # unbiased
        old = [t for row in group for t in row[:2]]
        new = [t.narrow(0, start, length) for *_, start, length in group for t in (mean, var)]
        if momentum is not None:
            torch._foreach_lerp_(old, new, momentum)
        else:  # cumulative average
            counts = [counter for _, _, counter, _, _ in group for _ in range(2)]
            for buffer, value, counter in zip(old, new, counts, strict=True):
                if counter is not None:
                    buffer.lerp_(value, counter.to(dtype).reciprocal())
