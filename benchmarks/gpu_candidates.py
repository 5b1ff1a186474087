"""What the GPU benchmark runs: cases of every operator, and the candidates of a case on a device."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_concat_conv
import bench_csp_stage
import bench_partial_transition
import torch
from blocks import BN_SIZE, DEFAULT_BLOCKS, Block, Checkpointed
from gpu_timing import Work
from race import Case, Runner, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import csp_kernels as csp
from csp_kernels.backends import why_not_cuda

DENSENET121 = (Block(64, 64, 56, 6), Block(64, 128, 28, 12), Block(64, 256, 14, 24), Block(64, 512, 7, 16))
COMPILERS = {"compile": "default", "compile max-autotune": "max-autotune"}  # candidate -> mode


def dense_case(block: Block) -> Case:
    arguments = block.layers, block.channels, block.growth, BN_SIZE
    return Case(
        f"dense block {block}",
        lambda: csp.DenseBlock(*arguments),
        lambda: csp.reference.DenseBlock(*arguments),
        [(block.batch, block.channels, block.size, block.size)],
    )


def layer_case(name: str, *arguments: int) -> Case:
    return Case(
        f"{name}, 128, 28x28",
        lambda: getattr(csp, name)(*arguments),
        lambda: getattr(csp.reference, name)(*arguments),
        [(16, 128, 28, 28)],
    )


CASES: dict[str, list[Case]] = {
    "dense_block": [dense_case(block) for block in (*DEFAULT_BLOCKS, *DENSENET121)],
    "concat_conv": bench_concat_conv.CASES,
    "partial_transition": bench_partial_transition.CASES,
    "csp_stage": bench_csp_stage.CASES,
    "post_dense_block": [layer_case("PostDenseBlock", 4, 128, 32, BN_SIZE)],
    "two_way_dense_block": [layer_case("TwoWayDenseBlock", 4, 128, 32, 2)],
}


class Scene:
    """The modules, inputs and output gradient of a case on a device: the same numbers for every candidate.

    images: instead of the case's own number of them. on: where the numbers are made ("cpu", "cuda").
    """

    def __init__(self, case: Case, dtype: torch.dtype, on: str, images: int | None = None) -> None:
        torch.manual_seed(0)
        self.as_list, self.dtype = case.as_list, dtype
        with torch.device(on):
            self.naive, self.fused = case.naive(), case.fused()
            shapes = [(images or n, *rest) for n, *rest in case.inputs]
            self.inputs = [torch.randn(shape).to(dtype) for shape in shapes]
        randomise(self.naive)
        self.fused.load_state_dict(self.naive.state_dict())
        with torch.no_grad():  # in eval mode: running statistics stay
            singles = [t[:1].float() for t in self.inputs]
            one = self.naive.eval()(singles) if case.as_list else self.naive.eval()(*singles)
        self.naive.train()
        self.grad = torch.randn((shapes[0][0], *one.shape[1:]), device=on).to(dtype)

    def runner(self, module: nn.Module, last: bool = True, wide: bool = False, **options: Any) -> Runner:
        """module on copies; last: in channels_last; wide: in float64. Options are what it is wrapped in."""
        layout = torch.channels_last if last else torch.contiguous_format
        kind = torch.float64 if wide else self.dtype
        own = copy.deepcopy(module).to(self.dtype).to(kind).to(memory_format=layout)
        inputs = [t.to(kind).contiguous(memory_format=layout) for t in self.inputs]
        grad = self.grad.to(kind).contiguous(memory_format=layout)
        return Runner(own, _call(own, **options), inputs, grad, self.as_list)

    def exact(self) -> Runner:
        """Eager in float64 on the same numbers after their rounding."""
        return self.runner(self.naive, wide=True)

    def ours(self) -> Iterator[tuple[str, Runner]]:
        yield "csp", self.runner(self.fused)
        if csp.backends()["triton"].available and not why_not_cuda():  # then the first has the 3x3 of csrc/cuda
            yield "csp triton", self.runner(self.fused, backend="triton")
        if hasattr(self.fused, "recompute"):
            module: Any = copy.deepcopy(self.fused)
            module.recompute = "bottleneck"
            yield "csp recompute", self.runner(module)

    def candidates(self, compilers: Sequence[str]) -> Iterator[tuple[str, Runner]]:
        """All, ours first, each made when its turn comes."""
        yield from self.ours()
        yield "eager NCHW", self.runner(self.naive, last=False)
        yield "eager channels_last", self.runner(self.naive)
        yield "checkpointed", self.runner(self.naive, checkpointed=True)
        for name in compilers:
            mode = COMPILERS[name]
            if mode == "default":  # the other takes minutes a block
                yield f"{name} NCHW", self.runner(self.naive, last=False, compiler=mode)
            yield f"{name} channels_last", self.runner(self.naive, compiler=mode)


def _call(module: nn.Module, checkpointed: bool = False, compiler: str = "", backend: str = "") -> Callable[..., Any]:
    """compiler: a mode of torch.compile. Checkpointed: a layer at a time in a dense block, elsewhere the whole.
    backend: instead of the one chosen; backward runs on its forward's."""
    if backend:
        return lambda *inputs: _on(backend, module, *inputs)
    if compiler:
        return torch.compile(module, mode=compiler)
    if not checkpointed:
        return module
    if isinstance(module, csp.reference.DenseBlock):
        return Checkpointed(module)
    return lambda *inputs: checkpoint(module, *inputs, use_reentrant=False)


def _on(backend: str, module: nn.Module, *inputs: Any) -> Any:
    with csp.use_backend(backend):
        return module(*inputs)


def passes(runner: Runner) -> dict[str, Work]:
    """Forward (keeping what backward needs), backward, and both."""

    def leaves() -> list[Tensor]:
        runner.module.zero_grad(set_to_none=True)
        return [t.detach().requires_grad_() for t in runner.inputs]

    return {
        "forward": Work(leaves, runner.forward),
        "backward": Work(lambda: runner.forward(leaves()), lambda y: y.backward(runner.grad)),
        "step": Work(lambda: None, lambda _: runner.step()),
    }


class Joined(nn.Module):
    """A module of several inputs as one of a single input, their concatenation."""

    def __init__(self, module: nn.Module, channels: Sequence[int], as_list: bool) -> None:
        super().__init__()
        self.module, self.channels, self.as_list = module, list(channels), as_list

    def forward(self, x: Tensor) -> Any:
        parts = x.split(self.channels, 1)
        return self.module(list(parts)) if self.as_list else self.module(*parts)


def traffic(scene: Scene) -> dict[str, dict[str, int]]:
    """Pass -> "naive" and "fused" -> bytes by csp.analysis: a forward pass, the rest of a step, a step."""
    channels = [t.shape[1] for t in scene.inputs]
    n, _, h, w = scene.inputs[0].shape
    shape = n, sum(channels), h, w
    model = Joined(copy.deepcopy(scene.fused).to(scene.dtype), channels, scene.as_list)
    step, forward = (csp.analysis.profile(model.train(mode), shape).total for mode in (True, False))
    found: dict[str, dict[str, int]] = {name: {} for name in ("forward", "backward", "step")}
    for kind in ("naive", "fused"):
        all_of_it, first = step[f"dram_bytes_{kind}"], forward[f"dram_bytes_{kind}"]
        found["forward"][kind], found["backward"][kind], found["step"][kind] = first, all_of_it - first, all_of_it
    return found
