"""The dense block side by side: ours, eager in both layouts, checkpointed, torch.compile.

    python benchmarks/bench_dense_block.py --mode train --blocks 16,128,28,12 16,256,14,24
    pytest benchmarks/bench_dense_block.py          # pytest-benchmark entries: forward, backward, step

All are first checked against the naive block in float64; a block on which one is wrong gets no speed-up.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch
from blocks import DEFAULT_BLOCKS, Block, Candidate, candidates, exact
from harness import Timing, append_csv, environment, interleave, mm_ceiling, relative_error

from csp_kernels.demo.measure import saved_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).resolve().parent / "results" / "dense_block.csv"
OURS, EAGER, COMPILED = "csp", ("eager NCHW", "eager channels_last"), ("compile NCHW", "compile channels_last")
# Allowed error beside the worse eager layout's own error, and what is allowed anyway (rounding of dtype).
FACTOR = {"highest": 2.0, "high": 16.0}
FLOOR = {"float32": 1e-6, "bfloat16": 1e-3}


def errors(block: Block, mode: str, dtype: torch.dtype, found: dict[str, Candidate]) -> dict[str, float]:
    """Name -> largest relative error against float64 among the output and all gradients."""
    truth = exact(block, mode, dtype)
    return {name: _largest(c.step() if mode == "train" else c.infer(), truth) for name, c in found.items()}


def _largest(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    if len(got) != len(truth):
        return math.inf
    worst = max(relative_error(a, b) for a, b in zip(got, truth, strict=True))
    return worst if math.isfinite(worst) else math.inf


def wrong(error: dict[str, float], dtype: str, precision: str) -> list[str]:
    """The candidates that do not agree."""
    limit = FACTOR[precision] * max(error[name] for name in EAGER) + FLOOR[dtype]
    return [name for name, value in error.items() if not value <= limit]


def kept_bytes(candidate: Candidate, mode: str) -> int:
    """Activation bytes that a training forward saves, the input's included, parameters' not; 0 for inference."""
    if mode == "infer":
        return 0
    owner, x = candidate.owner, candidate.x.detach().requires_grad_()
    return saved_bytes(lambda: candidate.call(x), [*owner.parameters(), *owner.buffers()])


def best(timings: dict[str, Timing], names: tuple[str, ...]) -> float | None:
    """The smallest median among these candidates, None if none ran."""
    present = [timings[name].median for name in names if name in timings]
    return min(present) if present else None


def measure(block: Block, args: argparse.Namespace, ceiling: float) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Checks and times one block, prints its table; (CSV rows, speed-ups), no speed-ups on a mismatch."""
    dtype = DTYPES[args.dtype]
    found = candidates(block, args.mode, dtype, args.compile)
    error = errors(block, args.mode, dtype, found)
    bad = wrong(error, args.dtype, args.precision)
    timings = interleave({name: c.work(args.mode) for name, c in found.items()}, args.rounds)
    flops = block.forward_flops * (3 if args.mode == "train" else 1)
    rows = []
    print(f"\nblock {block} (batch, channels, size, layers, growth), {args.mode}, {args.dtype}, {args.precision}")
    print(f"{'':<22}{'ms':>9}{'q1':>9}{'q3':>9}{'GFLOP/s':>9}{'of mm':>7}{'saved MiB':>11}{'error':>10}")
    for name, t in timings.items():
        rate, kept = flops / t.median / 1e6, kept_bytes(found[name], args.mode)
        print(
            f"{name:<22}{t.median:>9.1f}{t.low:>9.1f}{t.high:>9.1f}{rate:>9.1f}{rate / ceiling:>7.2f}"
            f"{kept / 2**20:>11.1f}{error[name]:>10.1e}{'  WRONG' if name in bad else ''}"
        )
        rows.append(_row(block, args, name, t, rate, ceiling, kept, error[name], name not in bad))
    if bad:
        print(f"MISMATCH: {', '.join(bad)}: no speed-up is reported")
        return rows, {}
    return rows, _speedups(timings)


def _row(
    block: Block, args: argparse.Namespace, name: str, t: Timing, rate: float, ceiling: float, kept: int, error: float,
    agrees: bool,
) -> dict[str, object]:  # fmt: skip
    return {
        **environment(), "block": str(block), "mode": args.mode, "dtype": args.dtype, "precision": args.precision,
        "candidate": name, "rounds": args.rounds, "median_ms": round(t.median, 3), "q1_ms": round(t.low, 3),
        "q3_ms": round(t.high, 3), "gflops": round(rate, 2), "mm_ceiling_gflops": round(ceiling, 1),
        "saved_bytes": kept, "error": f"{error:.3e}", "agrees": agrees,
    }  # fmt: skip


def _speedups(timings: dict[str, Timing]) -> dict[str, float]:
    ours = timings[OURS].median
    against = {"eager": best(timings, EAGER), "compile": best(timings, COMPILED)}
    ratios = {name: value / ours for name, value in against.items() if value is not None}
    print("csp is " + ", ".join(f"{value:.2f}x as fast as the better {name}" for name, value in ratios.items()))
    if "csp recompute" in timings:
        print(f"csp recompute takes {timings['csp recompute'].median / ours:.2f}x the time of csp")
    return ratios


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=Block.parse, default=list(DEFAULT_BLOCKS), metavar="N,C,S,L[,G]")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--precision", choices=("highest", "high"), default="highest", help="float32 matmul precision")
    parser.add_argument("--batch", type=int, help="batch size of all blocks")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="threads (default: PyTorch's choice)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file the rows are appended to")
    args = parser.parse_args(argv)
    if min(n for n in (args.rounds, args.batch, args.threads) if n is not None) < 1:
        parser.error("--rounds, --batch and --threads: expected positive numbers")
    if args.batch:
        args.blocks = [Block(args.batch, b.channels, b.size, b.layers, b.growth) for b in args.blocks]
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; 1 if a candidate is wrong anywhere."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    ceiling = mm_ceiling(DTYPES[args.dtype])
    print("; ".join(f"{key} {value}" for key, value in environment().items()) + f"; mm ceiling {ceiling:.0f} GFLOP/s")
    everything: list[dict[str, float]] = []
    for block in args.blocks:
        rows, ratios = measure(block, args, ceiling)
        append_csv(args.csv, rows)
        everything.append(ratios)
    if not all(everything):
        return 1
    for name in everything[0]:
        mean = math.exp(sum(math.log(ratios[name]) for ratios in everything) / len(everything))
        print(f"geometric mean against the better {name}: {mean:.2f}x")
    return 0


@pytest.fixture(params=DEFAULT_BLOCKS, ids=lambda block: str(block).replace(",", "-"))
def found(request: pytest.FixtureRequest) -> dict[str, Candidate]:
    """The eager candidates and ours on one of the default blocks."""
    return candidates(request.param, "train", torch.float32, with_compile=False)


NAMES = pytest.mark.parametrize("name", [OURS, *EAGER])


@NAMES
def test_forward(benchmark: Any, found: dict[str, Candidate], name: str) -> None:
    """A training forward pass."""
    x = found[name].x.detach().requires_grad_()
    benchmark(lambda: found[name].call(x))


@NAMES
def test_backward(benchmark: Any, found: dict[str, Candidate], name: str) -> None:
    """The backward pass alone, each after a forward pass of its own."""
    candidate = found[name]

    def fresh() -> tuple[tuple[torch.Tensor], dict[str, object]]:
        return (candidate.call(candidate.x.detach().requires_grad_()),), {}

    benchmark.pedantic(lambda y: y.backward(candidate.grad), setup=fresh, rounds=5, warmup_rounds=1)


@NAMES
def test_step(benchmark: Any, found: dict[str, Candidate], name: str) -> None:
    """Forward and backward."""
    benchmark(found[name].step)


if __name__ == "__main__":
    sys.exit(main())
