"""What the operators share: argument checks, dtype rules, memory formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csp_kernels._tracing import constant_when_traced
from csp_kernels.ops._transforms import transforming
from csp_kernels.vocabulary import DENSE_RECOMPUTE

Shape = tuple[int, ...]
Label = Callable[[int], str]  # index of a parameter or norm -> its name; called for errors only
ACCUMULATE = {  # storage dtype -> dtype of parameters, statistics and sums
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


class Layer(NamedTuple):
    """The parameters of one kind of dense layer."""

    names: tuple[str, ...]
    label: Label
    norm_label: Label
    check_channels: Callable[[Tensor, int, Sequence[Tensor | None]], None]  # x, those that enter, params
    shapes: Callable[[Sequence[Tensor | None], int], list[Shape]]  # of all layers' params, c0 channels entering
    growth: Callable[[Sequence[Shape]], int]  # of one layer, from the weights of all convolutions


# --- dtypes and memory formats ---


def dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Of the parameters, for x of this dtype."""
    return (x.dtype, torch.float32) if x.element_size() == 2 else (x.dtype,)


def autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(kind):  # autocast leaves float64 alone
        return x
    if torch.is_autocast_enabled(kind):
        check_storage(x)
        return x.to(torch.get_autocast_dtype(kind))
    return x


@constant_when_traced  # torch 2.11 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def is_channels_last(x: Tensor) -> bool:
    """True also for a channel slice of a channels_last tensor; False for a contiguous one with a single channel."""
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def formatted(y: Tensor, channels_last: bool) -> Tensor:
    if transforming():  # a batch dimension may lie anywhere
        return y
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def sliced(y: Tensor, channels_last: bool) -> Tensor:
    """As formatted, but a channel slice of a tensor in that format stays where it is."""
    if transforming():
        return y
    rows = (y.shape[2] * y.shape[3], y.shape[3], 1)
    fits = is_channels_last(y) if channels_last else y.stride()[1:] == rows
    return y if fits else formatted(y, channels_last)


def check_storage(t: Tensor) -> None:
    """In front of PyTorch's copies, which would end the process where the memory was freed. What is not copied the
    operators check themselves."""
    if torch.compiler.is_compiling() or not torch._C._has_storage(t):
        return
    held, last = t.untyped_storage().nbytes(), sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    if t.numel() and held < (needed := (t.storage_offset() + last + 1) * t.element_size()):
        raise ValueError(
            f"tensor {list(t.shape)} of {t.dtype}: got a storage of {held} bytes, expected at least {needed}: "
            "it was freed or resized"
        )


def pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype, contiguous or channels_last."""
    if t.dtype is dtype and t.is_contiguous():
        return t  # the operator checks its storage
    if t.dtype is not dtype:
        check_storage(t)
        t = t.to(dtype)
    return dense(t)


def dense(t: Tensor) -> Tensor:
    """t contiguous or channels_last."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return t  # the operator checks its storage
    check_storage(t)
    return t.contiguous()


def filled(
    params: Sequence[Tensor | None], shapes: Sequence[Shape], x: Tensor, biases: Sequence[bool] | None = None
) -> list[Tensor]:
    """Parameters in the dtype of sums, contiguous or channels_last; missing norm weights are ones, biases zeros.

    biases: which of them are biases; None: no convolution has one, so vectors are weight and bias of a norm in turn.
    """
    dtype, tensors, bias = ACCUMULATE[x.dtype], [], False
    for i, (p, shape) in enumerate(zip(params, shapes, strict=True)):
        if p is None:
            zeros = bias if biases is None else biases[i]
            tensors.append((torch.zeros if zeros else torch.ones)(shape, dtype=dtype, device=x.device))
        else:
            tensors.append(converted(p, dtype))
        bias = len(shape) == 1 and not bias
    return tensors


# --- checks ---


def check_image(x: Tensor, name: str = "x") -> Tensor:
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested or x.dtype not in ACCUMULATE:
        raise TypeError(f"{name}: got {_unusable(x, name)}")
    if x.dim() != 4:
        fix = f"; add a batch dimension with {name}.unsqueeze(0)" if x.dim() == 3 else ""
        raise ValueError(f"{name}: got {x.dim()} dimensions {list(x.shape)}, expected 4 [N, channels, H, W]{fix}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected at least one channel, row and column")
    return x


def _unusable(x: object, name: str) -> str:
    """What is wrong with an input that is no dense tensor of floating-point numbers, and what helps."""
    if not isinstance(x, Tensor):
        fix = f"; convert with torch.as_tensor({name})" if hasattr(x, "__array__") else ""
        return f"{type(x).__name__}, expected a Tensor [N, channels, H, W]{fix}"
    if x.is_nested:
        return f"a nested tensor, expected images of one size; pad with torch.nested.to_padded_tensor({name}, 0.0)"
    if x.layout is not torch.strided:
        kind = str(x.layout).removeprefix("torch.").removeprefix("_")
        return f"a tensor of layout {kind}, expected a dense one; convert with {name}.to_dense()"
    expected = f"{x.dtype}, expected float32, bfloat16, float16 or float64"
    if x.is_complex():
        return f"{expected}; pass real and imaginary parts as channels (torch.view_as_real)"
    return f"{expected}; convert with {name}.{'dequantize' if x.is_quantized else 'float'}()"


def check_beside(t: Tensor, name: str, x: Tensor, owner: str) -> None:
    """t may be read together with x: same N, H, W, dtype and device."""
    if t.shape[0] != x.shape[0] or t.shape[2:] != x.shape[2:]:
        n, _, h, w = x.shape
        raise ValueError(f"{name}: got shape {list(t.shape)}, expected [{n}, channels, {h}, {w}] as {owner} has")
    if t.device != x.device:
        raise ValueError(
            f"{name}: got a tensor on {t.device}, expected {x.device}, where {owner} is; move it with .to()"
        )
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: got {t.dtype}, expected {x.dtype}, the dtype of {owner}; convert it with .to()")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}")


def check_weight(t: object, name: str, expected: str) -> Sequence[int]:
    """Out and in channels of a convolution's weight, `expected` being its shape in words."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor {expected}")
    if t.dim() != 4 or 0 in t.shape:
        raise ValueError(f"{name}: got shape {list(t.shape)}, expected {expected}")
    return t.shape[:2]


def check_count(params: Sequence[Tensor | None], names: Sequence[str]) -> None:
    if not params or len(params) % len(names):
        expected = f"{len(names)} a layer, at least one layer: {', '.join(names)}"
        raise ValueError(f"params: got {len(params)}, expected {expected}")


def check_entering(x: Tensor, got: int, expected: int, where: str, name: str = "x") -> None:
    """The channels of x that a parameter meets against those it takes; where: "the size of ..."."""
    if got != expected:
        some = "" if got == x.shape[1] else f", {got} of them for the dense layers"
        raise ValueError(f"{name}: got {x.shape[1]} channels {list(x.shape)}{some}, expected {expected}, {where}")


def check_tensors(
    tensors: Sequence[Tensor | None],
    shapes: Sequence[Shape],
    label: Label,
    x: Tensor,
    owner: str = "x",
    *,
    optional: bool = True,
) -> None:
    """Shapes, dtypes and devices; optional: vectors (parameters of norms) may be None."""
    allowed, device = dtypes(x), x.device
    for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if t is None and optional and len(shape) == 1:
            continue
        if (
            not isinstance(t, Tensor)
            or t.shape != shape
            or t.dtype not in allowed
            or t.device != device
            or t.layout is not torch.strided
        ):
            _refuse(label(i), t, shape, x, owner)


def _refuse(name: str, t: object, shape: Shape, x: Tensor, owner: str) -> None:
    """Raise the error that says what is wrong with t."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor {list(shape)}")
    if t.shape != shape:
        channels = f"for {owner} with {x.shape[1]} channels"
        raise ValueError(f"{name}: got shape {list(t.shape)}, expected {list(shape)} {channels}")
    if t.device != x.device:
        raise ValueError(
            f"{name}: got a tensor on {t.device}, expected {x.device}, where {owner} is; move one with .to()"
        )
    if t.layout is not torch.strided:
        kind = str(t.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{name}: got a tensor of layout {kind}, expected a dense one; convert it with .to_dense()")
    names = " or ".join(str(d) for d in dtypes(x))
    raise TypeError(f"{name}: got {t.dtype}, expected {names} for {owner} of {x.dtype}; convert one with .to()")


def flags(frozen: Sequence[bool] | None, norms: int, each: str = "one a norm") -> list[bool]:
    if frozen is None:
        return [False] * norms
    if isinstance(frozen, bool):
        raise TypeError(f"frozen: got {frozen}, expected {norms} flags, {each}")
    if len(frozen) != norms:
        raise ValueError(f"frozen: got {len(frozen)} flags, expected {norms}, {each}")
    return list(frozen)


def epsilons(eps: float | Sequence[float], frozen: list[bool], each: str = "one a norm") -> list[float]:
    norms = len(frozen)
    values = [float(eps)] * norms if isinstance(eps, (int, float)) else [float(e) for e in eps]
    if len(values) != norms:
        raise ValueError(f"eps: got {len(values)} numbers, expected one or {norms}, {each}")
    if min(values) <= 0 and any(e < 0 or (e == 0 and not f) for e, f in zip(values, frozen, strict=True)):
        raise ValueError(f"eps: got {min(values)}, expected more than 0 (or 0 for a frozen norm)")
    return values


def weights(params: Sequence[Tensor | None]) -> list[Shape]:
    """Shapes of the convolutions' weights among the parameters."""
    return [tuple(p.shape) for p in params if p is not None and p.dim() == 4]


def norm_indices(shapes: Sequence[Shape]) -> list[int]:
    """Where the weight of each norm is among the parameters."""
    return [i for i, shape in enumerate(shapes) if len(shape) == 1][::2]


def check_running(
    x: Tensor, running: Sequence[Tensor], frozen: list[bool], sizes: Sequence[int], label: Label, owner: str = "x"
) -> None:
    """label names a norm, sizes are the norms' channels."""
    count = 2 * sum(frozen)
    if len(running) != count:
        raise ValueError(
            f"running: got {len(running)} tensors, expected {count}, mean and variance of each frozen norm"
        )
    norms = [i for i, flag in enumerate(frozen) for _ in range(2) if flag]
    shapes = [(sizes[i],) for i in norms]
    check_tensors(
        running,
        shapes,
        lambda i: f"running: {label(norms[i])} {'var' if i % 2 else 'mean'}",
        x,
        owner,
        optional=False,
    )


def check_values(x: Tensor, pixels: int, frozen: Sequence[bool], name: str = "x", when: str = "") -> None:
    """Batch statistics need two values a channel; none at all (an empty batch) is fine."""
    if pixels == 1 and not all(frozen):
        raise ValueError(
            f"{name}: got one value per channel{when} {list(x.shape)}, expected more to compute batch statistics; "
            "use a larger batch or image, or eval()"
        )


def check_recompute(recompute: str) -> None:
    check_choice("recompute", recompute, DENSE_RECOMPUTE)
