"""What the layers share: nn.BatchNorm2d modules as holders of parameters and running statistics of an operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from csp_kernels import native


def parameters(children: Sequence[Any]) -> list[Tensor | None]:
    """Of convolutions and norms, in order, as the operators take them."""
    params: list[Tensor | None] = []
    for m in children:
        params.append(_own(m, m._parameters, "weight"))
        if isinstance(m, nn.BatchNorm2d):
            params.append(_own(m, m._parameters, "bias"))
    return params


def _own(module: nn.Module, store: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """module.<name>, past nn.Module.__getattr__ unless something else (a parametrization) computes it."""
    if name in store:
        return store[name]
    found: Tensor | None = getattr(module, name)
    return found


def only_norms(children: Sequence[Any]) -> list[Any]:
    return [m for m in children if isinstance(m, nn.BatchNorm2d)]


def frozen_norms(norms: Sequence[Any]) -> tuple[list[bool], list[Tensor]]:
    """Which norms use their running statistics, and those: mean, variance of each."""
    frozen: list[bool] = []
    running: list[Any] = []
    for norm in norms:
        mean = _own(norm, norm._buffers, "running_mean")
        frozen.append(mean is not None and not norm.training)
        if frozen[-1]:
            running += [mean, _own(norm, norm._buffers, "running_var")]
    return frozen, running


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


def update_running(norms: Sequence[Any], columns: Sequence[tuple[int, int]], stats: Tensor, count: int) -> None:
    """Advance the running statistics as nn.BatchNorm2d does, from batch means and variances over `count` values.

    stats [2, columns]: mean and biased variance; columns: (start, length) of each norm in it. A count of 0, an empty
    batch, counts as one and changes nothing else.
    """
    moving = [pair for pair in zip(norms, columns, strict=True) if pair[0].training and pair[0].track_running_stats]
    in_one_call = _of_one_call(norm for norm, _ in moving)
    if in_one_call is not None:
        _update_in_one_call(in_one_call, moving, stats, count)
    else:
        _check_memory(norm for norm, _ in moving)
        _update(moving, stats, count)


_Running = tuple[list[Tensor], list[Tensor], list[Tensor]]  # means, variances, counters


def _of_one_call(norms: Iterable[Any]) -> _Running | None:
    """The buffers, if they are what the compiled operator takes and nobody records what is done to them."""
    if torch.compiler.is_compiling() or not native.available() or torch._C._are_functorch_transforms_active():
        return None
    found: _Running = [], [], []
    for norm in norms:
        buffers = norm._buffers
        mean, var, counter = (buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
        if norm.momentum is None or not (_plain(mean) and _plain(var) and type(counter) is Tensor and counter.is_cpu):
            return None
        for values, value in zip(found, (mean, var, counter), strict=True):
            values.append(value)
    return found


def _plain(t: object) -> TypeGuard[Tensor]:
    return type(t) is Tensor and t.is_cpu and t.dtype in _UPDATED and t.is_contiguous()


_UPDATED = (torch.float32, torch.float64)


def _update_in_one_call(
    running: _Running, moving: Sequence[tuple[Any, tuple[int, int]]], stats: Tensor, count: int
) -> None:
    means, vars_, counters = running
    starts, momenta = [start for _, (start, _) in moving], [float(norm.momentum) for norm, _ in moving]
    if not count:
        means, vars_, starts, momenta = [], [], [], []
    unbiased = count / (count - 1) if count > 1 else 1.0
    torch.ops.csp_kernels.update_running.default(means, vars_, counters, stats, starts, momenta, unbiased)
    # as in-place operations of PyTorch do, so that autograd notices where it saved one of them
    torch.autograd.graph.increment_version([t for t in (*means, *vars_, *counters) if not t.is_inference()])


def _check_memory(norms: Iterable[Any]) -> None:
    """PyTorch would write to freed running statistics, and end the process."""
    if torch.compiler.is_compiling():
        return
    for norm in norms:
        for name in ("running_mean", "running_var"):
            t = getattr(norm, name)
            if type(t) is Tensor and t.data_ptr() == 0 and t.numel() and not t.is_meta:
                raise RuntimeError(f"{name} {list(t.shape)}: got a freed storage of 0 bytes, expected its values")


@torch.no_grad()
def _update(moving: Sequence[tuple[Any, tuple[int, int]]], stats: Tensor, count: int) -> None:
    """By PyTorch's operations on many tensors at a time: any dtype and device, momentum None."""
    counters: list[Tensor] = []
    groups: dict[tuple[float | None, torch.dtype], list[tuple[Tensor, Tensor, Tensor | None, int, int]]] = {}
    for norm, (start, length) in moving:
        mean, counter = norm.running_mean, norm.num_batches_tracked
        if counter is not None:
            counters.append(counter)
        if mean is not None:
            entry = mean, norm.running_var, counter, start, length
            groups.setdefault((norm.momentum, mean.dtype), []).append(entry)
    means = [mean for group in groups.values() for mean, *_ in group]
    if any(len({id(t) for t in tensors}) < len(tensors) for tensors in (counters, means)):  # shared: one by one
        for pair in moving:
            _update([pair], stats, count)
        return
    if counters:
        torch._foreach_add_(counters, 1)
    if count == 0:
        return
    for (momentum, dtype), group in groups.items():
        mean, var = stats[0].to(dtype), (stats[1] * (count / (count - 1))).to(dtype)  # unbiased
        old = [t for row in group for t in row[:2]]
        new = [t.narrow(0, start, length) for *_, start, length in group for t in (mean, var)]
        if momentum is not None:
            torch._foreach_mul_(old, 1 - momentum)  # not lerp, which makes NaN of an infinite old value
            torch._foreach_add_(old, new, alpha=momentum)
        else:  # cumulative average
            counts = [counter for _, _, counter, _, _ in group for _ in range(2)]
            for buffer, value, counter in zip(old, new, counts, strict=True):
                if counter is not None:
                    part = counter.to(dtype).reciprocal()
                    buffer.mul_(1 - part).add_(value * part)
