"""`python -m csp_kernels demo`: networks, each trained twice from the same weights, fused and naive, on real digits."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from .network import NETWORKS

__all__ = ["add_arguments", "main"]

NEEDED = ("mlxtend", "matplotlib", "numpy")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    names = ", ".join(NETWORKS)
    parser.add_argument(
        "--network", nargs="+", choices=(*NETWORKS, "all"), default=["densenet"], metavar="NAME",
        help=f"one or several of {names}, or all: some five minutes on two cores (default densenet)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=_positive, default=3, help="passes over the 4,000 training digits (default 3)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="images a step (default 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 uses autocast")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and the data order")
    parser.add_argument("--out", type=Path, default=Path("csp_demo.png"), help="the picture (default csp_demo.png)")


def main(args: argparse.Namespace) -> int:
    """Runs the demo; 0 when done, 1 when something is missing, 130 when interrupted (after a partial report)."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'The demo needs {", ".join(missing)}: pip install ".[demo]", in the source tree', file=sys.stderr)
        return 1
    from .run import run_demo
    from .train import Settings

    networks = [name for name in NETWORKS if name in args.network or "all" in args.network]
    return run_demo(networks, Settings(args.epochs, args.batch_size, args.dtype, args.seed), args.out)
