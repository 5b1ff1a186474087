"""Without a GPU: every launch that the benchmark's cases and tests/gpu make is compiled, none is run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from race import Case
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import csp_kernels as csp

TESTS = Path(__file__).resolve().parents[1] / "tests"
STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Job = tuple[str, Callable[[], object]]


class Triton(TorchDispatchMode):
    """Calls the operators' Triton functions, as for CUDA tensors, wherever the tensors are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "csp_kernels":
            return func(*args, **(kwargs or {}))
        from csp_kernels.kernels import stage

        launcher = {"stage": stage.forward, "stage_backward": stage.backward}.get(func._opname, func)
        return launcher(*args, **(kwargs or {}))


def step(case: Case, dtype: torch.dtype, precision: str, images: int | None, recompute: bool) -> None:
    """Forward and backward, and a forward pass in eval mode, on memory that nobody reads or writes."""
    torch.set_float32_matmul_precision(precision)
    module: Any = case.fused().to(dtype).to(memory_format=torch.channels_last)
    if recompute:
        module.recompute = "bottleneck"
    shapes = [(images or n, *rest) for n, *rest in case.inputs]
    inputs = [torch.empty(s, dtype=dtype, memory_format=torch.channels_last).requires_grad_() for s in shapes]
    for training in (True, False):
        with torch.set_grad_enabled(training):
            y = module.train(training)(inputs) if case.as_list else module.train(training)(*inputs)
        if training:
            y.backward(torch.empty_like(y))


def benchmark_jobs(cases: Sequence[tuple[str, Case]], args: argparse.Namespace) -> Iterator[Job]:
    from gpu import DTYPES

    for operator, case in cases:
        kinds = (False, True) if hasattr(case.fused(), "recompute") else (False,)
        for name in args.dtypes:
            dtype, precision = DTYPES[name]
            for again in kinds:
                label = f"{operator}: {case.name}, {name}{', recompute' if again else ''}"
                yield label, partial(step, case, dtype, precision, args.batch, again)


def test_jobs() -> Iterator[Job]:
    """The tables of tests/gpu, trained and frozen."""
    sys.path[:0] = [str(TESTS), str(TESTS / "gpu")]
    cases, stages, table = (importlib.import_module(name) for name in ("cases", "stage_cases", "gpu_cases"))
    tables = {"operators": table.OPERATORS, "large": table.LARGE}
    for where, members in tables.items():
        for name, member in members.items():
            for dtype in STORAGE:
                for frozen in ((), (True,)):
                    case = replace(member, dtype=dtype, frozen=frozen)
                    yield f"tests, {where}: {name}, {dtype}", partial(_run, cases, case)
    for name, graph in stages.GRAPHS.items():
        for dtype in STORAGE:
            for fixed in (False, True):
                case = stages.Case(graph, (fixed,), dtype=dtype)
                yield f"tests, stage: {name}, {dtype}", partial(_stage, stages, case)


def _run(cases: Any, case: Any) -> None:
    leaves, running = case.leaves(), case.running()
    cases.run(case, csp.ops, leaves, running)
    with torch.no_grad():
        case(csp.ops, leaves, running)


def _stage(stages: Any, case: Any) -> None:
    """csp.ops.stage with gradients and without."""
    inputs, params, running = stages.random_arguments(case.graph, case.flags)
    leaves = [*(t.to(case.dtype) for t in inputs), *(t.to(case.wide) for t in params)]
    leaves = [t.requires_grad_() for t in leaves]
    given = case.graph, leaves[: len(inputs)], leaves[len(inputs) :], [t.to(case.wide) for t in running]
    for training in (True, False):
        with torch.set_grad_enabled(training):
            outputs, _ = csp.ops.stage(*given, frozen=case.flags, eps=case.eps)
        if training:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


# --- the table ---

SHARED = {  # bytes that a program may have
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx90a": 65536, "gfx942": 65536,
}  # fmt: skip
TILE = ("BP", "BN", "BK", "STAGES")  # constexpr arguments that make a configuration


@dataclass
class Line:
    """Launches of one kernel in one configuration."""

    builds: int = 0  # for other types, alignments and flags
    launches: int = 0
    shared: int = 0  # bytes, of the largest


class Clock:
    """Kernel -> seconds that Triton took to compile it; what its cache on disk has takes none."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            name = f"{src.fn.__module__.rpartition('.')[2]}.{src.fn.__name__}"  # as a Launch has it
            self.seconds[name] += times.total / 1e6


def show(launches: Sequence[Any], seconds: Mapping[str, float]) -> None:
    """A line a kernel and configuration, the kernel's compile time with its first."""
    lines: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(Line))
    for one in launches:
        tile = " ".join(f"{key} {one.constants[key]}" for key in TILE if key in one.constants)
        line = lines[one.kernel][f"{tile} warps {one.warps}".strip()]
        line.builds, line.launches = line.builds + 1, line.launches + one.times
        line.shared = max(line.shared, one.shared)
    print(f"{'kernel':<24}{'configuration':<44}{'builds':>8}{'launches':>10}{'shared KiB':>12}{'compile s':>11}")
    for kernel, members in sorted(lines.items()):
        for i, (tile, line) in enumerate(sorted(members.items())):
            name, spent = (kernel, f"{seconds.get(kernel, 0.0):.1f}") if i == 0 else ("", "")
            counts = f"{line.builds:>8}{line.launches:>10}{line.shared / 1024:>12.1f}"
            print(f"{name:<24}{tile:<44}{counts}{spent:>11}".rstrip())


def failures(jobs: Iterable[Job], launches: Sequence[Any], target: str) -> int:
    """Runs the jobs; how many messages there were about what cannot be built, or what the target could not run."""
    found: set[str] = set()

    def tell(message: str, where: str = "") -> None:
        if message not in found:
            print(f"FAILED: {where}{message}", file=sys.stderr)
        found.add(message)

    for name, job in jobs:
        try:
            with Triton():
                job()
        except Exception as error:  # of a compiler: the others are built all the same
            tell(f"{type(error).__name__}: {error}", f"{name}: ")
    limit = SHARED.get(target)
    for one in launches:
        if limit is not None and one.shared > limit:
            tell(f"{one.kernel} {one.constants}: {one.shared} bytes of shared memory, {limit} allowed")
    return len(found)


def main(cases: Sequence[tuple[str, Case]], args: argparse.Namespace) -> int:
    """1 if a launch cannot be built, or could not run on the target."""
    from csp_kernels.kernels.dry_run import dry_run, parse

    try:
        parse(args.target)
    except ValueError as error:
        print(f"--target: {error}", file=sys.stderr)
        return 2
    csp.use_backend("native")  # its operators are what `Triton` takes the place of
    jobs = list(benchmark_jobs(cases, args)) + (list(test_jobs()) if args.with_tests else [])
    clock = Clock()
    knobs.compilation.listener = clock
    with dry_run(args.target, candidates=args.candidates) as launches:
        failed = failures(jobs, launches, args.target)
    print(f"dry run for {args.target}: {len(jobs)} cases, nothing was executed")
    show(launches, clock.seconds)
    total = sum(one.times for one in launches)
    print(f"{len(launches)} builds for {total} launches, {sum(clock.seconds.values()):.0f} s of compilation")
    return 1 if failed else 0
