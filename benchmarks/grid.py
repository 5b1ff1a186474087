"""Is the dense block ever slower than eager? Batch 1..64, size 7..56, growth 12..48, 2..48 layers.

Measures as many cases as fit the time and the memory:

    python benchmarks/grid.py --budget 300
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from bench_dense_block import DTYPES, EAGER, OURS
from blocks import Block, candidates
from harness import Timing, available_bytes, environment, interleave, once

BATCHES, SIZES, GROWTHS, LAYERS = (1, 4, 16, 64), (7, 14, 28, 56), (12, 32, 48), (2, 6, 12, 24, 48)
CHANNELS = 64
SECONDS_PER_GFLOP = 0.02  # eager, one core, pessimistic: what a case is expected to cost


def every_block() -> list[Block]:
    """The whole grid."""
    return [
        Block(batch, CHANNELS, size, layers, growth)
        for batch, size, growth, layers in itertools.product(BATCHES, SIZES, GROWTHS, LAYERS)
    ]


def _corner(block: Block) -> bool:
    values, axes = (block.batch, block.size, block.growth, block.layers), (BATCHES, SIZES, GROWTHS, LAYERS)
    return all(value in (axis[0], axis[-1]) for value, axis in zip(values, axes, strict=True))


def chosen(budget: float, seed: int) -> Iterator[Block]:
    """The corners first, then a random order, each case only while its expected cost fits what is left."""
    blocks = every_block()
    random.Random(seed).shuffle(blocks)
    blocks.sort(key=lambda block: not _corner(block))
    stop, memory = time.monotonic() + budget, available_bytes()
    for block in blocks:
        cost = 3 * 3 * 3 * block.forward_flops / 1e9 * SECONDS_PER_GFLOP  # three candidates, three rounds, a step
        if cost <= stop - time.monotonic() and (memory is None or 2 * block.eager_bytes < memory):
            yield block


def measure(block: Block, mode: str, dtype: torch.dtype) -> dict[str, Timing]:
    """Interleaved timings; small cases get more rounds."""
    found = {name: c.work(mode) for name, c in candidates(block, mode, dtype, False).items() if name in (OURS, *EAGER)}
    longest = max(once(work) for work in found.values())
    return interleave(found, rounds=int(min(51, max(3, 300 / longest))))


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 if ours was slower than the better eager layout anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds to spend (default 300)")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="order of the cases")
    args = parser.parse_args(argv)
    print("; ".join(f"{key} {value}" for key, value in environment().items()) + f"; {args.mode}, {args.dtype}")
    heads = (f"{OURS} ms", "NCHW ms", "CL ms")
    print(f"{'batch':>5}{'size':>6}{'growth':>8}{'layers':>8}" + "".join(f"{h:>10}" for h in heads) + f"{'ratio':>8}")
    ratios = []
    for block in chosen(args.budget, args.seed):
        timings = measure(block, args.mode, DTYPES[args.dtype])
        ours, nchw, last = (timings[name].median for name in (OURS, *EAGER))
        ratios.append(min(nchw, last) / ours)
        place = f"{block.batch:>5}{block.size:>6}{block.growth:>8}{block.layers:>8}"
        flag = "  SLOWER" if ratios[-1] < 1 else ""
        print(f"{place}{ours:>10.2f}{nchw:>10.2f}{last:>10.2f}{ratios[-1]:>8.2f}{flag}", flush=True)
    slower = sum(ratio < 1 for ratio in ratios)
    if not ratios:
        print("no case fits the budget")
        return 1
    print(f"{len(ratios)} of {len(every_block())} cases, {slower} slower than eager, smallest ratio {min(ratios):.2f}")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
