"""Which backend takes a call: the one that was chosen, but function transforms and forward-mode derivatives, which the
kernels do not know, go to the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd import forward_ad

from csp_kernels import winners
from csp_kernels._tracing import constant_when_traced
from csp_kernels.backends import resolve, selected, why_not_cuda, why_not_triton


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


def backend_of(
    operator: str, inputs: Sequence[Tensor], params: Sequence[Tensor | None], running: Sequence[Tensor]
) -> str:
    """The backend of this call of csp.ops.<operator>: "native", "triton" or "reference".

    The reference where it is chosen, for an empty batch, and for transformed tensors (RuntimeError if the choice was a
    backend that has first derivatives alone). "auto" asks the table of measured winners where it would be the
    reference's.
    """
    x = inputs[0]
    backend = resolve(x.device.type)
    if backend == "reference" and selected() == "auto":
        backend = automatic(operator, inputs, params)
    if backend == "reference" or x.numel() == 0:
        return "reference"
    if not transformed(chain(inputs, params, running)):
        return backend
    if selected() == "auto":
        return "reference"
    raise RuntimeError(
        f"backend {selected()!r}: torch.func transforms (grad, vjp, jvp, vmap, ...) and forward-mode derivatives "
        "run on the reference; choose csp.use_backend('reference') or 'auto'"
    )


def automatic(operator: str, inputs: Sequence[Tensor], params: Sequence[Tensor | None]) -> str:
    """What "auto" runs where it is not "native" anyway: the fastest of the backends that are available and were
    measured to be faster than the reference at such calls of csp.ops.<operator>; "reference" if there is none."""
    device = inputs[0].device
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *params))
    for name in winners.faster(device, operator, inputs, training):
        if not _missing(name, device.index):
            return name
    return "reference"


@constant_when_traced
def _missing(name: str, device: int | None) -> bool:
    """Whether a backend cannot run on this GPU."""
    return bool(why_not_cuda(device) if name == "native" else why_not_triton())
