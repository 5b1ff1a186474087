"""Instructions of the passes that only move memory, from their machine code, against what a GPU can issue meanwhile.

python benchmarks/gpu_instructions.py > docs/gpu_instructions.md
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor

from csp_kernels.kernels import activate, norm, statistics
from csp_kernels.kernels.dry_run import Launch, dry_run
from csp_kernels.kernels.launch import Correction, Geometry, Norm

TARGET = "sm_90"
LANES, BANDWIDTH = 132 * 4 * 32 * 1.7e9, 3.35e12  # an H100 SXM: instructions of a lane a second, bytes a second
BUDGET = LANES / BANDWIDTH
IMAGES, CHANNELS, DTYPE = Geometry(8, 56, 56), 256, torch.bfloat16
TEXT = """# Instructions of the passes that only move memory

Written by `benchmarks/gpu_instructions.py` from the machine code that triton {version} makes for {target}: **no GPU was
used.** A kernel whose instructions a byte stay below {budget:.1f} (what an H100 can issue while it moves a byte) waits
for memory, and another implementation that moves the same bytes takes the same time. All these kernels move each byte
once (docs/gpu_traffic.md). Instructions are counted as if every one ran once a tile, slow paths of divisions, which
small maps do not take, included: bounds from above. bfloat16, 256 channels, 56x56.

| pass | instructions an element | bytes an element | instructions a byte | share of the budget |
|---|---|---|---|---|
{rows}

So none of them is written again in CUDA C++: at best the last would gain, by its share above 100 %.
"""


def empty(pixels: int) -> Tensor:
    return torch.empty(pixels, CHANNELS, dtype=DTYPE)


def passes() -> dict[str, tuple[float, Launch]]:
    """Name -> bytes an element of its tile, the kernel."""
    pooled, relu = Geometry(IMAGES.n, IMAGES.h, IMAGES.w, pool=True), activate.RELU
    x, out, small = empty(IMAGES.pixels), empty(IMAGES.pixels), empty(pooled.outputs)
    a, b, c = torch.empty(3, CHANNELS).unbind()
    affine, moments = Norm(a, b, c), torch.empty(2, CHANNELS, dtype=torch.float64)
    work = {
        "split-copy with statistics": (4, lambda: statistics.copy_split(x, out, moments)),
        "statistics alone": (2, lambda: statistics.copy_split(x, None, moments)),
        "what norms owe": (6, lambda: norm.pay(x, x, Correction(a, b, c), out)),
        "norm, activation": (4, lambda: activate.forward(x, affine, out, IMAGES, relu)),
        "norm, activation: backward": (6, lambda: activate.backward(x, x, affine, out, IMAGES, relu)),
        "norm, activation, average": (10, lambda: activate.forward(x, affine, small, pooled, relu)),
        "norm, activation, average: backward": (4.5, lambda: activate.backward(small, x, affine, out, pooled, relu)),
    }
    found = {}
    for name, (size, run) in work.items():
        with dry_run(TARGET) as launches:
            run()
        found[name] = size, launches[0]
    return found


def instructions(launch: Launch) -> int:
    """Of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], text=True, capture_output=True, check=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(?!NOP)(\S.*)$", text, re.MULTILINE)
    return len(lines)


def main() -> None:
    rows = []
    for name, (size, launch) in passes().items():
        tile = launch.constants["BP"] * launch.constants["BN"]
        each = instructions(launch) * launch.warps * 32 / tile
        rows.append(f"| {name} | {each:.1f} | {size:g} | {each / size:.1f} | {100 * each / size / BUDGET:.0f} % |")
    print(TEXT.format(version=triton.__version__, target=TARGET, budget=BUDGET, rows="\n".join(rows)), end="")


if __name__ == "__main__":
    main()
