"""Packed weights that calls of inference share: the second call with the same parameters keeps them for the next.

Packing the weights of a network is a large part of inference at batch 1. What a call packed is kept with its first
weight, and lives as long as that. It counts for the same program, dtype and precision, and for weights that lie where
they lay and have not been changed since, by autograd's version counters. Changes that those do not see (through
`.data`, or by a framework that shares the memory) are looked for in 32 values of each weight at every call, and in all
scales of norms; what they leave as it was is found when a layer's train() or eval() is called, or csp.empty_cache().
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from csp_kernels._tracing import cached_constant
from csp_kernels.ops import _node as node
from csp_kernels.stage.program import Product
from csp_kernels.stage.text import decode


class _Known(NamedTuple):
    """packed: None as long as there was only one call."""

    key: tuple[Any, ...]
    packed: list[Tensor] | None


SHARES = True  # packed weights between calls; False where tests run programs otherwise
_lock = threading.Lock()
_known: Any = WeakIdKeyDictionary()  # by the first weight of a call


def _unlock() -> None:
    """In a forked process nobody holds the lock, whoever held it in the parent."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def inference(
    inputs: list[Tensor], params: Sequence[Tensor], running: list[Tensor], text: str, eps: list[float], winograd: int
) -> tuple[list[Tensor], Tensor] | None:
    """The outputs and statistics of a program that keeps nothing and drops nothing, by the kernels for the CPU; None
    for what cannot share weights: recorded calls, other tensors than plain ones, no convolutions."""
    weights = [params[i] for i in _weights(text)]
    if torch._C._len_torch_dispatch_stack() or not weights:
        return None
    if (
        any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_inference() for t in weights)
        or type(inputs[0]) is not Tensor
    ):
        return None
    x = inputs[0]
    # whether larger tiles pay depends on them, and in which form a 3x3 with stride 2 is multiplied
    sizes = x.shape[2:] if winograd == 4 or _strides(text) else ()
    key = text, x.dtype, winograd, sizes, *((t.data_ptr(), t._version) for t in weights)
    with _lock:
        known = _known.get(weights[0])
        if known is None or known.key != key:
            _known[weights[0]] = _Known(key, None)
            return None
    arguments = inputs, params, running, known.packed or [], text, eps, winograd
    y, stats, made = node.without_gradients(torch.ops.csp_kernels.stage_inference.default, arguments)
    if known.packed is None:
        with _lock:
            _known[weights[0]] = _Known(key, made)
    return y, stats


def forget(params: Iterable[Tensor]) -> None:
    """What is kept of these parameters: they are trained now, or somebody may have changed them past autograd."""
    if _known:
        with _lock:
            for t in params:
                _known.pop(t, None)


def empty() -> int:
    """Give all of it back; how many bytes."""
    with _lock:
        held = sum(t.nbytes for known in _known.values() for t in known.packed or ())
        _known.clear()
    return held


@cached_constant
def _strides(text: str) -> bool:
    """Whether a program has a 3x3 with stride 2."""
    products = (step for step in decode(text).forward if isinstance(step, Product))
    return any(product.conv.kernel == 3 and product.conv.stride > 1 for product in products)


@cached_constant
def _weights(text: str) -> tuple[int, ...]:
    """Those of convolutions among the parameters of a program; () of one that drops."""
    program = decode(text)
    drops = any(getattr(step, "drop", None) is not None for step in program.forward)
    return () if drops else tuple(weight.position for weight in program.weights if weight is not None)
