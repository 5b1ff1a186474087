"""Are the GPU's kernels right? Every kernel family, every instruction of the stage executor, CUDA C++, in float32 (full
and TF32), bfloat16, float16 and float64, forward and backward, against float64, by the tolerances of the tests.

    python benchmarks/gpu_correctness.py --out FOLDER                      # on a GPU
    python benchmarks/gpu_correctness.py --out FOLDER --device cpu         # the C++ operators, on tiny maps
    python benchmarks/gpu_correctness.py --out FOLDER --dry-run            # compiles every launch for sm_90, runs none;
                                                                           # with --device cpu too: a few of them

A step of benchmarks/gpu_schedule.py: writes FOLDER/correctness.jsonl, a line a check, most valuable first
(benchmarks/gpu_checks.py). Other processes compile ahead of the checks (benchmarks/gpu_precompile.py). Each check
stands alone: one that raises, hangs or loses the CUDA context costs itself and no other (benchmarks/gpu_worker.py).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_precompile
import gpu_worker
from gpu_precompile import Compiled
from gpu_steps import Results, parser, remaining
from gpu_worker import Job

STEP = "correctness"
JOB_LIMIT = 40.0  # seconds of a check, the wait for its kernels included; a dry run waits until the step's end
PATIENCE = 15.0  # seconds that a check waits for its kernels before it compiles what is missing


def checks(args: argparse.Namespace) -> list[Any]:
    """What there is to check on this device, most valuable first."""
    from gpu_checks import TYPES, Table

    from csp_kernels.backends import why_not_cuda, why_not_triton

    if args.device == "cuda" and not args.dry_run and why_not_triton():
        raise RuntimeError(f"correctness: {why_not_triton()}")
    compiled = args.device == "cuda" and not args.dry_run and not why_not_cuda()
    table = Table("cuda" if args.dry_run else args.device, compiled)
    few = args.dry_run and args.device == "cpu"
    found = table.few() if few else table.checks([kind for kind in TYPES if kind in args.kinds])
    return [check for check in found if args.only in str(check)]


def jobs(args: argparse.Namespace, results: Results) -> list[Job]:
    compiled = Compiled(args.compiled)
    if not args.dry_run:
        prepare(args.device)
    else:
        return [Job(str(c), built(c, compiled, results), c.label) for c in checks(args)]
    return [Job(str(c), checked(c, args.device, compiled, results), c.label) for c in checks(args)]


def prepare(device: str) -> None:
    """For the rest of the process: torch.empty gives NaN, as in the tests, the reference has full float32."""
    import torch

    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010 - mypy does not know it


def checked(check: Any, device: str, compiled: Compiled, results: Results) -> Callable[[], bool]:
    def work() -> bool:
        compiled.of(str(check), PATIENCE)
        line = check.run(device)
        results.write(line)
        if not line["ok"]:
            print(f"FAILED: {check}: {line['message']}", file=sys.stderr, flush=True)
        return bool(line["ok"])

    return work


def built(check: Any, compiled: Compiled, results: Results) -> Callable[[], bool]:
    """Of a dry run: nothing is compared."""

    def work() -> bool:
        found = compiled.of(str(check), float("inf"))
        missing = [] if found.whole else ["a process that compiles some of its launches has ended"]
        wrong = [*found.failed, *missing]
        said = f"compiled for {gpu_precompile.TARGET}, {found.builds} builds in {found.seconds:.1f} s; not run"
        message = "; ".join(wrong) or said
        results.write({**check.label, "errors": [], "allowed": [], "ok": not wrong, "message": message})
        return not wrong

    return work


def arguments(made: argparse.ArgumentParser) -> None:
    kinds = ("bfloat16", "float32", "tf32", "float16", "float64")
    made.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="types that are checked (default: all)")
    made.add_argument("--only", default="", help="checks whose name contains this")
    made.add_argument("--compile", nargs=3, metavar=("FOLDER", "I", "N"), help=argparse.SUPPRESS)
    made.add_argument("--compiled", type=Path, help=argparse.SUPPRESS)


def compile_only(args: argparse.Namespace) -> int:
    """One of the processes that compile."""
    folder, i, n = args.compile
    parts = ((str(check), check.launch) for check in checks(args) if check.backend == "triton")
    target = gpu_precompile.target_of(args.device, args.dry_run)
    return gpu_precompile.compile_share(parts, Path(folder), (int(i), int(n)), target, args.limit)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that was tried was right."""
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
    with gpu_precompile.compilers(__file__, args, given) as found:
        limit = float("inf") if args.dry_run else JOB_LIMIT
        return gpu_worker.main(STEP, __file__, __doc__ or "", jobs, limit, [*given, *found], arguments)


if __name__ == "__main__":
    sys.exit(main())
