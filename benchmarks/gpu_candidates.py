"""What a candidate of the GPU's speed step runs on: the modules and numbers of a case, what is true of them, and the
bytes and FLOPs that they are counted to take."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_speed_cases import CUDNN, DTYPES, EAGER, Item
from harness import relative_error
from race import FACTOR, Runner, randomise
from torch import Tensor, nn

import csp_kernels as csp

MODES = ("training", "inference")
FLOOR = {"float32": 1e-6, "tf32": 1e-4, "float16": 2e-4, "bfloat16": 1e-3}  # error that is allowed anyway
KINKS = {"float32": 2e-2, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 6e-2}  # of gradients: ReLUs near zero change sides


class Scene:
    """The modules, inputs and output gradient of an item in a type on a device: the same numbers for every candidate,
    and what float64 makes of them. on: where the numbers are made, "cpu" or "cuda"."""

    def __init__(self, item: Item, dtype: str, on: str) -> None:
        torch.manual_seed(0)
        self.item, self.name, self.dtype = item, dtype, DTYPES[dtype][0]
        with torch.device(on):
            self.naive, self.fused = item.case.naive(), item.case.fused()
            self.inputs = [torch.randn(shape).to(self.dtype) for shape in item.case.inputs]
        randomise(self.naive)
        self.fused.load_state_dict(self.naive.state_dict())
        with torch.no_grad():  # in eval mode: running statistics stay
            singles = [t[:1].float() for t in self.inputs]
            one = self.naive.eval()(singles) if item.case.as_list else self.naive.eval()(*singles)
        self.grad = torch.randn((item.batch, *one.shape[1:]), device=on).to(self.dtype)
        self.limits = functools.cache(self._limits)
        self.exact = functools.cache(self._exact)

    def runner(self, candidate: str) -> Runner:
        """A copy of the module in channels_last; chooses the backend for the process."""
        ours = candidate.startswith("csp ")
        csp.use_backend(candidate.removeprefix("csp ") if ours else "reference")
        if candidate in CUDNN:
            from gpu_cudnn import FusedGraphs

            return self._runner(self.naive, self.dtype, lambda block: FusedGraphs(block, packed=candidate != CUDNN[0]))
        return self._runner(
            self.fused if ours else self.naive, self.dtype, torch.compile if "compile" in candidate else None
        )

    def _runner(
        self, module: nn.Module, kind: torch.dtype, wrap: Callable[[Any], Callable[..., Any]] | None = None
    ) -> Runner:
        own = copy.deepcopy(module).to(self.dtype).to(kind).to(memory_format=torch.channels_last)
        tensors = [t.to(kind) for t in (*self.inputs, self.grad)]
        *inputs, grad = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        return Runner(own, wrap(own) if wrap else own, inputs, grad, self.item.case.as_list)

    def _exact(self, mode: str) -> list[Tensor]:
        """Eager in float64 on the same numbers after their rounding."""
        return work(self._runner(self.naive, torch.float64), mode)()

    def errors(self, results: Sequence[Tensor], mode: str) -> list[float]:
        """Of the output, then of each gradient; of a network's gradients, which its depth makes noise of where they are
        small, all together."""
        pairs = list(zip(results, self.exact(mode), strict=True))
        if self.item.kind == "network" and len(pairs) > 1:
            flat = [torch.cat([t.double().flatten() for t in side]) for side in zip(*pairs[1:], strict=True)]
            pairs = [pairs[0], (flat[0], flat[1])]
        return [relative_error(got, exact) for got, exact in pairs]

    def _limits(self, mode: str) -> list[float]:
        """Outputs may err FACTOR times as much as eager's; gradients by KINKS more."""
        factor = FACTOR[DTYPES[self.name][1]]
        eager = self.errors(work(self._runner(self.naive, self.dtype), mode)(), mode)
        return [factor * e + FLOOR[self.name] + (KINKS[self.name] if i else 0) for i, e in enumerate(eager)]

    def disagreement(self, results: Sequence[Tensor], mode: str) -> str:
        """What is wrong with a candidate's results, in words; "" if nothing."""
        found, limits = self.errors(results, mode), self.limits(mode)
        wrong = [i for i, (e, limit) in enumerate(zip(found, limits, strict=True)) if not e <= limit]
        if not wrong:
            return ""
        i = max(wrong, key=lambda i: found[i] / limits[i] if found[i] == found[i] else float("inf"))
        what = f"gradient {i} of {len(found) - 1}" if i else "the output"
        return f"{what} errs by {found[i]:.2e} against float64, {limits[i]:.2e} allowed; {len(wrong)} are wrong"


def work(runner: Runner, mode: str) -> Callable[[], list[Tensor]]:
    """A training step, or a forward pass in eval mode."""
    runner.module.train(mode == "training")
    return runner.step if mode == "training" else runner.infer


class Joined(nn.Module):
    """A module of several inputs as one of a single input, their concatenation."""

    def __init__(self, module: nn.Module, channels: Sequence[int], as_list: bool) -> None:
        super().__init__()
        self.module, self.channels, self.as_list = module, list(channels), as_list

    def forward(self, x: Tensor) -> Any:
        parts = x.split(self.channels, 1)
        return self.module(list(parts)) if self.as_list else self.module(*parts)


def counts(item: Item, dtype: str) -> dict[str, dict[str, int]]:
    """Mode -> "naive" and "fused" bytes by csp.analysis, and FLOPs: those of a forward pass as it is written, in
    training three times as many."""
    channels = [c for _, c, _, _ in item.case.inputs]
    n, _, h, w = item.case.inputs[0]
    with torch.device("meta"):
        model = item.case.fused().to(DTYPES[dtype][0])
    if item.case.as_list or len(channels) > 1:
        model = Joined(model, channels, item.case.as_list)
    found: dict[str, dict[str, int]] = {}
    csp.use_backend("auto")  # the meta device knows no other
    for mode in MODES:
        total = csp.analysis.profile(model.train(mode == "training"), (n, sum(channels), h, w)).total
        flops = total["flops"] * (3 if mode == "training" else 1)
        found[mode] = {"naive": total["dram_bytes_naive"], "fused": total["dram_bytes_fused"], "flops": flops}
    return found


def moved(candidate: str, counted: dict[str, int]) -> int | None:
    """Bytes that a candidate is counted to move; None where nobody knows."""
    if candidate.startswith("csp "):
        return counted["fused"]
    return counted["naive"] if candidate == EAGER else None
