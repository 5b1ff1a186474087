"""Prints registers, shared memory and spills of every kernel in csrc/cuda, as nvcc builds it (no GPU needed).

    python tests/cuda/resources.py [80 90 100]

Exits 1 on spills, local memory, or a kernel without tensor-core instructions or 16-byte accesses."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import emulator
from cubins import ARCHITECTURES, Kernel, build, complaints, disassembler, nvcc
from emulator import SOURCE

PROGRAMS = {
    "dense_block.cu": "runner.cpp",
    "dense_block_float32.cu": "runner_float32.cpp",
    "dense_layer.cu": "runner_dense_layer.cpp",
}
CHANNELS = {"dense_layer.cu": (256, 128, 32)}  # entering too


def shared_bytes(directory: Path, *channels: int, program: str = "runner.cpp") -> dict[str, int]:
    """Shared memory of a block by the name of its tile, and a word of its kernel's before it where tiles are of several
    kernels, from the launchers' own constants."""
    runner = emulator.build(directory, program=program)
    command = [str(runner), "shared", *map(str, channels)]
    text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    pairs = (line.replace("csp::cuda::", "").replace("float32::", "").split("\t") for line in text.splitlines())
    return {name: int(size) for name, size in pairs}


def described(kernel: Kernel, shared: dict[str, int]) -> str:
    sizes = (size for tile, size in shared.items() if all(part in kernel.name for part in tile.split(" ", 1)))
    size = next((f"{size:6} bytes shared  " for size in sizes), " " * 21)
    return f"{size}{kernel}"


def report(
    compiler: str, tool: str | None, source: Path, architecture: str, directory: Path, shared: dict[str, int]
) -> int:
    """Prints a file's kernels; returns how much is wrong with them."""
    cubin = directory / f"{source.stem}-{architecture}.cubin"
    try:
        built = build(compiler, source, architecture, cubin)
    except RuntimeError as error:
        print(f"sm_{architecture}: {error}")
        return 1
    print(*(described(kernel, shared) for kernel in built), sep="\n")
    missing = complaints(cubin, tool) if tool else ["cuobjdump is missing: machine code was not looked at"]
    print(*missing, sep="\n", end="\n" if missing else "")
    return len(missing) if tool else 0


def main(architectures: list[str]) -> int:
    compiler, tool = nvcc(), disassembler()
    if compiler is None:
        print("nvcc is missing: nothing was built")
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        print("Shared memory: for a bottleneck of 128 and a growth of 32 (a whole layer: its tile for 256 channels)")
        for source, program in PROGRAMS.items():
            shared = shared_bytes(Path(directory), *CHANNELS.get(source, (128, 32)), program=program)
            for architecture in architectures or ARCHITECTURES:
                wrong += report(compiler, tool, SOURCE / source, architecture, Path(directory), shared)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
