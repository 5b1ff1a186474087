"""A module against its reference, as a user would test a stage of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from csp_kernels.backends import resolve, selected, use_backend
from csp_kernels.layers import Stage
from csp_kernels.stage.graph import without_dropout

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


Given = Tensor | Sequence[Tensor] | None  # an argument of a module


def check(module: nn.Module, *inputs: Given) -> Verdict:
    """Compare a module with its reference in float64: outputs, the gradients of inputs and parameters, and buffers
    (running statistics) behind one training step. The module itself stays as it is.

    inputs: as the module takes them, tensors, lists of tensors or None. Allowed is 4 times the error of the reference
    in the dtype of the inputs, and a little more (FLOOR): what rounding does to the reference it may do to the module.
    Raises TypeError where there are no inputs, or of a dtype that no module takes; ValueError where dropout is on, of
    which no two calls drop the same.
    """
    tensors = list(_tensors(inputs))
    if not tensors or tensors[0].dtype not in FLOOR:
        got = tensors[0].dtype if tensors else "none"
        raise TypeError(f"inputs: got {got}, expected tensors of {', '.join(map(str, FLOOR))}")
    if dropping := [name or "itself" for name, child in module.named_modules() if _drops(child)]:
        raise ValueError(
            f"module: got dropout that is on in {dropping[0]}, expected none; set its rate to 0, or eval()"
        )
    with torch.inference_mode(False), torch.enable_grad():
        wide = tuple(_each(x, Tensor.double) for x in inputs)
        exact = dict(_step(copy.deepcopy(module).double(), wide, "reference"))
        own = dict(_step(copy.deepcopy(module), inputs, "reference"))
        found = dict(_step(copy.deepcopy(module), inputs, selected()))
    floor = FLOOR[tensors[0].dtype]
    items = []
    for name, t in found.items():
        scale = _scale(name, exact)
        ours, theirs = (_distance(result, exact[name]) / scale for result in (t, own[name]))
        items.append(Compared(name, ours, ALLOWED * theirs + floor))
    return Verdict(_backend(tensors[0].device.type), tuple(items))


def _backend(device_type: str) -> str:
    """What ran; off the CPU "auto" chooses for each call."""
    return "auto" if selected() == "auto" and device_type != "cpu" else resolve(device_type)


def _tensors(inputs: Sequence[Given]) -> Iterator[Tensor]:
    for x in inputs:
        yield from [x] if isinstance(x, Tensor) else [] if x is None else x


def _each(x: Given, function: Callable[[Tensor], Tensor]) -> Given:
    return None if x is None else function(x) if isinstance(x, Tensor) else [function(t) for t in x]


def _drops(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, Stage):
        return without_dropout(module.graph) != module.graph
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "drop_rate", 0.0)
    return bool(rate)


def _step(module: nn.Module, inputs: Sequence[Given], backend: str) -> Iterator[tuple[str, Tensor]]:
    """Everything that one training step gives, by name; it changes the module."""
    arguments = [_each(x, lambda t: t.detach().clone().requires_grad_()) for x in inputs]
    with use_backend(backend):
        result = module(*arguments)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
        torch.autograd.backward(outputs, grads)
    yield from ((f"output {i}", y.detach()) for i, y in enumerate(outputs))
    yield from ((f"gradient of input {i}", t.grad) for i, t in enumerate(_tensors(arguments)) if t.grad is not None)
    yield from ((f"gradient of {name}", p.grad) for name, p in module.named_parameters() if p.grad is not None)
    yield from module.named_buffers()


def _scale(name: str, exact: Mapping[str, Tensor]) -> float:
    """What an error is relative to: the 2-norm of what is exact. Of what may be 0 in exact arithmetic, where rounding
    alone is left, at least that of what goes with it: for a norm's bias its weight, for a mean standard deviations."""
    t, sizes = exact[name], [exact[name].double().norm().item()]
    if name.endswith("bias"):
        weight = exact.get(name.removesuffix("bias") + "weight")
        sizes += [weight.double().norm().item()] if weight is not None and weight.shape == t.shape else []
    elif name.endswith("running_mean"):
        var = exact.get(name.removesuffix("mean") + "var")
        sizes += [var.double().sqrt().norm().item()] if var is not None else []
    return max(sizes) or 1.0


def _distance(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).norm().item()
