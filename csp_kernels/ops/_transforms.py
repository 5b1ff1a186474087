"""Which calls the reference takes: function transforms and forward-mode derivatives, which the kernels do not know."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from csp_kernels.backends import resolve, selected


def transforming() -> bool:
    """Inside a function transform: grad, vjp, jvp, vmap, ... of torch.func."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Is there more to these tensors than values: a batch dimension or derivatives of torch.func, a tangent?"""
    if transforming():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def batched(tensors: Iterable[Tensor | None]) -> bool:
    """Gradients of torch.autograd.grad(is_grads_batched=True), which come in an older kind of batch than vmap's."""
    known = torch._C._functorch.is_legacy_batchedtensor
    return any(t is not None and known(t) for t in tensors)


def uses_reference(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether this call is the reference's: chosen, an empty batch, or transformed (RuntimeError if the choice was a
    backend that has first derivatives alone)."""
    backend = resolve(x.device.type)
    if backend == "reference" or x.numel() == 0:
        return True
    if not transformed((x, *tensors)):
        return False
    if selected() == "auto":
        return True
    raise RuntimeError(
        f"backend {selected()!r}: torch.func transforms (grad, vjp, jvp, vmap, ...) and forward-mode derivatives "
        "run on the reference; choose csp.use_backend('reference') or 'auto'"
    )
