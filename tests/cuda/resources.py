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


def shared_bytes(directory: Path, bottleneck: int, growth: int) -> dict[str, int]:
    """Shared memory of a block by the name of its tile, from the launchers' own constants."""
    runner = emulator.build(directory)
    command = [str(runner), "shared", str(bottleneck), str(growth)]
    text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    pairs = (line.replace("csp::cuda::", "").split("\t") for line in text.splitlines())
    return {name: int(size) for name, size in pairs}


def described(kernel: Kernel, shared: dict[str, int]) -> str:
    size = next((f"{size:6} bytes shared  " for tile, size in shared.items() if tile in kernel.name), " " * 21)
    return f"{size}{kernel}"


def main(architectures: list[str]) -> int:
    compiler, tool = nvcc(), disassembler()
    if compiler is None:
        print("nvcc is missing: nothing was built")
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        print("Shared memory: for a bottleneck of 128 and a growth of 32")
        shared = shared_bytes(Path(directory), 128, 32)
        for architecture in architectures or ARCHITECTURES:
            cubin = Path(directory, f"sm_{architecture}.cubin")
            try:
                built = build(compiler, SOURCE / "dense_block.cu", architecture, cubin)
                print(*(described(kernel, shared) for kernel in built), sep="\n")
            except RuntimeError as error:
                print(f"sm_{architecture}: {error}")
                wrong += 1
                continue
            missing = complaints(cubin, tool) if tool else ["cuobjdump is missing: machine code was not looked at"]
            print(*missing, sep="\n", end="\n" if missing else "")
            wrong += len(missing) if tool else 0
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
