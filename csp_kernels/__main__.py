"""Command line: python -m csp_kernels info | demo | bench."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence

import torch

import csp_kernels
from csp_kernels import native

COMMANDS = {
    "info": "what is available here, and why not where not",
    "demo": "train a DenseNet on real digits, fused against naive: accuracy, time, memory",
    "bench": "measure the fused operators against eager and compiled PyTorch",
}


def info(_: argparse.Namespace) -> int:
    """Print versions, instruction set and backends."""
    print(f"csp_kernels {csp_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    isa = native.isa() or "library not loaded"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, instruction set {isa}")
    print(csp_kernels.backends())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m csp_kernels", description=csp_kernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        run = info
        if name != "info" and given[:1] == [name]:  # only now: they need the optional dependencies
            module = importlib.import_module(f"csp_kernels.{name}")
            module.add_arguments(command)
            run = module.main
        command.set_defaults(run=run)
    parsed = parser.parse_args(given)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
