"""`python -m csp_kernels explain NETWORK`: what its fused layers do, or one of them, instruction by instruction."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from csp_kernels import models
from csp_kernels.explain import Explanation, explain
from csp_kernels.profile_command import NETWORKS, input_shape, positive
from csp_kernels.programs import Call, calls
from csp_kernels.vocabulary import DENSE_RECOMPUTE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("network", choices=NETWORKS, metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--layer", metavar="NAME", help="the layer to explain (default: list those that can be)")
    parser.add_argument("--size", type=positive, help="height and width (default 224; digits 28)")
    parser.add_argument("--batch", type=positive, default=8, help="images (default 8)")
    parser.add_argument("--eval", action="store_true", help="inference: forward alone")
    parser.add_argument("--recompute", choices=DENSE_RECOMPUTE, help="what backward computes again (default none)")


def main(args: argparse.Namespace) -> int:
    """Print the explanation or the list; return the exit status."""
    try:
        found = _calls(args)
        chosen = [call for call in found if args.layer in (None, call.name)]
        if not found:
            raise ValueError(f"{args.network} has no fused layer")
        if not chosen:
            raise ValueError(f"--layer: got {args.layer!r}, expected one of {', '.join(call.name for call in found)}")
        with _gradients(args):
            explained = [explain(call.layer, *call.inputs) for call in chosen]
    except (ValueError, RuntimeError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 1
    if args.layer:
        print(*explained, sep="\n\n")
    else:
        print(*_list(chosen, explained), sep="\n")
    return 0


def _calls(args: argparse.Namespace) -> list[Call]:
    """Of the fused layers of the network that was asked for, whose tensors are on the meta device."""
    build = getattr(models, args.network)
    options = {"recompute": args.recompute} if args.recompute else {}
    if options and "recompute" not in inspect.signature(build).parameters:
        raise ValueError(f"--recompute: {args.network} has no layer with that choice")
    with torch.device("meta"):
        model = build(**options).train(not args.eval)
        return calls(model, torch.empty(input_shape(args.network, args.batch, args.size)))


def _gradients(args: argparse.Namespace) -> AbstractContextManager[object]:
    return torch.no_grad() if args.eval else torch.enable_grad()


def _list(found: Sequence[Call], explained: Sequence[Explanation]) -> Iterator[str]:
    """One line a layer."""
    rows = [["layer", "kind", "instructions", "kept MiB", "MFLOPs forward", "backward"]]
    for call, explanation in zip(found, explained, strict=True):
        flops = [f"{total.flops / 1e6:,.1f}" for total in (explanation.forward_total, explanation.backward_total)]
        count = len(explanation.forward) + len(explanation.backward)
        kept = f"{explanation.kept_bytes / 2**20:,.1f}"
        rows.append([call.name, type(call.layer).__name__, str(count), kept, *flops])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, kind, *numbers in rows:
        yield "  ".join([f"{name:<{widths[0]}}", f"{kind:<{widths[1]}}", *map(str.rjust, numbers, widths[2:])])
