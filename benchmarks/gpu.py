"""Every operator on a GPU: csp (with CUDA C++ where it is compiled in, and then by Triton alone too), eager in both
layouts, checkpointed, torch.compile (default and max-autotune).

    python benchmarks/gpu.py                            # all cases in float32, tf32, float16 and bfloat16
    python benchmarks/gpu.py --operators dense_block --dtypes bfloat16 --only 64,128
    python benchmarks/gpu.py --dry-run --target sm_90   # no GPU: compiles every kernel, runs none
    python benchmarks/gpu.py --device cpu --batch 1     # tries this file out

Forward, backward and step: medians of interleaved rounds, by CUDA events, the level-2 cache emptied before. GB/s are
csp.analysis' predicted bytes by the time; their share is of a large copy, measured first. Peak memory is of a step,
beside inputs and parameters; what max-autotune keeps in CUDA graphs is not in it. All candidates are first checked
against float64. Rows are appended to benchmarks/results/<device>.csv; benchmarks/plot.py draws them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import platform
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import plot
import torch
from gpu_candidates import CASES, COMPILERS, Scene, passes, traffic
from gpu_timing import Device, Gpu, interleave
from harness import Timing, append_csv, relative_error
from race import FACTOR, KINKS, Case, Runner

import csp_kernels as csp
from csp_kernels.backends import why_not_cuda, why_not_triton

DTYPES = {  # name -> storage, float32 matmul precision
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
    "bfloat16": (torch.bfloat16, "highest"),
}
FLOOR = {"float32": 1e-6, "tf32": 1e-4, "float16": 2e-4, "bfloat16": 1e-3}  # error that is allowed anyway
RESULTS = Path(__file__).resolve().parent / "results"
OURS = "csp"


@dataclass(frozen=True)
class Outcome:
    """What was measured of a candidate; times by pass."""

    times: dict[str, Timing]
    peak: int
    error: float
    agrees: bool


def disagreeing(errors: Mapping[str, list[float]], dtype: str) -> set[str]:
    """Outputs may err FACTOR times as much as eager's; gradients by KINKS more: single ReLUs near zero change sides."""
    factor, eager = FACTOR[DTYPES[dtype][1]], [v for name, v in errors.items() if name.startswith("eager")]
    limits = [factor * max(v) + FLOOR[dtype] + (KINKS if i else 0) for i, v in enumerate(zip(*eager, strict=True))]
    return {
        name
        for name, values in errors.items()
        if len(values) != len(limits) or not all(v <= limit for v, limit in zip(values, limits, strict=True))
    }


def measure(scene: Scene, args: argparse.Namespace, device: Device, dtype: str) -> tuple[dict[str, Outcome], list[str]]:
    """Of each candidate, in each pass; and the names of those that could not run."""
    truth = scene.exact().step()
    found: dict[str, Runner] = {}
    errors: dict[str, list[float]] = {}
    failed: list[str] = []
    for name, runner in scene.candidates(args.compilers):
        try:
            results = runner.step()
        except Exception:  # of a compiler, or for want of memory: the others are measured all the same
            failed.append(name)
            traceback.print_exc()
            continue
        errors[name] = [relative_error(got, exact) for got, exact in zip(results, truth, strict=True)]
        found[name] = runner
    bad = disagreeing(errors, dtype)
    del truth
    peaks = {name: device.peak_bytes(runner.step) for name, runner in found.items()}
    works = {name: passes(runner) for name, runner in found.items()}
    times: dict[str, dict[str, Timing]] = {name: {} for name in found}
    for step in ("forward", "backward", "step"):
        samples = {name: (lambda work=work[step]: device.time(work)) for name, work in works.items()}
        for name, timing in interleave(samples, args.rounds).items():
            times[name][step] = timing
    return {name: Outcome(times[name], peaks[name], max(errors[name]), name not in bad) for name in found}, failed


def moved(name: str, volumes: Mapping[str, int]) -> int | None:
    """Bytes that a candidate moves, as predicted; None where nobody knows."""
    if name.startswith(OURS):
        return volumes["fused"]
    return volumes["naive"] if name.startswith("eager") else None


def environment(device: Device, copy: float) -> dict[str, object]:
    """Columns that say where and when a row was measured."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "csp_kernels": csp.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": triton,
        "python": platform.python_version(),
        "copy_gbs": round(copy, 1),
    }


def rows(
    where: dict[str, object], labels: dict[str, object], found: Mapping[str, Outcome],
    volumes: Mapping[str, Mapping[str, int]], copy: float,
) -> list[dict[str, object]]:  # fmt: skip
    """A row a candidate and pass."""
    made: list[dict[str, object]] = []
    for name, outcome in found.items():
        for step, t in outcome.times.items():
            volume = moved(name, volumes[step])
            rate = None if volume is None else volume / t.median / 1e6
            made.append(
                {
                    **where, **labels, "pass": step, "candidate": name, "median_ms": round(t.median, 4),
                    "q1_ms": round(t.low, 4), "q3_ms": round(t.high, 4), "bytes": "" if volume is None else volume,
                    "gbs": "" if rate is None else round(rate, 1),
                    "share_of_copy": "" if rate is None else round(rate / copy, 3),
                    "peak_bytes": outcome.peak, "error": f"{outcome.error:.3e}", "agrees": outcome.agrees,
                }
            )  # fmt: skip
    return made


def show(title: str, made: list[dict[str, object]]) -> None:
    """The table of a case: a line a candidate."""
    print(f"\n{title}\n{'':<34}{'forward':>10}{'backward':>10}{'step ms':>10}{'GB/s':>8}{'share':>7}{'peak MiB':>10}")
    for forward, backward, step in zip(made[::3], made[1::3], made[2::3], strict=True):
        times = "".join(f"{row['median_ms']:>10.3f}" for row in (forward, backward, step))
        peak = f"{float(str(step['peak_bytes'])) / 2**20:>10.1f}"
        rate = f"{step['gbs']!s:>8}{step['share_of_copy']!s:>7}"
        verdict = "" if step["agrees"] else f"  WRONG, error {step['error']}"
        print(f"{step['candidate']:<34}{times}{rate}{peak}{verdict}")
    steps = {str(row["candidate"]): float(str(row["median_ms"])) for row in made[2::3]}
    best = {
        kind: min((t for n, t in steps.items() if n.startswith(kind)), default=0.0) for kind in ("eager", "compile")
    }
    ours = steps.get(OURS)
    if ours and all(row["agrees"] for row in made):
        print("; ".join(f"{t / ours:.2f}x as fast as the better {kind}" for kind, t in best.items() if t))


def run(case: Case, operator: str, args: argparse.Namespace, device: Device, dtype: str, copy: float) -> bool:
    """Measures one case in one dtype; False if a candidate is wrong or could not run."""
    storage, precision = DTYPES[dtype]
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    torch._dynamo.reset()
    scene = Scene(case, storage, device.kind, args.batch)
    found, failed = measure(scene, args, device, dtype)
    labels: dict[str, object] = {"operator": operator, "case": case.name, "dtype": dtype}
    labels |= {"batch": scene.inputs[0].shape[0], "rounds": args.rounds}
    made = rows(environment(device, copy), labels, found, traffic(scene), copy)
    show(f"{operator}: {case.name}, batch {labels['batch']}, {dtype}", made)
    append_csv(args.csv, made)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    del found, scene
    gc.collect()
    return not failed and all(row["agrees"] for row in made)


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--batch", type=int, help="images, instead of each case's own number")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--compilers", nargs="*", choices=list(COMPILERS), default=list(COMPILERS), help="none: no names"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--csv", type=Path, help="file the rows are appended to")
    parser.add_argument("--plot", action="store_true", help="draw the file's rows in the end")
    parser.add_argument("--dry-run", action="store_true", help="compile every launch of these cases, run none")
    parser.add_argument("--with-tests", action="store_true", help="dry run: the launches of tests/gpu too")
    parser.add_argument("--candidates", action="store_true", help="dry run: every configuration, not only the first")
    parser.add_argument("--target", default="sm_90", help="dry run: the architecture to compile for")
    args = parser.parse_args(argv)
    if min(n for n in (args.rounds, args.batch) if n is not None) < 1:
        parser.error("--rounds and --batch: expected positive numbers")
    return args


def main(argv: list[str] | None = None) -> int:
    """1 if a candidate is wrong or cannot run, or a launch cannot be built."""
    args = parse(argv)
    chosen = [(operator, case) for operator in args.operators for case in CASES[operator] if args.only in case.name]
    if args.dry_run:
        import gpu_dry_run

        return gpu_dry_run.main(chosen, args)
    if args.device == "cuda" and why_not_triton():
        print(f"no GPU benchmark: {why_not_triton()}; --dry-run compiles the kernels", file=sys.stderr)
        return 1
    device = Gpu() if args.device == "cuda" else Device()
    csp.use_backend("triton" if args.device == "cuda" and why_not_cuda() else "native")
    args.csv = args.csv or RESULTS / f"{slug(device.name)}.csv"
    copy = device.copy_bandwidth()
    print("; ".join(f"{key} {value}" for key, value in environment(device, copy).items()))
    fine = [run(case, operator, args, device, dtype, copy) for operator, case in chosen for dtype in args.dtypes]
    if args.plot and fine:
        plot.main([str(args.csv)])
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
