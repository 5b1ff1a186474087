"""Command line: python -m csp_kernels info | demo | profile | fuse | explain | bench."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import csp_kernels
from csp_kernels import native

LAZY = {  # command -> its module, which has add_arguments and main, and its help
    "demo": ("csp_kernels.demo", "train networks on real digits, fused against naive: accuracy, time, memory"),
    "profile": ("csp_kernels.profile_command", "count a network's parameters, FLOPs, traffic and saved activations"),
    "fuse": ("csp_kernels.fuse_command", "fuse somebody's network: what is fused, whether it is equal, what it gains"),
    "explain": ("csp_kernels.explain_command", "show what a network's fused layers do, instruction by instruction"),
}
BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_dense_block.py"


def info(_: argparse.Namespace) -> int:
    """Print versions, instruction set and backends."""
    isa = native.isa() or "library not loaded"
    print(f"csp_kernels {csp_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, instruction set {isa}")
    print(csp_kernels.backends())
    return 0


def bench(arguments: list[str]) -> int:
    """Run the benchmark of the source tree with its own arguments."""
    spec = importlib.util.spec_from_file_location("bench_dense_block", BENCH) if BENCH.is_file() else None
    if spec is None or spec.loader is None:
        print("bench: not part of an installed package; run it from the source tree, or `make bench`", file=sys.stderr)
        return 1
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        print(f'bench: {error.name} is missing; run `pip install ".[bench]"` in the source tree', file=sys.stderr)
        return 1
    return int(module.main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # has its own parser
        return bench(given[1:])
    parser = argparse.ArgumentParser(prog="python -m csp_kernels", description=csp_kernels.__doc__)
    commands = parser.add_subparsers(required=True, metavar="info | demo | profile | fuse | explain | bench")
    commands.add_parser("info", help="what is available here, and why not where not").set_defaults(run=info)
    for name, (module, text) in LAZY.items():
        command = commands.add_parser(name, help=text)
        if given[:1] == [name]:  # only now: it needs more packages or time
            imported = importlib.import_module(module)
            imported.add_arguments(command)
            command.set_defaults(run=imported.main)
    commands.add_parser("bench", help="time the fused operators against eager and compiled PyTorch")
    parsed = parser.parse_args(given)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
