"""A mark for torch.compile that does not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_traced(function: F) -> F:
    """torch.compiler.assume_constant_result, which imports torch._dynamo: half of what importing this package took."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
