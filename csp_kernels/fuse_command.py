"""`python -m csp_kernels fuse NETWORK`: what csp.fuse makes of it, whether it computes the same, what it gains."""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from csp_kernels.analysis import saved_bytes
from csp_kernels.fusion import fuse
from csp_kernels.profile_command import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    text = "timm/cspdarknet53, torchvision/densenet121, ultralytics/yolov8n, or module:function, which returns it"
    parser.add_argument("network", help=text)
    parser.add_argument("--size", type=positive, default=224, help="height and width (default 224)")
    parser.add_argument("--batch", type=positive, default=4, help="images (default 4)")
    parser.add_argument("--channels", type=positive, default=3, help="of the images (default 3)")
    parser.add_argument("--train", action="store_true", help="a step of training (default: inference)")
    parser.add_argument("--bench", action="store_true", help="time it before and after, and count what is kept")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of --bench; bfloat16: autocast"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="of --bench: draw times and what is kept")
    parser.add_argument("--rounds", type=positive, default=9, help="of --bench (default 9)")


def main(args: argparse.Namespace) -> int:
    """Print the report; the comparison; the times. Status 1 where the results differ."""
    if args.plot and not args.bench:
        print("fuse: --plot draws what --bench measures: add --bench", file=sys.stderr)
        return 1
    try:
        model = build(args.network)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        print(f"fuse: {args.network}: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.channels, args.size, args.size)
    after = copy.deepcopy(model)
    report = fuse(after)
    print(report)
    differs = difference(model, after, args.channels)
    print(f"results in float64, training and inference: they differ by {differs:.1e} of the largest gradient or output")
    if args.bench:
        bf16 = args.dtype == "bfloat16"
        found = bench(model, after, x, args.train, args.rounds, bf16)
        what = ("a step of training" if args.train else "inference") + (" under bfloat16 autocast" if bf16 else "")
        what += (
            f", batch {args.batch}, {args.size} x {args.size}, {torch.get_num_threads()} threads, {args.rounds} rounds"
        )
        print(f"{what}:", *(f"  {one}" for one in found), sep="\n")
        if args.plot:
            draw(found, f"{args.network}: {what}", args.plot)
            print(f"picture: {args.plot}")
    return 0 if differs < 1e-9 else 1


def build(name: str) -> nn.Module:
    """A network by the name of its library and its own."""
    library, _, rest = name.partition("/")
    if library == "timm":
        return importlib.import_module("timm").create_model(rest)
    if library == "torchvision":
        return importlib.import_module("torchvision.models").get_model(rest)
    if library == "ultralytics":
        return importlib.import_module("ultralytics.nn.tasks").DetectionModel(f"{rest}.yaml", verbose=False)
    module, _, function = name.partition(":")
    if not function:
        raise ValueError("expected timm/NAME, torchvision/NAME, ultralytics/NAME or module:function")
    made: Any = getattr(importlib.import_module(module), function)()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} returned a {type(made).__name__}, expected an nn.Module")
    return made


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a result that gradients go through."""
    leaves = tree_flatten(result)[0]
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def loss(result: Any) -> Tensor:
    total: Any = sum(t.float().square().mean() for t in outputs(result) if t.requires_grad)
    return total


def difference(plain: nn.Module, after: nn.Module, channels: int, size: int = 96) -> float:
    """The largest of outputs, gradients and state, in float64 on images of size x size, part of the largest of their
    kind. Without the dropout of modules."""
    x = torch.randn(2, channels, size, size, dtype=torch.float64)
    worst = 0.0
    both = [copy.deepcopy(m).double() for m in (plain, after)]
    for train in (True, False):
        found: list[dict[str, list[Tensor]]] = []
        for m in both:
            torch.manual_seed(1)
            m.train(train).zero_grad()
            for dropout in m.modules():
                if isinstance(dropout, nn.modules.dropout._DropoutNd):
                    dropout.eval()  # which numbers it draws depends on the memory format
            leaf = x.clone().requires_grad_()
            result = m(leaf)
            loss(result).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (leaf, *m.parameters())]
            state = [t.detach().clone() for t in m.state_dict().values() if t.is_floating_point()]
            found.append({"output": [t.detach() for t in outputs(result)], "gradient": gradients, "state": state})
        for kind, expected in found[0].items():
            largest = max((t.abs().max().item() for t in expected if t.numel()), default=0.0)
            errors = [(a - b).abs().max().item() for a, b in zip(found[1][kind], expected, strict=True) if b.numel()]
            worst = max([worst, *(error / max(largest, 1e-300) for error in errors)])
    return worst


def run(model: nn.Module, x: Tensor, train: bool, bf16: bool = False) -> Callable[[], None]:
    """A step without its optimizer, or inference. bf16: under autocast."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = loss(model(x))
        total.backward()

    def infer() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(x)

    return step if train else infer


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a step and their quartiles; kept: bytes for backward (None: it was inference); gain: of a fused
    one, how many times as fast as the better eager form it is."""

    name: str
    low: float
    median: float
    high: float
    kept: int | None
    gain: float | None

    def __str__(self) -> str:
        kept = "" if self.kept is None else f", keeps {self.kept / 1e6:.1f} MB for backward"
        gain = "" if self.gain is None else f", {self.gain:.3f} times as fast as the better eager"
        return f"{self.name:<20} {self.median:8.1f} ms [{self.low:.1f}, {self.high:.1f}]{kept}{gain}"


def bench(
    plain: nn.Module, after: nn.Module, x: Tensor, train: bool, rounds: int, bf16: bool = False
) -> list[Measured]:
    """Interleaved rounds: eager in both memory formats, fused on images of both; and what autograd keeps."""
    last = torch.channels_last
    models = {"eager, NCHW": copy.deepcopy(plain), "eager, channels_last": copy.deepcopy(plain).to(memory_format=last)}
    models |= {"fused, NCHW images": after, "fused": copy.deepcopy(after)}
    images = {name: x if "NCHW" in name else x.contiguous(memory_format=last) for name in models}
    runs = {name: run(m.train(train), images[name], train, bf16) for name, m in models.items()}
    for each in (*runs.values(), *runs.values()):
        each()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians["eager, NCHW"], medians["eager, channels_last"])
    found = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        kept = keeps(models[name], images[name], bf16) if train else None
        gain = best / medians[name] if "fused" in name else None
        found.append(Measured(name, low, medians[name], high, kept, gain))
    return found


def keeps(model: nn.Module, x: Tensor, bf16: bool) -> int:
    """Bytes that a forward keeps for backward, beside its images, parameters and buffers."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()])


def draw(found: Sequence[Measured], title: str, path: Path) -> None:
    """Bars of the times and, of training, of what is kept."""
    from matplotlib.figure import Figure

    kept = [one.kept / 1e6 for one in found if one.kept is not None]
    figure = Figure(figsize=(5.5 * (1 + bool(kept)), 3.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 1 + bool(kept), squeeze=False)[0]
    names, medians = [one.name for one in found], [one.median for one in found]
    errors = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
    axes[0].barh(names, medians, xerr=errors)
    axes[0].set_xlabel("ms a step, median and quartiles" if kept else "ms, median and quartiles")
    if kept:
        axes[1].barh(names, kept)
        axes[1].set_xlabel("MB kept for backward")
    for each in axes:
        each.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
