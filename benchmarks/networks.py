"""Whole networks, fused and as their plain twins: training steps, inference and what autograd keeps.

python benchmarks/networks.py csp_darknet53 csp_resnet50 --mode train --precision high
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from harness import interleave
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.analysis import saved_bytes

NETWORKS = ("csp_darknet53", "csp_resnet50", "csp_resnext50", "csp_peleenet", "densenet121")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def call(model: nn.Module, x: Tensor, backend: str, train: bool, bf16: bool) -> Callable[[], Tensor]:
    """A training step, or inference."""
    target = torch.arange(len(x)) % 10

    def run() -> Tensor:
        with csp.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if not train:
                with torch.inference_mode():
                    return model(x)
            model.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        return loss.detach()

    return run


def measure(name: str, batch: int, args: argparse.Namespace) -> str:
    """One line of the table; RuntimeError where fused and plain results differ."""
    torch.manual_seed(0)
    train = args.mode == "train"
    model, x = getattr(csp.models, name)().train(train), torch.randn(batch, 3, args.size, args.size)
    runs: dict[str, Callable[[], Tensor]] = {}
    saved: dict[str, int] = {}
    results: dict[str, Tensor] = {}
    for key, backend in (("csp", "auto"), *((layout, "reference") for layout in LAYOUTS)):
        layout = LAYOUTS.get(key, torch.channels_last)
        own, images = copy.deepcopy(model).to(memory_format=layout), x.contiguous(memory_format=layout)
        runs[key] = call(own, images, backend, train, args.dtype == "bfloat16")
        results[key] = call(own.eval(), images, backend, False, args.dtype == "bfloat16")().float()
        if own.train(train).training:
            with csp.use_backend(backend):
                saved[key] = saved_bytes(partial(own, images), [images, *own.parameters(), *own.buffers()])
    tolerance = 0.03 if args.dtype == "bfloat16" else 1e-2 if args.precision == "high" else 1e-4
    for key in LAYOUTS:
        error = (results["csp"] - results[key]).norm() / results[key].norm()
        if not error <= tolerance:
            raise RuntimeError(f"{name}: fused and plain outputs differ by {error:.1e} of their size ({key})")
    times = interleave(runs, args.rounds)
    eager = min(times[key].median for key in LAYOUTS)
    t = times["csp"]
    kept = f", saves {saved['csp'] / min(saved[key] for key in LAYOUTS):.3f} of the bytes" if train else ""
    return (
        f"{name:<14} {args.mode} {args.dtype} {args.precision} batch {batch}: {t.median:.1f} ms "
        f"[{t.low:.1f}, {t.high:.1f}], eager {eager:.1f} ms, {eager / t.median:.3f} times as fast{kept}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--precision", choices=("highest", "high"), default="highest")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 4 in training, 1 and 8 in inference")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    for name in args.networks:
        for batch in args.batch or ([4] if args.mode == "train" else [1, 8]):
            print(measure(name, batch, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
