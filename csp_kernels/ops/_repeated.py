"""Calls of inference that were made before go straight to the compiled operator.

The checks of an operator in Python find the words for what is wrong with its arguments, and cost as much as the kernels
of a small stage. What the compiled operator is given it checks itself: dtype, sizes, strides, device and memory of
every tensor. So where a call has been checked, one with the same options, on images of the same dtype, sizes and
strides, needs no other look: its program is known. If the compiled operator refuses it, it is made as a new one, whose
checks say why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from csp_kernels.backends import selected
from csp_kernels.ops import _checks as checks
from csp_kernels.ops import _node as node
from csp_kernels.ops import _packed as packed
from csp_kernels.ops._transforms import transforming

Outputs = tuple[list[Tensor], Tensor]  # and the statistics of the norms


class _Known(NamedTuple):
    """What the checks of a call led to. statistics: those of the norms, from those of the program."""

    text: str
    eps: list[float]
    channels_last: bool
    statistics: Callable[[Tensor], Tensor]


MOST = 1024  # calls that are known
_known: dict[Any, _Known] = {}


class Call:
    """One that keeps nothing for backward. `begin` makes it, `again` makes it as the one before; a new one is `learned`
    when its checks are behind it."""

    def __init__(self, key: Any, inputs: Sequence[Tensor], params: Sequence[Any], running: Sequence[Any]) -> None:
        self.key, self.inputs, self.params, self.running = key, inputs, params, running

    def again(self) -> Outputs | None:
        """None: no such call is known, or it is not what it was."""
        known = _known.get(self.key)
        if known is None:
            return None
        try:
            x = self.inputs[0]
            used = [node.in_place(t) for t in self.inputs]
            found = packed.inference(
                used, list(self.params), list(self.running), known.text, known.eps, node.winograd(x.dtype)
            )
            if found is None:
                return None
            return [checks.formatted(y, known.channels_last) for y in found[0]], known.statistics(found[1])
        except (RuntimeError, TypeError, ValueError, AttributeError):
            _known.pop(self.key, None)  # the next one is not refused again; the checks find words for this one
            return None

    def learned(
        self, params: Sequence[Tensor], running: Sequence[Tensor], text: str, eps: list[float],
        statistics: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """params, running: what the operator was given in the place of those of the call."""
        same = [*zip(params, self.params, strict=False), *zip(running, self.running, strict=False)]
        if len(params) != len(self.params) or len(running) != len(self.running) or any(a is not b for a, b in same):
            return
        if len(_known) >= MOST:
            _known.clear()
        _known[self.key] = _Known(text, eps, checks.is_channels_last(self.inputs[0]), statistics)


def begin(
    operator: object, inputs: Any, params: Sequence[Any], running: Sequence[Any], frozen: Any, eps: Any, *options: Any
) -> Call | None:
    """A call of csp.ops.<operator>, or of a graph; None: one of which nothing is known and nothing is to be learned."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not packed.SHARES:
        return None
    if transforming() or forward_ad._current_level >= 0 or selected() not in ("auto", "native"):
        return None
    if torch.is_autocast_enabled("cpu") or any(type(given) not in _SEQUENCES for given in (inputs, params, running)):
        return None
    if not params or any(type(x) is not Tensor or not x.is_cpu or x.is_nested or _sparse(x) for x in inputs):
        return None
    choices = [*_plain(frozen), *_plain(eps), *(item for option in options for item in _plain(option))]
    if any(type(item) not in _PLAIN for item in choices):
        return None
    images = [(x.dtype, x.shape, x.stride()) for x in inputs]
    return Call((operator, id(params[0]), *images, *choices, *map(type, choices)), inputs, params, running)


_SEQUENCES = (list, tuple)
_PLAIN = (bool, int, float, str, type(None))  # a tensor is its identity in a key, whatever its value has become


def _plain(option: Any) -> list[Any]:
    """An option for a key: the items of a sequence and how many they are, or itself."""
    return [*option, len(option)] if type(option) in _SEQUENCES else [option]


def _sparse(x: Tensor) -> bool:
    return x.layout is not torch.strided
