"""What the kernels of csrc/cuda need and what that predicts, without a GPU:

python tests/cuda/document.py > docs/gpu_cuda.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conv3x3_case
import conv3x3_float32_case
import cubins
import dense_layer_case
import emulator
import torch
from conv3x3_case import DGRAD, FORWARD, WGRAD
from resources import shared_bytes

IMAGES, WIDTH, GROWTH = (1, 56, 56), 128, 32
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
SHARED = {"80": 164, "90": 228, "100": 228}  # KiB of a multiprocessor
TEXT = """# What the CUDA C++ kernels need of a GPU

Written by `python tests/cuda/document.py` **without a GPU; nothing here was measured on one**: registers from nvcc
({nvcc}), counts from the emulation and the machine code. A bottleneck of {width}, a growth of {growth}.

## Predicted time of a pixel

Of the widest tiles, 56x56 maps: what the emulation and the machine code count a pixel, and the picoseconds an H100 SXM
would take if that resource were all that counted: {sms} multiprocessors at {clock:.1f} GHz; mma.sync at {mma:.0f}
TFLOP/s (TF32: half), a figure from the literature; one instruction a scheduler and one access to shared memory a
multiprocessor a cycle; {dram:.2f} TB/s of what must move once. Instructions: of the inner loop by its products, of the
loop around it once a tile, as if every branch were taken (dropout's too): bounds from above. The largest is in bold;
nothing overlaps perfectly, so expect more than that.

{predictions}

Bytes from L2: what the kernels ask of the level-2 cache, the halo and weights with it. The whole layer: {entering}
channels enter; the pair of kernels that it replaces moves {pair} bytes a pixel, in {pair_products:.2f} products.

## Registers, shared memory, occupancy

Registers a thread, of the type that takes most; KiB of shared memory a block; warps that a multiprocessor holds of the
{warps} it has room for. No kernel spills or uses local memory: their gates fail otherwise (of the widest
`tests/cuda/test_resources.py`, of all `tests/cuda/resources.py`). Conv3x3Tile: rows a warp, units down, units across,
groups of columns, parts of the channels, columns by 8, channels a step. The whole layer's memory is that of its tile
for 64 images of 56x56; its two loops are not counted in instructions.

| kernel | KiB | {targets} |
|---|---|{rule}
{resources}

The passes that only move memory stay in Triton: [gpu_instructions.md](gpu_instructions.md).
"""
# an H100 SXM
SMS, CLOCK, MMA, DRAM = 132, 1.7e9, 620e12, 3.35e12
ENTERING = 256


@dataclass(frozen=True)
class Subject:
    """A widest kernel."""

    name: str
    source: str
    code: str  # how its name starts
    counts: Callable[[Path], dict[str, int]]  # of the emulation, for IMAGES
    dram: int  # bytes a pixel that must move
    steps: int  # turns of the inner loop a tile; 0: not one loop
    product: str = "HMMA"
    rate: float = MMA / 4096  # products a second


def half(kernel: int) -> Callable[[Path], dict[str, int]]:
    case = conv3x3_case.Case(kernel, IMAGES, WIDTH, GROWTH, multiprocessors=2)
    return lambda runner: conv3x3_case.run(runner, case).result.counters


def single(kernel: int, tf32: bool) -> Callable[[Path], dict[str, int]]:
    case = conv3x3_float32_case.Case(kernel, IMAGES, WIDTH, GROWTH, multiprocessors=2, tf32=tf32)
    return lambda runner: conv3x3_float32_case.run(runner, case).result.counters


def layer(runner: Path) -> dict[str, int]:
    case = dense_layer_case.Case(IMAGES, ENTERING, WIDTH, GROWTH, multiprocessors=2)
    return dense_layer_case.run(runner, case).result.counters


PROGRAMS = {
    "dense_block": "runner.cpp",
    "dense_block_float32": "runner_float32.cpp",
    "dense_layer": "runner_dense_layer.cpp",
}
MOVED = {FORWARD: WIDTH + GROWTH, DGRAD: 2 * WIDTH + 2 * GROWTH, WGRAD: WIDTH + 2 * GROWTH}  # elements
WIDEST = {
    FORWARD: ("conv3x3_forward_kernel<Half, Conv3x3Tile<4, 2, 2, 1, 2, 4, 32>", 4),
    DGRAD: ("conv3x3_dgrad_kernel<Half, Conv3x3Tile<4, 2, 1, 4, 1, 4, 32>", 1),
    WGRAD: ("conv3x3_wgrad_kernel<Half, WgradTile<4>", 1),
}
WIDEST_FLOAT32 = {FORWARD: "Tile<4, 2, 2, 1, 4>", DGRAD: "Tile<4, 2, 2, 2, 4>", WGRAD: "WgradTile<2, 2>"}
STEPS_FLOAT32 = {FORWARD: (16, 16), DGRAD: (4, 4), WGRAD: (8, 4)}  # in full, TF32
PASSES = {FORWARD: "forward", DGRAD: "dgrad", WGRAD: "wgrad"}


def subjects() -> Iterator[Subject]:
    for kernel, (code, steps) in WIDEST.items():
        yield Subject(f"{PASSES[kernel]}, 16 bits", "dense_block", code, half(kernel), 2 * MOVED[kernel], steps)
    for tf32, kind, product, rate in ((False, "Ieee", "FFMA", 0.0), (True, "Tf32", "HMMA", MMA / 2 / 2048)):
        for kernel, name in PASSES.items():
            code, steps = f"{name}_float32_kernel<{kind}, {WIDEST_FLOAT32[kernel]}", STEPS_FLOAT32[kernel][tf32]
            label = f"{name}, {'TF32' if tf32 else 'float32'}"
            moved, counts = 4 * MOVED[kernel], single(kernel, tf32)
            yield Subject(label, "dense_block_float32", code, counts, moved, steps, product, rate)
    code, moved = "dense_layer_kernel<Half, DenseTile<4, 1, 4>", 2 * (ENTERING + GROWTH)
    yield Subject("whole layer, 16 bits", "dense_layer", code, layer, moved, 0)


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, text)."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def loops(code: str, product: str) -> list[tuple[int, int]]:
    """(instructions, products among them) of each loop that has any of these, the innermost first."""
    lines, found = instructions(code), []
    for at, text in lines:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            body = [t for a, t in lines if int(branch[1], 16) <= a <= at]
            found.append((len(body), sum(product in t for t in body)))
    return sorted(loop for loop in found if loop[1])


def executed(subject: Subject, code: str, products: float) -> float:
    """Instructions of a warp, given its products."""
    found = loops(code, subject.product)
    outer = found[-1]
    inner = next(loop for loop in found if 2 * loop[1] > outer[1])  # epilogues have loops too
    turns = products / inner[1]
    return turns * inner[0] + turns / subject.steps * (outer[0] - inner[0])


def occupancy(kernel: cubins.Kernel, threads: int, shared: int) -> int:
    """Warps at a time."""
    allocated = -(-kernel.registers // 8) * 8 * threads
    blocks = min(REGISTERS // allocated, SHARED[kernel.architecture] * 1024 // (shared + 1024))
    return blocks * threads // 32


def threads(name: str) -> int:
    """Of a block, by the numbers in a tile's name."""
    numbers = [int(n) for n in re.findall(r"\d+", name.partition("Tile<")[2])]
    if "float32" in name:
        return 128 * numbers[0] if "WgradTile" in name else 32 * prod(numbers[1:4])
    return 32 * prod(numbers[1:5]) if "Conv3x3Tile" in name else 256


def untyped(name: str) -> str:
    return re.sub(r"(BFloat16|Half)(, )?", "", name).replace("<>", "").replace("> >", ">>")


def resource_rows(built: dict[str, list[cubins.Kernel]], shared: dict[str, int]) -> Iterator[str]:
    """A row a tile: the most registers of its types."""
    names = {untyped(k.name) for k in built["90"]}
    for name in sorted(names):
        sizes = (size for tile, size in shared.items() if all(part in name for part in tile.split(" ", 1)))
        size = next(sizes, None)
        cells = []
        for kernels in built.values():
            same = [k for k in kernels if untyped(k.name) == name]
            most = max(same, key=lambda k: k.registers)
            warps = "" if size is None else f", {occupancy(most, threads(name), size)} warps"
            cells.append(f"{most.registers}{warps}")
        yield f"| {name} | {'' if size is None else f'{size / 1024:.0f}'} | " + " | ".join(cells) + " |"


def prediction_rows(runners: dict[str, Path], code: dict[str, str]) -> Iterator[str]:
    pixels = prod(IMAGES)
    yield "| pass | instructions of a lane | wavefronts | products | bytes from L2 | bytes that must move |"
    yield "|---|---|---|---|---|---|"
    for s in subjects():
        counted = s.counts(runners[s.source])
        body = next(text for name, text in code.items() if name.startswith(s.code))
        products = counted["mma"] / pixels if s.rate else 9 * WIDTH * GROWTH / 32
        lanes = executed(s, body, products) * 32 if s.steps else None
        waves = sum(v for k, v in counted.items() if k.endswith("wavefronts")) / pixels
        moved = sum(v for k, v in counted.items() if k.endswith("_bytes")) / pixels
        times = (
            lanes and lanes / (SMS * 128 * CLOCK), waves / (SMS * CLOCK), s.rate and products / s.rate, None,
            s.dram / DRAM,
        )  # fmt: skip
        most = max(t for t in times if t)
        values = (
            "" if lanes is None else f"{lanes:.0f}",
            f"{waves:.1f}",
            f"{products:.2f}",
            f"{moved:.0f}",
            f"{s.dram}",
        )
        yield f"| {s.name} | " + " | ".join(cell(v, t, t == most) for v, t in zip(values, times, strict=True)) + " |"


def cell(value: str, seconds: float | None, largest: bool) -> str:
    if not seconds:
        return value
    text = f"{seconds * 1e12:.0f} ps"
    return f"{value}: **{text}**" if largest else f"{value}: {text}"


def main() -> None:
    compiler, tool = cubins.nvcc(), cubins.disassembler()
    if compiler is None or tool is None:
        sys.exit("needs nvcc, and cuobjdump of the toolkit or of triton")
    said = subprocess.run([compiler, "--version"], text=True, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as name:
        directory, runners, rows, code = Path(name), {}, [], dict[str, str]()
        for source, program in PROGRAMS.items():
            built = {}
            for target in cubins.ARCHITECTURES:
                cubin = directory / f"{source}-{target}.cubin"
                built[target] = cubins.build(compiler, emulator.SOURCE / f"{source}.cu", target, cubin)
                code |= cubins.functions(cubin, tool) if target == "90" else {}
            runners[source] = emulator.build(directory, program=program)
            entering = (ENTERING,) if source == "dense_layer" else ()
            shared = shared_bytes(directory, *entering, WIDTH, GROWTH, program=program)
            rows += resource_rows(built, shared)
        predictions = "\n".join(prediction_rows(runners, code))
    version = re.search(r"release (\S+),", said)
    figures = {
        "nvcc": version[1] if version else "of unknown version", "width": WIDTH, "growth": GROWTH, "warps": WARPS,
        "sms": SMS, "clock": CLOCK / 1e9, "mma": MMA / 1e12, "dram": DRAM / 1e12, "entering": ENTERING,
        "pair": 2 * (ENTERING + 3 * WIDTH + GROWTH), "pair_products": (ENTERING + 9 * GROWTH) * WIDTH / 2048,
        "targets": " | ".join(f"sm_{t}" for t in cubins.ARCHITECTURES), "rule": "---|" * len(cubins.ARCHITECTURES),
        "resources": "\n".join(rows), "predictions": predictions,
    }  # fmt: skip
    print(TEXT.format(**figures), end="")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
