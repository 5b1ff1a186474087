"""Marks for torch.compile that do not import it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])


def constant_when_traced(function: F) -> F:
    """torch.compiler.assume_constant_result, which imports torch._dynamo: half of what importing this package took."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def cached_constant(function: F) -> F:
    """constant_when_traced with a cache, for functions of hashable arguments. Dynamo looks through functools' own, with
    a warning, and traces what is behind it."""
    cached = lru_cache(maxsize=1024)(function)

    def call(*arguments: Any) -> object:
        return cached(*arguments)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return cast(F, constant_when_traced(call))


def static(number: int) -> int:
    """The number, as a constant also where torch.compile takes sizes for symbols: it compiles again for another one."""
    return operator.index(number)


def static_float(number: float) -> float:
    """The same of a float, which torch.compile takes for a symbol too if it is an attribute: its text is exact."""
    return float(f"{float(number)}")
