"""`python -m csp_kernels profile NETWORK`: the table of a network's costs, and a picture beside its other form."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from csp_kernels import models
from csp_kernels.analysis import Profile, profile

NETWORKS = sorted(name for name in models.__all__ if name.islower() and callable(getattr(models, name)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("network", choices=NETWORKS, metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--size", type=positive, help="height and width (default 224; digits 28)")
    parser.add_argument("--batch", type=positive, default=1, help="images (default 1)")
    parser.add_argument("--depth", type=positive, default=2, help="parts of the module names in the table (default 2)")
    parser.add_argument("--eval", action="store_true", help="inference: forward alone")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it beside its (CSP) other form")


def main(args: argparse.Namespace) -> int:
    """Print the table, draw the picture; return the exit status."""
    shape = input_shape(args.network, args.batch, args.size)
    try:
        own = _profile(args.network, shape, not args.eval)
        print(f"{args.network}, {shape[0]} x {shape[2]} x {shape[3]}, {'inference' if args.eval else 'training step'}")
        print(own.table(args.depth))
        if args.plot:
            other = _counterpart(args.network)
            _draw({n: own if n == args.network else _profile(n, shape, not args.eval)
                   for n in sorted({args.network, other}, key=lambda n: n.startswith("csp_"))}, args.plot)  # fmt: skip
            print(f"picture: {args.plot}")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"profile: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f'profile: {error.name} is missing; run `pip install ".[demo]"` in the source tree', file=sys.stderr)
        return 1
    return 0


def input_shape(network: str, batch: int, size: int | None) -> tuple[int, int, int, int]:
    """[N, C, H, W] of what a network takes; size None: as it was made for."""
    digits = "digits" in network
    size = size or (28 if digits else 224)
    return batch, 1 if digits else 3, size, size


def positive(text: str) -> int:
    """Of an argument on the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a positive number")
    return value


def _counterpart(name: str) -> str:
    """The CSP form of a network, or the network of a CSP form."""
    return name.removeprefix("csp_") if name.startswith("csp_") else f"csp_{name}"


def _profile(name: str, shape: tuple[int, int, int, int], training: bool) -> Profile:
    return profile(getattr(models, name)().train(training), shape)


def _draw(profiles: dict[str, Profile], path: Path) -> None:
    """FLOPs and bytes of every convolution and linear layer, one column a network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(profiles), 7), layout="constrained")
    axes = figure.subplots(2, len(profiles), sharey="row", squeeze=False)
    for column, (name, costs) in enumerate(profiles.items()):
        top, bottom = axes[0][column], axes[1][column]
        flops = [row.flops / 1e6 for row in costs.rows if row.flops]
        top.bar(range(len(flops)), flops, width=1.0)
        top.set_title(f"{name}: {costs.total['flops'] / 1e9:.3f} GFLOP, {costs.total['params'] / 1e6:.2f} M parameters")
        top.set_xlabel("convolution")
        groups = [row for row in costs.grouped(2) if row.dram_bytes_naive]
        for offset, key, label in ((-0.2, "dram_bytes_naive", "plain"), (0.2, "dram_bytes_fused", "fused, predicted")):
            values = [getattr(row, key) / 1e6 for row in groups]
            places = [i + offset for i in range(len(groups))]
            bottom.bar(places, values, width=0.4, label=f"{label}: {sum(values):.0f} MB")
        names = [row.name.rpartition(".")[2] or "(network)" for row in groups]
        bottom.set_xticks(range(len(groups)), names, rotation=60, ha="right")
        bottom.legend(title=f"saved for backward {costs.total['saved_bytes'] / 1e6:.1f} MB")
    axes[0][0].set_ylabel("MFLOP of each convolution")
    axes[1][0].set_ylabel("MB moved in each module")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
