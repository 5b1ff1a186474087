"""Modules that a trace knows: convolutions, batch norms, activations, pooling, dropout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from csp_kernels.fusion import functions
from csp_kernels.fusion.symbols import Symbol, is_image
from csp_kernels.layers._children import _behaves as behaves
from csp_kernels.layers._children import _untouched as untouched
from csp_kernels.reference.activations import FUNCTIONS

NARROWEST = 4  # channels of a group that gives more or fewer: those run as dense products, of zeros for the most part


def operation(tracer: Any, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
    """What a call of a known module gives; NotImplemented for another one."""
    if kwargs or len(args) != 1 or not isinstance(args[0], Symbol) or not is_image(tracer.shape(args[0])):
        return NotImplemented
    x = args[0]
    call: functions.Call = path, (x,), {}
    if is_conv(module):
        return _conv(tracer, module, path, x, call)
    if is_norm(module):
        return tracer.record("norm", [x], [tracer.shape(x)], call, path, act="identity", slope=0.0)[0]
    if is_norm_act(module):
        act = activation_of(module.act)
        if act is None:
            return NotImplemented
        tracer.trace.modules[f"{path}.act"] = module.act
        return tracer.record("norm", [x], [tracer.shape(x)], call, path, act=act[0], slope=act[1])[0]
    known = activation_of(module)
    if known is not None:  # never in place: somebody else may read what it is given
        call = FUNCTIONS[known[0]], (x, known[1]), {}
        return functions.activation(tracer, x, *known, bool(getattr(module, "inplace", False)), call, path)
    kind = _KINDS.get(type(module))
    return NotImplemented if kind is None else kind(tracer, module, path, x, call)


def is_torchs_own(module: nn.Module) -> bool:
    """PyTorch's modules compute with functions on parameters, which would be strangers in a trace."""
    return type(module).__module__.startswith("torch.nn.modules")


def is_conv(module: Any) -> bool:
    return type(module) is nn.Conv2d or behaves(type(module), nn.Conv2d)


def is_norm(module: Any) -> bool:
    """Not one that shares its statistics with other processes."""
    return type(module) is nn.BatchNorm2d or behaves(type(module), nn.BatchNorm2d)


def is_norm_act(module: Any) -> bool:
    """timm's batch norm that applies an activation, without its dropout."""
    timm = getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None)
    if timm is None or type(module) is not timm:
        return False
    return type(module.drop) is nn.Identity and untouched(module.drop) and untouched(module.act)


def activation_of(module: Any) -> tuple[str, float] | None:
    """Name and slope of an activation; None for something else."""
    kind = type(module)
    if kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)
    if kind is nn.GELU:
        return ("gelu" if module.approximate == "none" else "gelu_tanh"), 0.0
    if kind is nn.Hardtanh:
        return ("relu6", 0.0) if (module.min_val, module.max_val) == (0, 6) else None
    name = _ACTIVATIONS.get(kind)
    return None if name is None else (name, 0.0)


_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Mish: "mish", nn.Hardswish: "hardswish",
    nn.Identity: "identity",
}  # fmt: skip


def _conv(tracer: Any, conv: Any, path: str, x: Symbol, call: Any) -> Any:
    n, channels, height, width = tracer.shape(x)
    size = conv.kernel_size[0]
    padding = (size // 2, size // 2) if conv.padding == "same" else (0, 0) if conv.padding == "valid" else conv.padding
    plain = conv.kernel_size in ((1, 1), (3, 3)) and conv.stride in ((1, 1), (2, 2)) and conv.dilation == (1, 1)
    plain = plain and padding == (size // 2, size // 2) and conv.padding_mode == "zeros"
    even = conv.in_channels == conv.out_channels
    groups = conv.groups == 1 or (size == 3 and (even or conv.in_channels // conv.groups >= NARROWEST))
    one_pixel = (height, width) == (1, 1)  # attention to channels: no stage is as fast as PyTorch there
    if not plain or not groups or one_pixel or channels != conv.in_channels:
        return NotImplemented
    step = conv.stride[0]
    shape = n, conv.out_channels, -(-height // step), -(-width // step)
    options = {"out": conv.out_channels, "kernel": size, "stride": step, "groups": conv.groups}
    return tracer.record("conv", [x], [shape], call, path, bias=conv.bias is not None, **options)[0]


def _max_pool(tracer: Any, m: Any, path: str, x: Symbol, call: Any) -> Any:
    if m.return_indices:
        return NotImplemented
    return functions.max_pool(tracer, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, call, path)


def _avg_pool(tracer: Any, m: Any, path: str, x: Symbol, call: Any) -> Any:
    given = m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    return functions.avg_pool(tracer, x, *given, call, path)


def _dropout(tracer: Any, m: Any, path: str, x: Symbol, call: Any) -> Any:
    return functions.dropout(tracer, x, m.p, m.training, m.inplace, call, path)


_KINDS: dict[type, Callable[..., Any]] = {
    nn.MaxPool2d: _max_pool, nn.AvgPool2d: _avg_pool, nn.Dropout: _dropout,
}  # fmt: skip
# What a known module's call depends on beside its parameters; all that others have counts.
NUMBERS = (
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "negative_slope", "approximate",
    "min_val", "max_val", "ceil_mode", "return_indices", "count_include_pad", "divisor_override", "p", "num_features",
)  # fmt: skip
