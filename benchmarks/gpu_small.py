"""One small case of each kernel: what gpu_sanitizer.py and gpu_counters.py run under NVIDIA's tools.

python benchmarks/gpu_small.py --device cuda --backend native   # every case, with lines that say where it is
python benchmarks/gpu_small.py --device cpu                     # by the C++ operators
python benchmarks/gpu_small.py --dry-run                        # compiled for sm_90, not run
python benchmarks/gpu_small.py --device cuda --times            # kernels of a training step, a JSON line each
python benchmarks/gpu_small.py --device cuda --profiled         # that step alone between cudaProfilerStart and Stop
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import csp_kernels as csp

POISONED = 75  # exit status where no kernel can run any more


@dataclass(frozen=True)
class Case:
    """A layer, and the channels of its inputs. The maps are odd: no tile is full."""

    build: Callable[[], nn.Module]
    channels: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    precision: str = "highest"
    training: bool = True
    size: tuple[int, int, int] = (2, 9, 7)  # N, H, W


def dense() -> nn.Module:
    return csp.DenseBlock(1, 16, 16, 2)


CASES: dict[str, Case] = {
    "dense block, bfloat16": Case(dense, (16,)),
    "dense block, float32": Case(dense, (16,), torch.float32),
    "dense block, tf32": Case(dense, (16,), torch.float32, "high"),
    "dense block, inference": Case(dense, (16,), training=False),
    "post": Case(lambda: csp.PostDenseBlock(1, 16, 16, 2), (16,)),
    "two_way": Case(lambda: csp.TwoWayDenseBlock(1, 16, 16, 2), (16,)),
    "transition": Case(lambda: csp.Transition(16, 8), (16,)),
    "concat, mish": Case(lambda: csp.ConcatConv([16, 8], 24, act="mish"), (16, 8)),
    "partial transition": Case(lambda: csp.PartialTransition(8, 16, 16, 24), (8, 16)),
    "csp stage": Case(lambda: csp.CSPDenseStage(16, 24, 1, 8, 2), (16,)),
}
LAYERS = {"cuda": Case(lambda: csp.DenseBlock(2, 128, 32, 4), (128,), size=(32, 28, 28))}
LAYERS["cpu"] = Case(dense, (16,), torch.float32)  # of --times and --profiled


def step(case: Case, device: str) -> Callable[[], None]:
    """A function that runs forward, and backward in training, once."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(case.precision)
    n, h, w = case.size
    module: Any = case.build().to(device, case.dtype).to(memory_format=torch.channels_last).train(case.training)
    inputs = [torch.randn(n, c, h, w, device=device).to(case.dtype) for c in case.channels]
    inputs = [x.to(memory_format=torch.channels_last).requires_grad_(case.training) for x in inputs]
    given: Any = (inputs,) if isinstance(module, csp.ConcatConv) else inputs

    def once() -> None:
        with torch.set_grad_enabled(case.training):
            y = module(*given)
        if case.training:
            y.sum().backward()

    return once


def everything(device: str, names: Sequence[str]) -> int:
    """Runs the cases, and says so before and after each one: the tool's messages are between the two."""
    status = 0
    for name in names:
        print(f"case {name} begins", flush=True)
        try:
            step(CASES[name], device)()
            synchronise(device)
            print(f"case {name} ends", flush=True)
        except Exception as error:  # of one case: the others run all the same
            traceback.print_exc(file=sys.stdout)
            print(f"case {name} failed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            status = 1
            try:
                synchronise(device)
            except RuntimeError:
                return POISONED
    return status


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times(device: str) -> None:
    """A JSON line a kernel (an operator on the CPU): name, calls and microseconds in one training step."""
    from torch.profiler import ProfilerActivity, profile

    once = step(LAYERS[device], device)
    for _ in range(2):
        once()
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA]) as found:
        once()
        synchronise(device)
    field = f"self_{'cpu' if device == 'cpu' else 'device'}_time_total"
    for event in found.key_averages():
        if getattr(event, field) > 0:
            print(json.dumps({"name": event.key, "calls": event.count, "us": getattr(event, field)}))


def profiled(device: str) -> None:
    """Compiles and warms up, then marks one step for ncu --profile-from-start off."""
    once = step(LAYERS[device], device)
    for _ in range(2):
        once()
    synchronise(device)
    if device == "cuda":
        torch.cuda.profiler.start()
    once()
    synchronise(device)
    if device == "cuda":
        torch.cuda.profiler.stop()


@contextlib.contextmanager
def compiled_only(target: str) -> Iterator[None]:
    """Inside, every launch is compiled for the target and none is run."""
    from gpu_dry_run import Triton

    from csp_kernels.kernels.dry_run import dry_run

    csp.use_backend("native")  # its operators are what `Triton` takes the place of
    with dry_run(target) as launches, Triton():
        yield
    print(f"{len(launches)} builds for {target}; nothing was executed")


def part(text: str) -> slice:
    """Of "1/3": the second and each third behind it."""
    first, count = map(int, text.split("/"))
    return slice(first, None, count)


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a case raises; 75 if it leaves a process in which nothing runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--backend", choices=("native", "triton"), default="native")
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="CASE")
    parser.add_argument(
        "--part", type=part, default=slice(None), metavar="I/N", help="each Nth of them from the Ith on"
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--target", default="sm_90", help="of a dry run")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--profiled", action="store_true")
    args = parser.parse_args(argv)
    if args.dry_run:
        with compiled_only(args.target):
            return everything("cpu", args.cases[args.part])
    csp.use_backend(args.backend)
    if args.times:
        times(args.device)
    elif args.profiled:
        profiled(args.device)
    else:
        return everything(args.device, args.cases[args.part])
    return 0


if __name__ == "__main__":
    sys.exit(main())
