"""A module against its reference, as a user would test a stage of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csp_kernels.backends import resolve, selected, use_backend

ALLOWED = 4.0  # times the reference's own error in the same dtype
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Compared:
    """One tensor: its error against the reference in float64, relative in the 2-norm, and what is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Verdict:
    """All that was compared, and the backend that was compared with the reference; true if all of it agrees."""

    backend: str
    items: tuple[Compared, ...]

    def __bool__(self) -> bool:
        return all(item.agrees for item in self.items)

    def __str__(self) -> str:
        width = max(len(item.name) for item in self.items)
        rows = [f"backend {self.backend!r} against the reference in float64:"]
        for item in self.items:
            word = "ok" if item.agrees else "DIFFERS"
            rows.append(f"{item.name:<{width}}  error {item.error:.1e}  allowed {item.allowed:.1e}  {word}")
        bad, all_of_it = sum(not item.agrees for item in self.items), len(self.items)
        return "\n".join([*rows, f"{bad} of {all_of_it} differ" if bad else f"all {all_of_it} agree"])


def check(module: nn.Module, *inputs: Tensor) -> Verdict:
    """Compare a module with its reference in float64: outputs, the gradients of inputs and parameters, and buffers
    (running statistics) behind one training step. The module itself stays as it is.

    Allowed is 4 times the error of the reference in the dtype of the inputs, and a little more (FLOOR): what rounding
    does to the reference it may do to the module. Dropout must be off, no two calls drop the same.
    Raises TypeError where there are no inputs, or of a dtype that no module takes.
    """
    if not inputs or inputs[0].dtype not in FLOOR:
        got = inputs[0].dtype if inputs else "none"
        raise TypeError(f"inputs: got {got}, expected tensors of {', '.join(map(str, FLOOR))}")
    exact = dict(_step(copy.deepcopy(module).double(), [t.double() for t in inputs], "reference"))
    own = dict(_step(copy.deepcopy(module), inputs, "reference"))
    found = dict(_step(copy.deepcopy(module), inputs, selected()))
    floor = FLOOR[inputs[0].dtype]
    items = (
        Compared(name, _error(t, exact[name]), ALLOWED * _error(own[name], exact[name]) + floor)
        for name, t in found.items()
    )
    return Verdict(_backend(inputs[0].device.type), tuple(items))


def _backend(device_type: str) -> str:
    """What ran; off the CPU "auto" chooses for each call."""
    return "auto" if selected() == "auto" and device_type != "cpu" else resolve(device_type)


def _step(module: nn.Module, inputs: Sequence[Tensor], backend: str) -> Iterator[tuple[str, Tensor]]:
    """Everything that one training step gives, by name; it changes the module."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    with use_backend(backend):
        result = module(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
        torch.autograd.backward(outputs, grads)
    yield from ((f"output {i}", y.detach()) for i, y in enumerate(outputs))
    yield from ((f"gradient of input {i}", t.grad) for i, t in enumerate(leaves) if t.grad is not None)
    yield from ((f"gradient of {name}", p.grad) for name, p in module.named_parameters() if p.grad is not None)
    yield from module.named_buffers()


def _error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).norm().item() / (exact.double().norm().item() or 1.0)
