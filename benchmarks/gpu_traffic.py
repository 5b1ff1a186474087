"""What the Triton kernels move, counted under Triton's interpreter, and what that predicts for a GPU.

python benchmarks/gpu_traffic.py > docs/gpu_traffic.md
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import guard
import torch
import traffic
from torch import nn

import csp_kernels as csp
from csp_kernels import analysis
from csp_kernels.kernels.launch import Geometry

BANDWIDTH = 3.0e12  # bytes a second, of the 3.35e12 of an H100 SXM
BATCH = 64
SMALL = Geometry(3, 6, 6, pool=True)  # counts a pixel do not depend on the pixels

TEXT = """# Memory traffic of the Triton kernels

Written by `benchmarks/gpu_traffic.py`: counts of Triton's interpreter and what follows from them. **No GPU was used:
nothing here is a measurement of time.**

## Counted: bytes a pixel of each kernel

float16, K = {k} channels enter, b = {b} bottleneck and g = {g} growth channels, {n} images of {h}x{w}. Floor: each
image that a kernel takes or gives, once, in elements and in bytes; of layers the sum over their kernels. Unique:
distinct bytes of images that the programs load and store, launch by launch, what DRAM must move:
`tests/kernels/test_traffic.py` holds it within 10 % of the floor. Repeated: accesses beyond that, which caches must
serve; for the 3x3 that is its halo, a pixel being read by up to nine taps, for the backward of the 1x1 what comes from
the output, read for each block of input channels. Apart: weights, vectors of a value a channel and partial sums, in KiB
a call. Of these only the sums of tiles grow with the pixels: of the statistics 16 bytes a
channel and tile of 128 pixels (64 in small calls), written and read, 2 to 4 % of what a product moves forward; of the
3x3's input gradient 8 bytes a channel and 64 pixels, 5 %.

{counts}

## Predicted: time of a block

DenseNet-121's dense blocks and a CSP dense stage, batch {batch}, float16, training, in milliseconds at {tera:.1f} TB/s,
if memory traffic were all that takes time. The 3x3 is bound by arithmetic or caches instead: its kernels take longer.
Naive: each operation of plain PyTorch reads its inputs and writes its output. Fused: `csp_kernels.analysis`, the
algorithm alone (a dense layer: K + 2b + g elements a pixel forward, 3K + 4b + 2g backward). Kernels: as counted, with
copies into the block's buffers, without what is apart above.

{times}

All of these times are predictions.

## Where the kernels and `csp_kernels.analysis` differ

- Dense layer, forward: K + 2b + g, the same. Backward: 3K + 5b + 4g against 3K + 4b + 2g, because each gradient of the
  3x3 is a kernel that reads the bottleneck and the layer's slices of the features and of the gradient; 3K + 5b + 2g
  where no norm uses what the layer adds. Where one pass over the input of the 1x1 needs too many registers (float32,
  float64, more than 128 outputs, averages, some GPUs) it takes two, K + 2b more.
- A block also copies its input into the buffer of features and pays what its norms owe when it leaves: {entry} elements
  a pixel forward and {exit} backward for block 1, of which the analysis counts none.
- concat_conv from K to b channels: K + 3b forward and 2K + 4b backward, the same.
"""


@dataclass(frozen=True)
class Bytes:
    """Of a step."""

    forward: float
    backward: float

    def times(self) -> list[str]:
        return [f"{x / BANDWIDTH * 1e3:.2f}" for x in (self.forward, self.backward)]


@dataclass(frozen=True)
class Stage:
    name: str
    module: Callable[[], nn.Module]
    channels: int
    size: int

    def estimated(self) -> tuple[Bytes, Bytes]:
        """csp_kernels.analysis: naive and fused."""
        module, shape = self.module().half().to("meta"), (BATCH, self.channels, self.size, self.size)
        step, inference = analysis.profile(module.train(), shape), analysis.profile(module.eval(), shape)
        # In training a norm reads its input once more, for the statistics: half of what it moves in inference.
        statistics = sum(row.dram_bytes_naive for row in inference.rows if row.kind == "BatchNorm2d") / 2
        forward = inference.total["dram_bytes_naive"] + statistics
        naive = Bytes(forward, step.total["dram_bytes_naive"] - forward)
        x = torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=True)
        program = csp.explain(module.train(), x)
        passes = program.forward_total, program.backward_total
        return naive, Bytes(*(total.bytes_read + total.bytes_written for total in passes))

    def counted(self) -> tuple[list[traffic.Use], list[traffic.Use]]:
        return traffic.step(self.module(), self.channels, SMALL)

    def kernels(self) -> Bytes:
        ways = [traffic.totals(uses, SMALL).unique for uses in self.counted()]
        return Bytes(*(way * BATCH * self.size**2 for way in ways))


def _densenet_block(index: int, layers: int, channels: int, size: int) -> Stage:
    name = f"block {index}: {layers} layers from {channels} channels, {size}x{size}"
    return Stage(name, lambda: csp.DenseBlock(layers, channels, traffic.G), channels, size)


STAGES = [
    _densenet_block(1, 6, 64, 56),
    _densenet_block(2, 12, 128, 28),
    _densenet_block(3, 24, 256, 14),
    _densenet_block(4, 16, 512, 7),
    Stage("CSP stage: 12 layers, 128 to 256 channels, half bypass, 28x28",
          lambda: csp.CSPDenseStage(128, 256, 12, traffic.G, 4), 128, 28),
]  # fmt: skip


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def counts() -> Iterator[list[str]]:
    for name, case in traffic.CASES.items():
        got = case.count()
        numbers = [f"{x:.0f}" for x in (case.floor, got.unique, got.issued - got.unique)]
        yield [name, case.formula, *numbers, f"{got.unique / case.floor - 1:+.1%}", f"{got.others / 1024:.0f}"]


def times() -> Iterator[list[str]]:
    for stage in STAGES:
        naive, fused = stage.estimated()
        kernels = stage.kernels()
        ratio = (naive.forward + naive.backward) / (kernels.forward + kernels.backward)
        yield [stage.name, *naive.times(), *fused.times(), *kernels.times(), f"{ratio:.2f}"]


def outside_of_layers(stage: Stage) -> Iterator[str]:
    """Elements a pixel that kernels other than products move, forward and backward."""
    for uses in stage.counted():
        other = [u for u in uses if not u.kernel.startswith(traffic.PRODUCTS)]
        yield f"{traffic.totals(other, SMALL).unique / traffic.DTYPE.itemsize:.0f}"


def main() -> int:
    guard.install()
    s = traffic.GEOMETRY
    head = ["kernel", "floor, elements", "floor", "unique", "repeated", "above the floor", "apart, KiB"]
    columns = [f"{kind} {way}" for kind in ("naive", "fused", "kernels") for way in ("forward", "backward")]
    forward, backward = outside_of_layers(STAGES[0])
    text = TEXT.format(
        k=traffic.K, b=traffic.B, g=traffic.G, n=s.n, h=s.h, w=s.w, batch=BATCH, tera=BANDWIDTH / 1e12,
        counts=table(head, counts()), times=table(["predicted, ms", *columns, "naive / kernels"], times()),
        entry=forward, exit=backward,
    )  # fmt: skip
    print(text.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
