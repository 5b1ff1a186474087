"""What the layers share: nn.BatchNorm2d modules as holders of parameters and running statistics of an operator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csp_kernels.backends import selected


def is_plain_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward


def is_plain_conv(conv: nn.Module, size: int) -> bool:
    """A convolution without bias that keeps H and W, size x size."""
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward or conv.bias is not None:
        return False
    place = (conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return place == ((1, 1), (size // 2, size // 2), (1, 1), "zeros")


def not_plain(name: str, child: nn.Module, size: int = 0) -> str:
    """Why an operator cannot stand for this norm (size 0) or convolution; "" if it can."""
    if is_plain_conv(child, size) if size else is_plain_norm(child):
        return ""
    if not size:
        return f"{name} is a {type(child).__name__}, not an nn.BatchNorm2d"
    pad = (size // 2, size // 2)
    return f"{name} is not a plain nn.Conv2d with stride 1, padding {pad} and no bias"


# where the convolutions and norms of a layer are, in the order of the operator's parameters
PATHS = {
    "pre": ("norm1", "conv1", "norm2", "conv2"),
    "post": ("conv1", "norm1", "conv2", "norm2"),
    "two_way": tuple(f"branch{b}.{kind}{i}" for b in (1, 2) for i in range(1, b + 2) for kind in ("conv", "norm")),
}
_SIZES = {  # of each kernel, 0 for a norm
    kind: [0 if "norm" in path else 1 if path.endswith("conv1") else 3 for path in paths]
    for kind, paths in PATHS.items()
}
_SPLIT = {kind: [path.split(".") for path in paths] for kind, paths in PATHS.items()}


def layer_children(block: nn.Module, kind: str) -> list[Any]:
    """PATHS of every layer; past nn.Module.__getattr__, which costs as much as a small operator."""
    children = []
    for layer in block._modules.values():
        for path in _SPLIT[kind]:
            child: Any = layer
            for name in path:
                child = child._modules[name]
            children.append(child)
    return children


def not_plain_layers(children: Sequence[Any], kind: str, prefix: str = "") -> str:
    """Which of layer_children the operator cannot stand for, and why; "" if there is none."""
    sizes = _SIZES[kind]
    for i, child in enumerate(children):
        layer, position = divmod(i, len(sizes))
        size = sizes[position]
        if not (is_plain_conv(child, size) if size else is_plain_norm(child)):
            return not_plain(f"{prefix}denselayer{layer + 1}.{PATHS[kind][position]}", child, size)
    return ""


def parameters(children: Sequence[Any]) -> list[Tensor | None]:
    """Of convolutions and norms, in order, as the operators take them."""
    return [p for m in children for p in ((m.weight, m.bias) if isinstance(m, nn.BatchNorm2d) else (m.weight,))]


def only_norms(children: Sequence[Any]) -> list[Any]:
    return [m for m in children if isinstance(m, nn.BatchNorm2d)]


def warn_once(module: Any, reason: str) -> None:
    """Say that the module runs as its reference does, the first time; RuntimeError if "native" was chosen."""
    if selected() == "native":
        raise RuntimeError(f"backend 'native': {reason}; choose use_backend('auto') or 'reference'")
    if not module._warned:
        module._warned = True
        name = f"csp.{type(module).__name__}"
        warnings.warn(f"{name} runs its plain PyTorch reference: {reason}", RuntimeWarning, stacklevel=4)


def frozen_norms(norms: Sequence[Any]) -> tuple[list[bool], list[Tensor]]:
    """Which norms use their running statistics, and those: mean, variance of each."""
    means = [norm.running_mean for norm in norms]
    frozen = [not norm.training and mean is not None for norm, mean in zip(norms, means, strict=True)]
    return frozen, [t for i, flag in enumerate(frozen) if flag for t in (means[i], norms[i].running_var)]


def prefixes(norms: Sequence[Any], features: int) -> list[tuple[int, int]]:
    """(start, length) in the stats of `ops.dense_block` of each norm: a prefix of the features, or its bottleneck."""
    columns, start = [], features
    for norm1, norm2 in zip(norms[::2], norms[1::2], strict=True):
        columns += [(0, norm1.num_features), (start, norm2.num_features)]
        start += norm2.num_features
    return columns


def consecutive(norms: Sequence[Any], start: int = 0) -> list[tuple[int, int]]:
    """(start, length) in stats of norms that stand side by side there."""
    columns = []
    for norm in norms:
        columns.append((start, norm.num_features))
        start += norm.num_features
    return columns


def _check_memory(norms: Sequence[Any]) -> None:
    """PyTorch would write to freed running statistics, and end the process."""
    if torch.compiler.is_compiling():
        return
    for norm in norms:
        for name in ("running_mean", "running_var"):
            t = getattr(norm, name)
            if type(t) is Tensor and t.data_ptr() == 0 and t.numel() and not t.is_meta:
                raise RuntimeError(f"{name} {list(t.shape)}: got a freed storage of 0 bytes, expected its values")


@torch.no_grad()
def update_running(norms: Sequence[Any], columns: Sequence[tuple[int, int]], stats: Tensor, count: int) -> None:
    """Advance the running statistics as nn.BatchNorm2d does, from batch means and variances over `count` values.

    stats [2, columns]: mean and biased variance; columns: (start, length) of each norm in it.
    """
    _check_memory(norms)
    counters: list[Tensor] = []
    groups: dict[tuple[float | None, torch.dtype], list[tuple[Tensor, Tensor, Tensor | None, int, int]]] = {}
    for norm, (start, length) in zip(norms, columns, strict=True):
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
