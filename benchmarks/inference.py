"""Whole networks in inference: fused, eager, OpenVINO, ONNX Runtime; float32, as many threads as PyTorch has.

    python benchmarks/inference.py csp_darknet53 --batch 1 8
    python benchmarks/inference.py timm/cspdarknet53        # any network that `python -m csp_kernels fuse` takes

Needs openvino, onnx and onnxruntime. The two runtimes have threads of their own that go on spinning behind a call: each
is timed in blocks of calls, a pause before each block, and the blocks of all take turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from harness import Timing, once
from networks import LAYOUTS, NETWORKS
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import fuse_command

Run = Callable[[], Tensor]
PAUSE = 0.5  # seconds, in which the threads of the block before fall asleep


def torch_run(model: nn.Module, x: Tensor, layout: str, fused: bool) -> Run:
    own, images = copy.deepcopy(model).to(memory_format=LAYOUTS[layout]), x.contiguous(memory_format=LAYOUTS[layout])
    if fused:
        csp.fuse(own)

    def run() -> Tensor:
        with csp.use_backend("auto" if fused else "reference"), torch.inference_mode():
            result: Tensor = own(images)
        return result

    return run


def openvino_run(model: nn.Module, x: Tensor) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU", settings)
    images = x.numpy()
    return lambda: torch.from_numpy(compiled(images)[0])


def onnx_run(model: nn.Module, x: Tensor, folder: str) -> Run:
    import onnxruntime

    file = str(Path(folder, "model.onnx"))
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, images)[0])


def runs(model: nn.Module, x: Tensor, folder: str) -> dict[str, Run]:
    """Name -> a call of each; RuntimeError where results differ."""
    found = {"fused": torch_run(model, x, "channels_last", True)}
    found |= {f"eager, {layout}": torch_run(model, x, layout, False) for layout in LAYOUTS}
    with csp.use_backend("reference"):
        found |= {"OpenVINO": openvino_run(model, x), "ONNX Runtime": onnx_run(model, x, folder)}
    exact = found["eager, NCHW"]()
    for name, run in found.items():
        error = float((run() - exact).norm() / exact.norm())
        if not error <= 1e-4:
            raise RuntimeError(f"{name} differs from eager by {error:.1e} of its size")
    return found


def measure(name: str, batch: int, args: argparse.Namespace) -> str:
    """A line for each way, of medians and quartiles of all calls."""
    torch.manual_seed(0)
    model = (fuse_command.build(name) if "/" in name or ":" in name else getattr(csp.models, name)()).eval()
    x = torch.randn(batch, 3, args.size, args.size)
    with tempfile.TemporaryDirectory() as folder:
        all_runs = runs(model, x, folder)
        samples: dict[str, list[float]] = {way: [] for way in all_runs}
        for _ in range(args.blocks):
            for way, run in all_runs.items():
                time.sleep(PAUSE)
                run()
                samples[way] += [once(run) for _ in range(args.calls)]
    times = {way: Timing.of(values) for way, values in samples.items()}
    fused = times["fused"].median
    lines = [f"{name}, batch {batch}, {args.size}x{args.size}; the last column: its time to that of fused"]
    for way, t in times.items():
        lines.append(f"  {way:<20} {t.median:8.1f} ms [{t.low:.1f}, {t.high:.1f}]  {t.median / fused:.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--calls", type=int, default=5, help="in a block")
    args = parser.parse_args()
    for name in args.networks:
        for batch in args.batch:
            print(measure(name, batch, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
