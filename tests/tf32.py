"""Plain PyTorch with the precision of TF32: what a convolution computes on tensor cores, wherever it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode


def cut(x: Tensor) -> Tensor:
    """float32 without the 13 low bits of each fraction, which tensor cores do not read; other types as they are."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32) if x.dtype == torch.float32 else x


class _Convolution(torch.autograd.Function):
    """Products of cut operands, forward and backward; sums in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return torch.conv2d(cut(x), cut(weight), padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), d = ctx.saved_tensors, cut(gradient)
        dx = conv2d_input(x.shape, cut(weight), d, padding=ctx.padding)
        return dx, conv2d_weight(cut(x), weight.shape, d, padding=ctx.padding), None


class truncated(TorchFunctionMode):
    """Convolutions inside, of one group and stride, without a bias, have TF32's precision."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(x: Tensor, weight: Tensor, bias: None = None, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    if bias is not None or stride != 1 or groups != 1:
        raise ValueError(f"conv2d: got bias {bias}, stride {stride}, {groups} groups; expected none, 1 and one group")
    y: Tensor = _Convolution.apply(x, weight, padding)
    return y
