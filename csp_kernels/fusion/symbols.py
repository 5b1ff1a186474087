"""What stands for tensors and their sizes while a forward is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


class Untraceable(Exception):
    """Why a forward cannot be known from one run of it, in words."""


class Symbol(torch.Tensor):
    """A tensor that is only a number among the values of a trace. Every operation on it goes to the tracer."""

    tracer: Any
    number: int
    copied: bool  # it was given the number of another symbol

    @staticmethod
    def of(tracer: Any, number: int) -> Symbol:
        shape = tracer.trace.shapes[number]
        aside, tracer.aside = tracer.aside, True
        made: Any = torch.Tensor._make_wrapper_subclass(Symbol, shape, dtype=torch.float32, device=torch.device("meta"))
        tracer.aside = aside
        made.tracer, made.number, made.copied = tracer, number, False
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for symbol in _symbols((args, kwargs)):
            return symbol.tracer.function(func, args, kwargs or {})
        raise Untraceable(f"{getattr(func, '__name__', func)} cannot be traced")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise Untraceable(f"{func} cannot be traced")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Symbol({self.number})"


def _symbols(tree: Any) -> Sequence[Symbol]:
    if isinstance(tree, Symbol):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [symbol for item in tree for symbol in _symbols(item)]
    return []


def has_symbols(tree: Any) -> bool:
    return bool(_symbols(tree))


def is_image(shape: Sequence[int]) -> bool:
    """Whether these can only be images, channels in the second place: all other sizes are those of a trace."""
    sizes = {(256 >> i, 320 >> i) for i in range(8)} | {(1, 1)}
    return len(shape) == 4 and shape[0] == 2 and tuple(shape[2:]) in sizes


def _unknown(name: str) -> Any:
    def method(self: Dim, *_: Any) -> NoReturn:
        raise Untraceable(f"it depends on the {self.what} of its input")

    method.__name__ = name
    return method


class Dim:
    """Batch size, height or width of a symbol: nobody may know it."""

    def __init__(self, what: str) -> None:
        self.what = what


for _name in (
    "bool", "int", "float", "index", "eq", "ne", "lt", "le", "gt", "ge", "hash", "add", "radd", "sub", "rsub", "mul",
    "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod", "neg", "pow", "rpow", "abs", "round",
):  # fmt: skip
    setattr(Dim, f"__{_name}__", _unknown(_name))


def sizes(tensor: Tensor, shape: Sequence[int]) -> tuple[Any, ...]:
    """What a forward sees as its shape."""
    names = ("batch size", "", "height", "width")
    if not is_image(shape):
        return tuple(Dim("size") for _ in shape)
    return tuple(n if i == 1 else Dim(names[i]) for i, n in enumerate(shape))
