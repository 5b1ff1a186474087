"""Functions and methods of tensors that a trace knows; all others are done as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor

from csp_kernels.fusion.symbols import Symbol, Untraceable, is_image, sizes

_KNOWN: dict[str, Callable[..., Any]] = {}
Call = tuple[Any, Any, Any]  # function, positional arguments, named arguments


def operation(tracer: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """What a function of a symbol gives; NotImplemented if the trace does not know it."""
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(tracer, name, function.__self__.__name__, args)
    known = _KNOWN.get(name) if isinstance(function, _TORCHS) and _is_torchs(function) else None
    if name == "squeeze" and len(args) + len(kwargs) == 1:
        raise Untraceable("which dimensions squeeze leaves depends on the batch size of its input")
    if known is None:
        return NotImplemented
    return known(tracer, function, *args, **kwargs)


_TORCHS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)


def _is_torchs(function: Any) -> bool:
    """Not somebody else's of the same name."""
    return not isinstance(function, FunctionType) or function.__module__.startswith("torch.")


def changes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes one of its arguments, by its name and its arguments."""
    own = name.endswith("_") and not name.endswith("__")
    return (
        own
        or name.startswith("__i")
        or name in ("__setitem__", "__set__")
        or bool(kwargs.get("inplace"))
        or "out" in kwargs
    )


def _attribute(tracer: Any, what: str, name: str, args: Any) -> Any:
    symbol = args[0]
    if what != "__get__":
        raise Untraceable(f"it sets the attribute {name} of a tensor")
    shape = tracer.shape(symbol)
    if name == "shape":
        return sizes(symbol, shape)
    if name == "ndim":
        return len(shape)
    if name in ("is_nested", "is_sparse", "is_quantized"):
        return False
    raise Untraceable(f"it reads the attribute {name} of a tensor")


def _known(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _KNOWN.update(dict.fromkeys(names, function))
        return function

    return add


@_known("size")
def _size(tracer: Any, function: Any, x: Symbol, dim: int | None = None) -> Any:
    found = sizes(x, tracer.shape(x))
    return found if dim is None else found[dim]


@_known("dim")
def _dim(tracer: Any, function: Any, x: Symbol) -> int:
    return len(tracer.shape(x))


@_known(
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__", "__len__", "__iter__",
    "__contains__", "data_ptr", "stride", "is_contiguous", "element_size", "untyped_storage", "equal", "allclose",
)  # fmt: skip
def _look(tracer: Any, function: Any, *_: Any, **__: Any) -> Any:
    raise Untraceable(f"it looks at a tensor: {function.__name__}")


@_known("contiguous")
def _same(tracer: Any, function: Any, x: Symbol, **_: Any) -> Any:
    """A copy, unless it is contiguous."""
    tracer.unsure.add(x.number)
    return _clone(tracer, function, x)


@_known("clone")
def _clone(tracer: Any, function: Any, x: Symbol, **_: Any) -> Any:
    made = Symbol.of(tracer, x.number)
    made.copied = True
    return made


def _image(tracer: Any, *symbols: Any) -> bool:
    return all(isinstance(x, Symbol) and is_image(tracer.shape(x)) for x in symbols)


@_known("cat", "concat", "concatenate")
def _cat(tracer: Any, function: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    tensors = list(tensors)
    if kwargs or dim not in (1, -3) or not tensors or not _image(tracer, *tensors):
        return NotImplemented
    shapes = [tracer.shape(x) for x in tensors]
    if any(shape[2:] != shapes[0][2:] or shape[0] != shapes[0][0] for shape in shapes):
        return NotImplemented
    n, _, height, width = shapes[0]
    made = n, sum(shape[1] for shape in shapes), height, width
    return tracer.record("cat", tensors, [made], (torch.cat, (tensors, 1), {}))[0]


@_known("add", "__add__", "__radd__", "add_", "__iadd__")
def _add(tracer: Any, function: Any, x: Any, y: Any, *, alpha: float = 1, **kwargs: Any) -> Any:
    inplace = function.__name__ in ("add_", "__iadd__")
    if not inplace and not kwargs and alpha == 1 and any(isinstance(t, (int, float)) and t == 0 for t in (x, y)):
        return _clone(tracer, function, y if isinstance(y, Symbol) else x)  # of sum()
    if kwargs or alpha != 1 or not _image(tracer, x, y) or tracer.shape(x) != tracer.shape(y):
        return NotImplemented
    (made,) = tracer.record("add", [x, y], [tracer.shape(x)], (torch.add, (x, y), {}))
    return tracer.in_place(x, made) if inplace else made


def slices(tracer: Any, x: Symbol, ends: Sequence[tuple[int, int]]) -> list[Symbol]:
    n, _, height, width = tracer.shape(x)
    made = []
    for start, stop in ends:
        call: Call = torch.narrow, (x, 1, start, stop - start), {}
        made += tracer.record("slice", [x], [(n, stop - start, height, width)], call, start=start, stop=stop)
    return made


def _ends(widths: Sequence[int]) -> list[tuple[int, int]]:
    made, start = [], 0
    for width in widths:
        made.append((start, start + width))
        start += width
    return made


@_known("chunk", "split", "split_with_sizes", "tensor_split")
def _split(tracer: Any, function: Any, x: Any, into: Any, dim: int = 0) -> Any:
    if not _image(tracer, x) or dim not in (1, -3):
        return NotImplemented
    meta = torch.empty((1, tracer.shape(x)[1], 1, 1), device="meta")
    split = getattr(torch, function.__name__)
    return tuple(slices(tracer, x, _ends([t.shape[1] for t in split(meta, into, dim)])))


@_known("narrow")
def _narrow(tracer: Any, function: Any, x: Any, dim: int, start: Any, length: Any) -> Any:
    if not _image(tracer, x) or dim not in (1, -3) or not isinstance(start, int) or not isinstance(length, int):
        return NotImplemented
    return slices(tracer, x, [(start, start + length)])[0]


@_known("__getitem__")
def _item(tracer: Any, function: Any, x: Any, index: Any) -> Any:
    """x[:, a:b] and x[:, :, ::2, ::2]."""
    everything = slice(None)
    if not _image(tracer, x) or not isinstance(index, tuple) or not all(isinstance(i, slice) for i in index):
        return NotImplemented
    if any(any(isinstance(end, (Tensor, *_DIM)) for end in (i.start, i.stop, i.step)) for i in index):
        raise Untraceable("a size of its input cuts a tensor")
    index = (*index, *[everything] * (4 - len(index)))
    if index[0] == everything and index[2:] == (everything, everything) and index[1].step in (None, 1):
        start, stop, _ = index[1].indices(tracer.shape(x)[1])
        return slices(tracer, x, [(start, stop)])[0] if stop > start else NotImplemented
    second = slice(None, None, 2)
    if index == (everything, everything, second, second):
        n, c, h, w = tracer.shape(x)
        shape = n, c, -(-h // 2), -(-w // 2)
        call: Call = torch.Tensor.__getitem__, (x, index), {}
        return tracer.record("max_pool", [x], [shape], call, size=1, stride=2)[0]
    return NotImplemented


_DIM = (type(sizes(torch.empty(0), (1, 1, 1, 1))[0]),)


def activation(tracer: Any, x: Any, act: str, slope: float, inplace: bool, call: Call, path: str = "") -> Any:
    """act(x)"""
    if not _image(tracer, x):
        return NotImplemented
    if act == "identity":
        return x
    (made,) = tracer.record("act", [x], [tracer.shape(x)], call, path, act=act, slope=slope)
    return tracer.in_place(x, made) if inplace else made


def _activation(act: str) -> Callable[..., Any]:
    def run(tracer: Any, function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        inplace = function.__name__.endswith("_") or bool(kwargs.pop("inplace", False))
        slope, kind = 0.0, act
        if act == "leaky_relu":
            slope = float(args[0] if args else kwargs.pop("negative_slope", 0.01))
            args = args[1:]
        elif act == "gelu":
            kind = {"none": "gelu", "tanh": "gelu_tanh"}[kwargs.pop("approximate", "none")]
        elif act == "hardtanh":
            low, high = (*args, *[kwargs.pop(k, v) for k, v in (("min_val", -1.0), ("max_val", 1.0))][len(args) :])[:2]
            args, kind = args[2:], "relu6"
            if (low, high) != (0, 6):
                return NotImplemented
        if len(args) == 1 and isinstance(args[0], bool):
            inplace, args = args[0], ()
        if args or kwargs:
            return NotImplemented
        out_of_place = getattr(torch.nn.functional, function.__name__.rstrip("_"))
        rest = (slope,) if act == "leaky_relu" else (0.0, 6.0) if act == "hardtanh" else ()
        named = {"approximate": "tanh"} if kind == "gelu_tanh" else {}
        return activation(tracer, x, kind, slope, inplace, (out_of_place, (x, *rest), named))

    return run


for _act in ("relu", "relu6", "silu", "mish", "hardswish", "leaky_relu", "gelu", "hardtanh"):
    _KNOWN[_act] = _activation(_act)
    if _act in ("relu", "leaky_relu", "hardtanh"):
        _KNOWN[f"{_act}_"] = _activation(_act)


@_known("dropout")
def _dropout(tracer: Any, function: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return dropout(tracer, x, p, training, inplace, (torch.nn.functional.dropout, (x, p, training), {}))


def dropout(tracer: Any, x: Any, p: float, training: bool, inplace: bool, call: Call, path: str = "") -> Any:
    if not training or p == 0:
        return x
    if not _image(tracer, x) or inplace or p >= 1:
        return NotImplemented
    return tracer.record("dropout", [x], [tracer.shape(x)], call, path, p=p)[0]


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) else tuple(value)


@_known("max_pool2d")
def _max_pool(
    tracer: Any, function: Any, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    args = (kernel_size, stride, padding, dilation, ceil_mode)
    return (
        NotImplemented
        if return_indices
        else max_pool(tracer, x, *args, (torch.nn.functional.max_pool2d, (x, *args), {}))
    )


def max_pool(
    tracer: Any, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, call: Call,
    path: str = "",
) -> Any:  # fmt: skip
    """Of an odd size around every pixel, or around every second, or of 2x2 pixels each, a size rounded up."""
    size, other = _pair(kernel)
    step = _pair(kernel if stride is None or stride == [] else stride)
    before = (size - 1) // 2
    plain = size == other and _pair(padding) == (before, before) and _pair(dilation) == (1, 1)
    around = size % 2 == 1 and step in ((1, 1), (2, 2)) and not (ceil_mode and step == (2, 2))
    halves = size == 2 and step == (2, 2) and ceil_mode
    if not _image(tracer, x) or not plain or not (around or halves):
        return NotImplemented
    n, c, h, w = tracer.shape(x)
    shape = n, c, -(-h // step[0]), -(-w // step[0])
    return tracer.record("max_pool", [x], [shape], call, path, size=size, stride=step[0])[0]


@_known("avg_pool2d")
def _avg_pool(
    tracer: Any, function: Any, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    args = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return avg_pool(tracer, x, *args, (torch.nn.functional.avg_pool2d, (x, *args), {}))


def avg_pool(
    tracer: Any, x: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include: bool, divisor: Any,
    call: Call, path: str = "",
) -> Any:  # fmt: skip
    """Of 2x2 pixels."""
    step = kernel if stride is None or stride == [] else stride
    plain = _pair(kernel) == _pair(step) == (2, 2) and _pair(padding) == (0, 0) and not ceil_mode and divisor is None
    if not _image(tracer, x) or not plain:
        return NotImplemented
    n, c, h, w = tracer.shape(x)
    return tracer.record("avg_pool", [x], [(n, c, h // 2, w // 2)], call, path)[0]
