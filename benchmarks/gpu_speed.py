"""How fast are the GPU's kernels? Copy bandwidth and matmul rate first; then dense blocks, CSP stages, transitions,
joins and networks, in training and inference, bfloat16 before float32: csp (CUDA C++ with Triton, and Triton alone),
eager channels_last, torch.compile, and cuDNN's fused graphs where its Python front end is installed.

    python benchmarks/gpu_speed.py --out FOLDER                 # on a GPU
    python benchmarks/gpu_speed.py --out FOLDER --device cpu    # tiny sizes, to try it out
    python benchmarks/gpu_speed.py --out FOLDER --dry-run       # compiles every launch for sm_90, runs none

A step of benchmarks/gpu_schedule.py: writes FOLDER/speed.jsonl, a line a candidate and mode, most valuable first
(benchmarks/gpu_speed_cases.py has the order). Every candidate is checked against float64 before it is timed; one that
is wrong, raises or loses the CUDA context is reported and left out. Medians and quartiles by CUDA events, the level-2
cache emptied before each call. bytes and flops are counted, not measured: gbs, tflops and the shares of both ceilings
say how fast those would have been moved and multiplied. peak_bytes: what a call needs beside what is there before it;
saved_bytes: what autograd keeps for backward. benchmarks/gpu_report.py makes tables of it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_precompile
import gpu_worker
from gpu_precompile import Compiled
from gpu_steps import Results, parser, read, remaining
from gpu_worker import Job, poisoned, said

STEP = "speed"
JOB_LIMIT = 90.0  # seconds of a candidate: torch.compile takes long for a network
PATIENCE = 15.0  # seconds that a candidate waits for its kernels before it compiles what is missing
SECONDS = 0.6  # of timing a candidate in a mode
ROUNDS = 5, 31
EMPTY = dict.fromkeys(
    ("median_ms", "q1_ms", "q3_ms", "bytes", "flops", "gbs", "tflops", "share_of_copy", "share_of_matmul",
     "peak_bytes", "saved_bytes", "agrees", "message")
)  # fmt: skip


def label(task: Any, mode: str) -> dict[str, Any]:
    """What a line is about, and nothing yet of what was found."""
    item = task.item
    about = {"kind": item.kind, "operator": item.operator, "case": item.case.name, "batch": item.batch}
    pixels = item.batch * item.case.inputs[0][2] * item.case.inputs[0][3]
    sizes = {"pixels": pixels, "channels": sum(c for _, c, _, _ in item.case.inputs)}
    return {**about, **sizes, "dtype": task.dtype, "mode": mode, "candidate": task.candidate, **EMPTY}


class Speed:
    """The worker's state: the device, its ceilings, and the scene of the latest item."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        from gpu_timing import Device, Gpu

        self.device: Device = Gpu() if args.device == "cuda" else Device()
        self.results, self.scene_of, self.cpu = results, ("", ""), args.device == "cpu"
        self.known: dict[str, float] = {}
        for line in read(results.path):
            if line.get("kind") == "ceiling":
                self.known[f"{line['operator']} {line['dtype']}"] = line["gbs"] or line["tflops"]

    # --- ceilings ---

    def ceilings(self) -> bool:
        """Copy bandwidth in GB/s, and TFLOP/s of a large square product in each type."""
        from gpu_speed_cases import DTYPES

        size = self.device.copy_bytes
        rate = self.device.copy_bandwidth()
        self.ceiling(
            "copy", f"{size >> 20} MiB", "bytes", {"bytes": 2 * size, "gbs": rate, "median_ms": 2 * size / rate / 1e6}
        )
        for name, (dtype, precision) in DTYPES.items():
            self.precision(precision)
            n = self.device.matmul_size
            ms = self.device.matmul(dtype)
            found = {"flops": 2 * n**3, "tflops": 2 * n**3 / ms / 1e9, "median_ms": ms}
            self.ceiling("matmul", f"{n} x {n} x {n}", name, found)
        return True

    def ceiling(self, operator: str, case: str, dtype: str, found: dict[str, float]) -> None:
        about = {"kind": "ceiling", "operator": operator, "case": case, "batch": None, "dtype": dtype, "mode": None}
        self.results.write({**about, "candidate": "torch", **EMPTY, **found})
        self.known[f"{operator} {dtype}"] = found.get("gbs", found.get("tflops", 0.0))

    def precision(self, name: str) -> None:
        import torch

        torch.set_float32_matmul_precision(name)
        torch.backends.cudnn.allow_tf32 = name != "highest"

    # --- candidates ---

    def task(self, task: Any) -> bool:
        """Checks and times a candidate in both modes."""
        from gpu_candidates import MODES
        from gpu_speed_cases import CUDNN

        if task.candidate in CUDNN:
            try:
                import cudnn  # noqa: F401
            except ImportError:
                said_so = "cuDNN's Python front end is not installed: no `import cudnn`"
                self.results.write({**label(task, "inference"), "message": said_so})
                return True
        self.enter(task)
        fine = [self.mode(task, mode) for mode in (MODES[1:] if task.candidate in CUDNN else MODES)]
        gc.collect()
        return all(fine)

    def enter(self, task: Any) -> None:
        """Makes the scene, unless it is there."""
        import torch
        from gpu_candidates import Scene, counts
        from gpu_speed_cases import DTYPES

        self.precision(DTYPES[task.dtype][1])
        torch._dynamo.reset()
        about = f"{task.item.operator} {task.item.case.name} {task.item.batch}", task.dtype
        if about != self.scene_of:
            self.scene = None
            gc.collect()
            self.scene, self.counts = Scene(task.item, task.dtype, self.device.kind), counts(task.item, task.dtype)
            self.scene_of = about

    def mode(self, task: Any, mode: str) -> bool:
        """One line; False if the candidate cannot run or is wrong."""
        line = label(task, mode)
        try:
            line |= self.measured(task, mode)
        except Exception as error:
            traceback.print_exc()
            self.results.write({**line, "agrees": False, "message": said(error)})
            if self.device.kind == "cuda" and poisoned():
                raise
            return False
        self.results.write(line)
        if line["message"]:
            print(f"FAILED: {task}, {mode}: {line['message']}", file=sys.stderr, flush=True)
        return bool(line["agrees"])

    def measured(self, task: Any, mode: str) -> dict[str, Any]:
        """Of a candidate that is right its times; of another one what is wrong."""
        from gpu_candidates import moved, work
        from gpu_speed_cases import COMPILED

        assert self.scene is not None
        runner = self.scene.runner(task.candidate)
        call = work(runner, mode)
        if wrong := self.scene.disagreement(call(), mode):
            return {"agrees": False, "message": wrong}
        found = self.times(call)
        counted = self.counts[mode]
        volume, flops, ms = moved(task.candidate, counted), counted["flops"], found["median_ms"]
        gbs, tflops = None if volume is None else volume / ms / 1e6, flops / ms / 1e9
        copy, matmul = self.known.get("copy bytes"), self.known.get(f"matmul {task.dtype}")
        found |= {"bytes": volume, "flops": flops, "gbs": gbs, "tflops": tflops, "agrees": True}
        found["share_of_copy"] = gbs / copy if gbs and copy else None
        found["share_of_matmul"] = tflops / matmul if matmul else None
        found["peak_bytes"] = self.device.peak_bytes(call) or None
        if mode == "training" and task.candidate != COMPILED:  # hooks would have it compiled again
            found["saved_bytes"] = runner.saved()
        return found

    def times(self, call: Callable[[], object]) -> dict[str, Any]:
        from gpu_timing import Work
        from harness import Timing

        work = Work(lambda: None, lambda _: call())
        once = self.device.time(work)
        rounds = 2 if self.cpu else max(ROUNDS[0], min(ROUNDS[1], int(1e3 * SECONDS / once)))
        timing = Timing.of([self.device.time(work) for _ in range(rounds)])
        return {"median_ms": timing.median, "q1_ms": timing.low, "q3_ms": timing.high}


# --- the step ---


def tasks(args: argparse.Namespace) -> list[Any]:
    """On this device, most valuable first."""
    from gpu_speed_cases import tasks as ordered

    from csp_kernels.backends import why_not_cuda, why_not_triton

    if args.dry_run:
        ours = ["csp triton"]
    elif args.device == "cpu":
        ours = ["csp native"]
    elif why_not_triton():
        raise RuntimeError(f"speed: {why_not_triton()}")
    else:
        ours = ["csp triton"] if why_not_cuda() else ["csp native", "csp triton"]
    kind = "cuda" if args.dry_run else args.device
    return [task for task in ordered(kind, ours) if args.only in str(task) and task.dtype in args.dtypes]


def jobs(args: argparse.Namespace, results: Results) -> list[Job]:
    compiled = Compiled(args.compiled)
    if args.dry_run:
        return [Job(str(t), built(t, compiled, results), label(t, "training")) for t in launched(args)]
    speed = Speed(args, results)

    def work(task: Any) -> Callable[[], bool]:
        def run() -> bool:
            if task.candidate.startswith("csp "):
                compiled.of(part(task), PATIENCE)
            return speed.task(task)

        return run

    first = Job("ceilings", speed.ceilings, {"kind": "ceiling", "operator": "copy", "dtype": "bytes", **EMPTY})
    return [first, *(Job(str(t), work(t), {**label(t, "training"), "agrees": False}) for t in tasks(args))]


def part(task: Any) -> str:
    """What the compilers call it: CUDA C++ or not, Triton's kernels are the same or fewer."""
    return str(task).rpartition(", ")[0]


def launched(args: argparse.Namespace) -> list[Any]:
    """A task for all that launches the same in Triton."""
    return list({part(task): task for task in tasks(args) if task.candidate.startswith("csp ")}.values())


def built(task: Any, compiled: Compiled, results: Results) -> Callable[[], bool]:
    """Of a dry run: nothing is measured."""

    def work() -> bool:
        found = compiled.of(part(task), float("inf"))
        wrong = [*found.failed, *([] if found.whole else ["a process that compiles some of its launches has ended"])]
        text = f"compiled for {gpu_precompile.TARGET}, {found.builds} builds in {found.seconds:.1f} s; not run"
        results.write({**label(task, "training"), "ok": not wrong, "message": "; ".join(wrong) or text})
        return not wrong

    return work


def arguments(made: argparse.ArgumentParser) -> None:
    kinds = ("bfloat16", "float32", "tf32")
    made.add_argument("--dtypes", nargs="+", choices=kinds, default=kinds, help="types that are measured")
    made.add_argument("--only", default="", help="candidates whose name contains this, such as 'dense_block'")
    made.add_argument("--compile", nargs=3, metavar=("FOLDER", "I", "N"), help=argparse.SUPPRESS)
    made.add_argument("--compiled", type=Path, help=argparse.SUPPRESS)


def compile_only(args: argparse.Namespace) -> int:
    """One of the processes that compile Triton's kernels beside the measurements."""
    from gpu_dry_run import launches

    folder, i, n = args.compile
    parts = ((part(task), lambda task=task: launches(task.item, task.dtype)) for task in launched(args))
    target = gpu_precompile.target_of(args.device, args.dry_run)
    return gpu_precompile.compile_share(parts, Path(folder), (int(i), int(n)), target, args.limit)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that was tried ran and was right."""
    made = parser(__doc__ or "")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments(made)
    args = remaining(made.parse_args(argv), argv)
    given = [*(sys.argv[1:] if argv is None else argv)]
    if args.compile:
        return compile_only(args)
    if args.worker:
        return gpu_worker.work(STEP, args, jobs)
    with gpu_precompile.compilers(__file__, args, given) as found:
        limit = float("inf") if args.dry_run else JOB_LIMIT
        return gpu_worker.main(STEP, __file__, __doc__ or "", jobs, limit, [*given, *found], arguments)


if __name__ == "__main__":
    sys.exit(main())
