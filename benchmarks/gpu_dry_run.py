"""Without a GPU: what the speed step launches, on memory that nobody reads or writes, for kernels/dry_run.py."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from gpu_speed_cases import DTYPES, Item
from race import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from csp_kernels.ops import _packed
from csp_kernels.programs import calls

SHARED = {  # bytes that a program may have
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx90a": 65536, "gfx942": 65536,
}  # fmt: skip


class Triton(TorchDispatchMode):
    """Calls the operators' Triton functions, as for CUDA tensors, wherever the tensors are."""

    def __enter__(self) -> Any:
        self.before, _packed.SHARES = _packed.SHARES, False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _packed.SHARES = self.before
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "csp_kernels":
            return func(*args, **(kwargs or {}))
        from csp_kernels.kernels import stage

        launcher = {"stage": stage.forward, "stage_backward": stage.backward}.get(func._opname, func)
        return launcher(*args, **(kwargs or {}))


class Clock:
    """Kernel -> seconds that Triton took to compile it; what its cache on disk has takes none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            name = f"{src.fn.__module__.rpartition('.')[2]}.{src.fn.__name__}"  # as a Launch has it
            self.seconds[name] += times.total / 1e6


def launches(item: Item, dtype: str) -> None:
    """All that a training step and a forward pass in eval mode launch: of a network what each of its fused layers does.
    To be called within `Triton` and a dry run."""
    if item.kind == "layer":
        return launches_of(item.case, dtype)
    storage, precision = DTYPES[dtype]
    torch.set_float32_matmul_precision(precision)
    for call in calls(item.case.fused(), torch.empty(item.case.inputs[0], device="meta")):
        step(copy.deepcopy(call.layer), call.inputs, storage)


def launches_of(case: Case, dtype: str, images: int | None = None) -> None:
    """Of a layer; images: another number of them than the case's."""
    storage, precision = DTYPES[dtype]
    torch.set_float32_matmul_precision(precision)
    inputs = [torch.empty(images or n, *rest, device="meta", requires_grad=True) for n, *rest in case.inputs]
    step(case.fused(), [inputs] if case.as_list else inputs, storage)


def step(module: nn.Module, inputs: Sequence[Any], dtype: torch.dtype) -> None:
    """Forward and backward, and a forward pass in eval mode. inputs: those of the module, on any device."""
    module = module.to(dtype).to(memory_format=torch.channels_last)
    given = [real(value, dtype) for value in inputs]
    for training in (True, False):
        with torch.set_grad_enabled(training):
            result = module.train(training)(*given)
        if training:
            outputs = [result] if isinstance(result, Tensor) else list(result)
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def real(value: Any, dtype: torch.dtype) -> Any:
    """An image of the same size on the CPU, in channels_last; lists of images too."""
    if isinstance(value, Tensor):
        made = torch.empty(value.shape, dtype=dtype, memory_format=torch.channels_last)
        return made.requires_grad_(value.requires_grad)
    return [real(item, dtype) for item in value] if isinstance(value, (list, tuple)) else value
