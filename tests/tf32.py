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
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = {"stride": stride, "padding": padding, "groups": groups}
        return torch.conv2d(cut(x), cut(weight), **ctx.options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (x, weight), d = ctx.saved_tensors, cut(gradient)
        dx = conv2d_input(x.shape, cut(weight), d, **ctx.options)
        return dx, conv2d_weight(cut(x), weight.shape, d, **ctx.options), None, None, None


class truncated(TorchFunctionMode):
    """Convolutions inside have TF32's precision; biases are added in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    y: Tensor = _Convolution.apply(x, weight, stride, padding, groups)
    return y if bias is None else y + bias[:, None, None]
