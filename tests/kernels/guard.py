"""Bounds guard of Triton's interpreter: every load, store and atomic of a kernel lies in the view that its pointer was
made from. Pointers remember their argument through arithmetic, so that one tensor's address in another's memory, or a
channel beside a slice, counts as outside too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_BUILDER: Any = interpreter.InterpreterBuilder


class OutOfBounds(Exception):
    pass


@dataclass(frozen=True)
class Argument:
    """A tensor argument of the launch that runs."""

    kernel: str
    name: str
    tensor: Tensor
    axes: tuple[tuple[int, int], ...]  # size and stride, largest stride first
    span: int  # elements from the first to behind the last

    @classmethod
    def of(cls, kernel: str, name: str, tensor: Tensor) -> Argument:
        axes = sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda a: -a[1])
        span = 1 + sum((size - 1) * stride for size, stride in axes) if tensor.numel() else 0
        return cls(kernel, name, tensor, tuple(a for a in axes if a[0] > 1 and a[1] > 0), span)

    def elements(self, pointers: np.ndarray) -> np.ndarray:
        """Pointers as elements from the first of the view, in int64."""
        return (pointers.astype(np.int64) - self.tensor.data_ptr()) // self.tensor.element_size()

    def outside(self, elements: np.ndarray) -> np.ndarray:
        bad = (elements < 0) | (elements >= self.span)
        if self.tensor.numel() == self.span:
            return bad
        rest = elements
        for size, stride in self.axes:
            bad |= rest // stride >= size
            rest = rest % stride
        return bad | (rest != 0)


Observer = Callable[[str, Argument, np.ndarray], None]  # "load", "store" or "atomic", the argument, elements
_observers: list[Observer] = []
_launch: list[tuple[str, list[tuple[str, Tensor]]]] = []  # kernel, arguments that have no pointer yet


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Calls it for every access."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _access(kind: str, pointers: Any, mask: Any) -> None:
    argument: Argument | None = getattr(pointers, "argument", None)
    if argument is None:
        raise OutOfBounds(f"{_launch[-1][0]}: {kind} through a pointer that comes from no argument")
    active = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if active.size == 0:
        return
    elements = argument.elements(np.atleast_1d(active))
    bad = argument.outside(elements)
    if bad.any():
        view = f"{tuple(argument.tensor.shape)}, strides {argument.tensor.stride()}"
        first = int(elements[bad][0])
        raise OutOfBounds(
            f"{argument.kernel}: {kind} outside {argument.name} [{view}]: {int(bad.sum())} elements, first {first}"
        )
    for observer in _observers:
        observer(kind, argument, elements)


def _remember(name: str) -> None:
    """The operation's result has the argument of its first operand that has one."""
    operation = getattr(_BUILDER, name)

    @functools.wraps(operation)
    def wrapped(self: Any, *operands: Any, **rest: Any) -> Any:
        result = operation(self, *operands, **rest)
        for o in operands:
            if hasattr(o, "argument"):
                result.argument = o.argument
                break
        return result

    setattr(_BUILDER, name, wrapped)


def _check(name: str, kind: str, pointers: int, mask: int) -> None:
    """pointers, mask: which operands."""
    operation = getattr(_BUILDER, name)

    @functools.wraps(operation)
    def wrapped(self: Any, *operands: Any, **rest: Any) -> Any:
        _access(kind, operands[pointers], operands[mask])
        return operation(self, *operands, **rest)

    setattr(_BUILDER, name, wrapped)


def install() -> None:
    """For this process."""
    for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans"):
        _remember(f"create_{name}")
    _check("create_masked_load", "load", 0, 1)
    _check("create_masked_store", "store", 0, 2)
    _check("create_atomic_rmw", "atomic", 1, 3)
    convert, executor = interpreter._implicit_cvt, interpreter.GridExecutor
    call = executor.__call__

    def converted(value: Any) -> Any:
        result = convert(value)
        if isinstance(value, Tensor):
            kernel, names = _launch[-1]
            i = next(i for i, (_, t) in enumerate(names) if t.data_ptr() == value.data_ptr() and t.shape == value.shape)
            result.handle.argument = Argument.of(kernel, names.pop(i)[0], value)
        return result

    def called(self: Any, *values: Any, **named: Any) -> Any:
        given = [*zip(self.arg_names, values, strict=False), *named.items()]
        kernel = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        _launch.append((kernel, [(name, t) for name, t in given if isinstance(t, Tensor)]))
        try:
            return call(self, *values, **named)
        finally:
            _launch.pop()

    interpreter._implicit_cvt, executor.__call__ = converted, called
