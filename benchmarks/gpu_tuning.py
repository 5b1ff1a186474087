"""Which configuration of each kernel is the fastest, and what is it that the planners' constants stand for?

    python benchmarks/gpu_tuning.py --out FOLDER                # on a GPU
    python benchmarks/gpu_tuning.py --out FOLDER --device cpu   # launches nothing: times the host's path, and says so
    python benchmarks/gpu_tuning.py --out FOLDER --dry-run      # compiles every candidate for sm_90, runs none; with
                                                                # --device cpu too: a few of them

A step of benchmarks/gpu_schedule.py: writes FOLDER/tuning.jsonl. Constants first (benchmarks/gpu_constants.py), then
CUDA C++ against Triton and a layer in one kernel against two (benchmarks/gpu_comparisons.py), then all candidates of
the choices that the benchmark's cases make (benchmarks/gpu_tuner.py). The level-2 cache is emptied before each sample.
Other processes compile ahead (benchmarks/gpu_precompile.py). Choices that the folder has already are not timed again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_precompile
import gpu_worker
from gpu_precompile import Compiled, Part
from gpu_steps import Deadline, Results, parser, remaining
from gpu_worker import Job

STEP = "tuning"
JOB_LIMIT = 40.0  # seconds of a job
PATIENCE = 15.0  # seconds that a job waits for its kernels before it compiles what is missing
ROUNDS = 7  # samples of each candidate
TYPES = ("bfloat16", "float32", "tf32", "float16")
OPERATORS = ("dense_block", "csp_stage", "partial_transition", "concat_conv", "post_dense_block", "two_way_dense_block")
NOT_LAUNCHED = "the host's path alone, by the CPU's clock: nothing is launched without a GPU"


def cases(args: argparse.Namespace) -> list[tuple[str, Any, str]]:
    """(name, case, type), most valuable first: what networks are trained in, dense blocks before the others."""
    from gpu_speed_cases import layers

    items = layers()
    made = [
        (f"{operator}: {item.case.name}, batch {item.batch}, {kind}", item.case, kind)
        for kinds in (TYPES[:2], TYPES[2:])
        for operator in OPERATORS
        for kind in kinds
        for item in items
        if item.operator == operator
    ]
    return [one for one in made if args.only in one[0] and one[2] in args.kinds]


def step(case: Any, kind: str, device: str) -> None:
    """A training step and an inference pass of a case; on the CPU of a single image, on memory that nobody reads."""
    import gpu_dry_run
    import torch
    from gpu_speed_cases import DTYPES

    if device != "cuda":
        return gpu_dry_run.launches_of(case, kind, 1)
    dtype, precision = DTYPES[kind]
    torch.set_float32_matmul_precision(precision)
    module = case.fused().to(dtype).to(memory_format=torch.channels_last)
    inputs = [torch.randn(s).to(dtype).contiguous(memory_format=torch.channels_last) for s in case.inputs]
    for training in (True, False):
        given = [t.detach().requires_grad_(training) for t in inputs]
        with torch.set_grad_enabled(training):
            y = module.train(training)(given) if case.as_list else module.train(training)(*given)
        if training:
            y.backward(torch.randn_like(y))


def parts(args: argparse.Namespace) -> list[Part]:
    """What is compiled ahead, by job."""
    import gpu_dry_run
    from gpu_comparisons import comparisons

    made: list[Part] = [(comparison.name, comparison.launch) for comparison in comparisons(args)]
    small = [(name, partial(gpu_dry_run.launches_of, case, kind)) for name, case, kind in cases(args)]
    if args.dry_run and args.device == "cpu":
        return [*made[-1:], *[part for part in small if part[0].startswith("concat_conv")][:1]]
    return [*made, *small]


# --- jobs ---


class Step:
    """What the jobs share."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        import torch
        from gpu_timing import Device, Gpu, Work, interleave
        from gpu_tuner import Tuner

        import csp_kernels as csp

        self.args, self.results = args, results
        self.cuda = args.device == "cuda"
        self.compiled = Compiled(args.compiled)
        csp.use_backend("triton" if self.cuda else "native")
        self.device = Gpu() if self.cuda else Device()
        if self.cuda:
            torch.set_default_device("cuda")

        def timer(works: Any) -> Any:
            samples = {
                name: (lambda work=work: self.device.time(Work(lambda: None, lambda _: work())))
                for name, work in works.items()
            }
            return interleave(samples, ROUNDS, warmup=1)

        note = "" if self.cuda else NOT_LAUNCHED
        wait = torch.cuda.synchronize if self.cuda else lambda: None
        lost = gpu_worker.poisoned if self.cuda else lambda: ""
        self.tuner = Tuner(args.out, results, timer, Deadline(args.limit), note, wait, lost)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """On the CPU the launchers run, and launch nothing."""
        if self.cuda:
            yield
            return
        from gpu_dry_run import Triton

        from csp_kernels.kernels.dry_run import dry_run

        with dry_run(gpu_precompile.TARGET, share=(1, 1)), Triton():
            yield

    def fine(self) -> bool:
        """Whether no candidate has failed since this was asked."""
        fine, self.tuner.fine = self.tuner.fine, True
        return fine

    def tune(self, name: str, case: Any, kind: str) -> Callable[[], bool]:
        def work() -> bool:
            from gpu_tuner import summaries

            self.compiled.of(name, PATIENCE)
            before = len(self.tuner.known)
            with self.launching(), self.tuner.installed():
                step(case, kind, self.args.device)
            if len(self.tuner.known) > before:
                for line in summaries(list(self.tuner.known.values())):
                    self.results.write(line)
            return self.fine()

        return work

    def measure(self, constant: Any) -> Callable[[], bool]:
        def work() -> bool:
            value, said = constant.measure(self.device) if self.cuda or constant.on_cpu else (None, "needs a GPU")
            self.results.write({"constant": constant.name, "value": value, "from": said})
            return True

        return work

    def compare(self, comparison: Any) -> Callable[[], bool]:
        def work() -> bool:
            self.compiled.of(comparison.name, PATIENCE)
            with self.launching():
                for kernel, works, first in comparison.works(self.args.device):
                    if (kernel, comparison.key) not in self.tuner.known:
                        self.tuner.compare(kernel, comparison.key, works, first)
            return self.fine()

        return work


def jobs(args: argparse.Namespace, results: Results) -> list[Job]:
    from gpu_comparisons import comparisons
    from gpu_constants import CONSTANTS

    if args.dry_run:
        compiled = Compiled(args.compiled)
        return [Job(name, built(name, compiled, results), {"job": name}) for name, _ in parts(args)]
    shared = Step(args, results)
    made = [Job(c.name, shared.measure(c), {"constant": c.name}) for c in CONSTANTS if args.only in c.name]
    made += [Job(c.name, shared.compare(c), {"kernel": c.name}) for c in comparisons(args)]
    return made + [Job(n, shared.tune(n, case, kind), {"kernel": n}) for n, case, kind in cases(args)]


def built(name: str, compiled: Compiled, results: Results) -> Callable[[], bool]:
    """Of a dry run: nothing is timed."""

    def work() -> bool:
        found = compiled.of(name, float("inf"))
        missing = [] if found.whole else ["a process that compiles some of its launches has ended"]
        wrong = [*found.failed, *missing]
        said = f"compiled for {gpu_precompile.TARGET}, {found.builds} builds in {found.seconds:.1f} s; not run"
        results.write({"job": name, "ok": not wrong, "message": "; ".join(wrong) or said})
        return not wrong

    return work


def arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--kinds", nargs="+", choices=TYPES, default=TYPES, help="types (default: all)")
    made.add_argument("--only", default="", help="jobs whose name contains this")
    made.add_argument("--compile", nargs=3, metavar=("FOLDER", "I", "N"), help=argparse.SUPPRESS)
    made.add_argument("--compiled", type=Path, help=argparse.SUPPRESS)


def compile_only(args: argparse.Namespace) -> int:
    """One of the processes that compile."""
    folder, i, n = args.compile
    target = gpu_precompile.target_of(args.device, args.dry_run)
    share = int(i), int(n)
    return gpu_precompile.compile_share(parts(args), Path(folder), share, target, args.limit, candidates=True)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that was tried was fine."""
    made = parser(__doc__ or "")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments(made)
    args = remaining(made.parse_args(argv), argv)
    given = [*(sys.argv[1:] if argv is None else argv)]
    if args.compile:
        return compile_only(args)
    if args.worker:
        return gpu_worker.work(STEP, args, jobs)
    given += ["--limit", f"{args.limit:.1f}"]  # of which the imports have taken some
    (args.out / f"{STEP}.timing.jsonl").unlink(missing_ok=True)
    limit = float("inf") if args.dry_run else JOB_LIMIT
    with gpu_precompile.compilers(__file__, args, given) as found:
        return gpu_worker.main(STEP, __file__, __doc__ or "", jobs, limit, [*given, *found], arguments)


if __name__ == "__main__":
    sys.exit(main())
