"""What the layers share: nn.BatchNorm2d modules as holders of parameters and running statistics of an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from csp_kernels import native


def parameters(children: Sequence[Any]) -> list[Tensor | None]:
    """Of convolutions and norms, in order, as the operators take them: weight and bias, but no bias that is None of a
    convolution."""
    params: list[Tensor | None] = []
    for m in children:
        params.append(_own(m, m._parameters, "weight"))
        bias = _own(m, m._parameters, "bias")
        if bias is not None or isinstance(m, nn.BatchNorm2d):
            params.append(bias)
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


class _Moving(NamedTuple):
    """A norm whose running statistics advance: its first column of stats, its channels, over how many values, and in
    which run of norms over that many (a number also where torch.compile takes that of the values for a symbol)."""

    norm: Any
    start: int
    channels: int
    values: int
    run: int

    @property
    def unbiased(self) -> float:
        """What makes a biased variance an unbiased one."""
        return self.values / (self.values - 1) if self.values > 1 else 1.0


def update_running(
    norms: Sequence[Any], columns: Sequence[tuple[int, int]], stats: Tensor, counts: int | Sequence[tuple[int, int]]
) -> None:
    """Advance the running statistics as nn.BatchNorm2d does, from batch means and variances; all of them or, raising
    RuntimeError, none.

    stats [2, columns]: mean and biased variance; columns: (start, length) of each norm in it. counts: over how many
    values, of all norms or of runs of them, each with its length. No values, an empty batch, count as one batch and
    change nothing else.
    """
    runs = counts if isinstance(counts, Sequence) else [(counts, len(norms))]
    each = [(values, run) for run, (values, length) in enumerate(runs) for _ in range(length)]
    moving = [
        _Moving(norm, *column, *count)
        for norm, column, count in zip(norms, columns, each, strict=True)
        if norm.training and norm.track_running_stats
    ]
    in_one_call = _of_one_call(moving)
    if in_one_call is not None:
        _update_in_one_call(in_one_call, moving, stats)
    else:
        _check_buffers(moving)
        _update(moving, stats)


_Running = tuple[list[Tensor], list[Tensor], list[Tensor]]  # means, variances, counters


def _of_one_call(moving: Sequence[_Moving]) -> _Running | None:
    """The buffers, if they are what the compiled operator takes and nobody records what is done to them."""
    if torch.compiler.is_compiling() or not native.available() or torch._C._are_functorch_transforms_active():
        return None
    found: _Running = [], [], []
    for norm, _, channels, _, _ in moving:
        buffers = norm._buffers
        mean, var, counter = (buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
        if not (_plain(mean, channels) and _plain(var, channels) and type(counter) is Tensor and counter.is_cpu):
            return None
        if norm.momentum is None or counter.dtype is not torch.int64:
            return None
        for values, value in zip(found, (mean, var, counter), strict=True):
            values.append(value)
    return found


def _plain(t: object, channels: int) -> TypeGuard[Tensor]:
    return type(t) is Tensor and t.is_cpu and t.dtype in _UPDATED and t.shape == (channels,) and t.is_contiguous()


_UPDATED = (torch.float32, torch.float64)


def _update_in_one_call(running: _Running, moving: Sequence[_Moving], stats: Tensor) -> None:
    means, vars_, counters = running
    advancing = [m for m in moving if m.values]
    if len(advancing) < len(moving):  # all are of the same images: none
        means, vars_ = [], []
    starts, momenta = [m.start for m in advancing], [float(m.norm.momentum) for m in advancing]
    unbiased = [m.unbiased for m in advancing]
    torch.ops.csp_kernels.update_running.default(means, vars_, counters, stats, starts, momenta, unbiased)
    # as in-place operations of PyTorch do, so that autograd notices where it saved one of them
    torch.autograd.graph.increment_version([t for t in (*means, *vars_, *counters) if not t.is_inference()])


def _check_buffers(moving: Sequence[_Moving]) -> None:
    """In front of PyTorch's operations, which would find what is wrong with one when others have advanced, and end the
    process where memory was freed."""
    if torch.compiler.is_compiling():
        return
    for norm, _, channels, _, _ in moving:
        mean, var, counter = norm.running_mean, norm.running_var, norm.num_batches_tracked
        for name, t in (("running_mean", mean), ("running_var", var)):
            if t is None and mean is var:
                continue
            shape = None if t is None else [*t.shape]
            if t is None or shape != [channels] or not t.is_floating_point():
                got = "None" if t is None else f"{t.dtype} {shape}"
                raise RuntimeError(f"{name}: got {got}, expected floating-point numbers [{channels}]")
            if type(t) is Tensor and t.data_ptr() == 0 and t.numel() and not t.is_meta:
                raise RuntimeError(f"{name} {shape}: got a freed storage of 0 bytes, expected its values")
        if not (norm.momentum is None or isinstance(norm.momentum, (int, float, Tensor))):
            raise RuntimeError(f"momentum: got {norm.momentum!r}, expected a number or None")
        if counter is not None and counter.numel() != 1:
            raise RuntimeError(f"num_batches_tracked: got shape {[*counter.shape]}, expected one number")


@torch.no_grad()
def _update(moving: Sequence[_Moving], stats: Tensor) -> None:
    """By PyTorch's operations on many tensors at a time: any dtype and device, momentum None."""
    counters = [m.norm.num_batches_tracked for m in moving if m.norm.num_batches_tracked is not None]
    advancing = [m for m in moving if m.norm.running_mean is not None]
    means = [m.norm.running_mean for m in advancing]
    if any(len({id(t) for t in tensors}) < len(tensors) for tensors in (counters, means)):  # shared: one by one
        for m in moving:
            _update([m], stats)
        return
    if counters:
        torch._foreach_add_(counters, 1)
    groups: dict[tuple[float | None, torch.dtype, int], list[_Moving]] = {}
    for m in advancing:
        groups.setdefault((m.norm.momentum, m.norm.running_mean.dtype, m.run), []).append(m)
    for (momentum, dtype, _), group in groups.items():
        count = group[0].values
        if count == 0:
            continue
        mean, var = stats[0].to(dtype), (stats[1] * (count / (count - 1))).to(dtype)  # unbiased
        old = [t for m in group for t in (m.norm.running_mean, m.norm.running_var)]
        new = [t.narrow(0, m.start, m.channels) for m in group for t in (mean, var)]
        if momentum is not None:
            torch._foreach_mul_(old, 1 - momentum)  # not lerp, which makes NaN of an infinite old value
            torch._foreach_add_(old, new, alpha=momentum)
        else:  # cumulative average
            counts = [m.norm.num_batches_tracked for m in group for _ in range(2)]
            for buffer, value, counter in zip(old, new, counts, strict=True):
                if counter is not None:
                    part = counter.to(dtype).reciprocal()
                    buffer.mul_(1 - part).add_(value * part)
