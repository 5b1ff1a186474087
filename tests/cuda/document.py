"""What the kernels of csrc/cuda need and what that predicts, without a GPU:

python tests/cuda/document.py > docs/gpu_cuda.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cubins
import emulator
import torch
from conv3x3_case import DGRAD, FORWARD, WGRAD, Case, run
from resources import shared_bytes

IMAGES, WIDTH, GROWTH = (1, 56, 56), 128, 32
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
SHARED = {"80": 164, "90": 228, "100": 228}  # KiB of a multiprocessor
TEXT = """# What the CUDA C++ kernels need of a GPU

Written by `python tests/cuda/document.py` **without a GPU; nothing here was measured on one**: registers from nvcc
({nvcc}), counts from the emulation and the machine code. A bottleneck of {width}, a growth of {growth}, float16.

## Registers, shared memory, occupancy

Registers a thread; KiB of shared memory a block; warps that a multiprocessor holds of the {warps} it has room for. No
kernel spills or uses local memory: the build fails otherwise (`tests/cuda/test_resources.py`, all of them by
`tests/cuda/resources.py`).

{resources}

## Predicted time of a pixel

Of the widest 16-bit tiles, 56x56 maps: what the emulation and the machine code count a pixel, and the picoseconds an
H100 SXM would take if that resource were all that counted: {sms} multiprocessors at {clock:.1f} GHz; mma.sync at
{mma:.0f} TFLOP/s, a figure from the literature; one instruction a scheduler and one access to shared memory a
multiprocessor a cycle; {dram:.2f} TB/s of what must move once. Instructions: of the inner loop by its tensor-core
instructions, of the loop around it once a tile. The largest is in bold; nothing overlaps perfectly.

{predictions}

Bytes: what the kernels ask of the level-2 cache; DRAM must move each once.

The passes that only move memory stay in Triton: [gpu_instructions.md](gpu_instructions.md).
"""
# an H100 SXM
SMS, CLOCK, MMA, DRAM = 132, 1.7e9, 620e12, 3.35e12


@dataclass(frozen=True)
class Subject:
    """A widest kernel: its pass, how its name starts, and how often the inner loop runs a tile."""

    name: str
    kernel: int
    code: str
    steps: int
    dram: int  # elements a pixel that must move


SUBJECTS = (
    Subject("forward", FORWARD, "conv3x3_forward_kernel<Half, Conv3x3Tile<4, 2, 2, 1, 2, 4, 32>", 4, WIDTH + GROWTH),
    Subject("dgrad", DGRAD, "conv3x3_dgrad_kernel<Half, Conv3x3Tile<4, 2, 1, 4, 1, 4, 32>", 1, 2 * WIDTH + 2 * GROWTH),
    Subject("wgrad", WGRAD, "conv3x3_wgrad_kernel<Half, WgradTile<4>", 1, WIDTH + 2 * GROWTH),
)


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, text)."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def loops(code: str) -> list[tuple[int, int]]:
    """(instructions, those of them on tensor cores) of each loop that has any of these, the innermost first."""
    lines, found = instructions(code), []
    for at, text in lines:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            body = [t for a, t in lines if int(branch[1], 16) <= a <= at]
            found.append((len(body), sum("HMMA" in t for t in body)))
    return sorted(loop for loop in found if loop[1])


def executed(code: str, products: float, steps: int) -> float:
    """Instructions of a warp, given its tensor-core ones."""
    inner, outer = loops(code)[0], loops(code)[-1]
    turns = products / inner[1]
    return turns * inner[0] + turns / steps * (outer[0] - inner[0])


def occupancy(kernel: cubins.Kernel, threads: int, shared: int) -> int:
    """Warps at a time."""
    allocated = -(-kernel.registers // 8) * 8 * threads
    blocks = min(REGISTERS // allocated, SHARED[kernel.architecture] * 1024 // (shared + 1024))
    return blocks * threads // 32


def threads(name: str) -> int:
    """Of a block, by the numbers in a tile's name."""
    numbers = [int(n) for n in re.findall(r"\d+", name.partition("Tile<")[2])]
    return 32 * prod(numbers[1:5]) if "Conv3x3Tile" in name else 256


def untyped(name: str) -> str:
    return re.sub(r"(BFloat16|Half)(, )?", "", name).replace("<>", "").replace("> >", ">>")


def resource_rows(built: dict[str, list[cubins.Kernel]], shared: dict[str, int]) -> Iterator[str]:
    """A row a tile: the most registers of its types."""
    yield "| kernel | KiB | " + " | ".join(f"sm_{t}" for t in built) + " |"
    yield "|---" * (len(built) + 2) + "|"
    names = {untyped(k.name) for k in built["90"]}
    for name in sorted(names):
        size = next((size for tile, size in shared.items() if tile in name), None)
        cells = []
        for kernels in built.values():
            same = [k for k in kernels if untyped(k.name) == name]
            most = max(same, key=lambda k: k.registers)
            warps = "" if size is None else f", {occupancy(most, threads(name), size)} warps"
            cells.append(f"{most.registers}{warps}")
        yield f"| {name} | {'' if size is None else f'{size / 1024:.0f}'} | " + " | ".join(cells) + " |"


def prediction_rows(runner: Path, code: dict[str, str]) -> Iterator[str]:
    yield "| pass | instructions of a lane | wavefronts | tensor-core products | bytes from L2 | bytes that must move |"
    yield "|---|---|---|---|---|---|"
    for s in SUBJECTS:
        case = Case(s.kernel, IMAGES, WIDTH, GROWTH, multiprocessors=2)
        counted, pixels = run(runner, case).result.counters, case.pixels
        body = next(text for name, text in code.items() if name.startswith(s.code))
        products = counted["mma"] / pixels
        lanes = executed(body, products, s.steps) * 32
        waves = sum(v for k, v in counted.items() if k.endswith("wavefronts")) / pixels
        moved = sum(v for k, v in counted.items() if k.endswith("_bytes")) / pixels
        times = (
            lanes / (SMS * 128 * CLOCK), waves / (SMS * CLOCK), products * 4096 / MMA, None, 2 * s.dram / DRAM,
        )  # fmt: skip
        most = max(t for t in times if t is not None)
        values = (f"{lanes:.0f}", f"{waves:.1f}", f"{products:.2f}", f"{moved:.0f}", f"{2 * s.dram}")
        cells = [cell(v, t, t == most) for v, t in zip(values, times, strict=True)]
        yield f"| {s.name} | " + " | ".join(cells) + " |"


def cell(value: str, seconds: float | None, largest: bool) -> str:
    if seconds is None:
        return value
    text = f"{seconds * 1e12:.0f} ps"
    return f"{value}: **{text}**" if largest else f"{value}: {text}"


def main() -> None:
    compiler, tool = cubins.nvcc(), cubins.disassembler()
    if compiler is None or tool is None:
        sys.exit("needs nvcc, and cuobjdump of the toolkit or of triton")
    said = subprocess.run([compiler, "--version"], text=True, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        runner, built, code = emulator.build(directory), {}, {}
        for target in cubins.ARCHITECTURES:
            cubin = directory / f"sm_{target}.cubin"
            built[target] = cubins.build(compiler, emulator.SOURCE / "dense_block.cu", target, cubin)
            if target == "90":
                code = cubins.functions(cubin, tool)
        resources = "\n".join(resource_rows(built, shared_bytes(directory, WIDTH, GROWTH)))
        predictions = "\n".join(prediction_rows(runner, code))
    version = re.search(r"release (\S+),", said)
    print(
        TEXT.format(
            nvcc=version[1] if version else "of unknown version", width=WIDTH, growth=GROWTH, warps=WARPS, sms=SMS,
            clock=CLOCK / 1e9, mma=MMA / 1e12, dram=DRAM / 1e12, resources=resources, predictions=predictions,
        ),
        end="",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
