"""Compiles csrc/cuda for the host over tests/cuda/emulation and runs its launchers there (runner.cpp)."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "cuda"
FLAGS = {
    "plain": ("-O1",),
    "asan": ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-O1", "-g", "-fsanitize=thread"),
}
COUNTERS = (
    "mma", "shuffles", "matrices", "matrix_wavefronts", "shared_loads", "shared_load_wavefronts", "shared_stores",
    "shared_store_wavefronts", "global_load_bytes", "global_store_bytes", "copy_bytes", "narrow_loads",
    "narrow_wavefronts",
)  # fmt: skip


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def build(directory: Path, kind: str = "plain", source: Path = SOURCE, program: str = "runner.cpp") -> Path:
    """The program, compiled with the kernels in `source`."""
    binary = directory / f"{Path(program).stem}-{kind}"
    command = [
        *compiler(), "-std=c++17", "-march=native", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *FLAGS[kind],
        "-DCSP_EMULATION", f"-I{HERE / 'emulation'}", f"-I{source}", str(HERE / program), "-o", str(binary),
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr or source != SOURCE, done.stderr  # mutants may leave things unused
    return binary


@dataclass(frozen=True)
class Result:
    tile: int  # index in the list of the pass
    counters: dict[str, int]


class Failure(Exception):
    """The runner ended in an error; carries what it said."""


@dataclass(frozen=True)
class Spread:
    """Rows that lie `pitch` bytes apart in the runner's memory."""

    rows: Tensor
    pitch: int


def run(binary: Path, numbers: list[int], buffers: list[Tensor | Spread], timeout: float = 120) -> Result:
    """Runs a job; buffers, contiguous on the CPU, take what it left in them."""
    tensors = [b.rows if isinstance(b, Spread) else b for b in buffers]
    with tempfile.TemporaryDirectory() as directory:
        job, result = Path(directory, "job"), Path(directory, "result")
        with job.open("wb") as file:
            file.write(struct.pack(f"<{len(numbers) + 2}q", len(numbers), *numbers, len(buffers)))
            for b, x in zip(buffers, tensors, strict=True):
                shape = (len(x), x.nbytes // len(x), b.pitch) if isinstance(b, Spread) else (1, x.nbytes, x.nbytes)
                file.write(struct.pack("<3q", *shape) + bytes_of(x).numpy().tobytes())
        command = [*without_randomisation(binary), str(binary), str(job), str(result)]
        environment = os.environ | {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=67"}
        done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=timeout, env=environment)
        if done.returncode:
            raise Failure(f"exit code {done.returncode}: {done.stderr[-4000:]}")
        data = bytearray(result.read_bytes())
    at = 0
    for x in tensors:
        bytes_of(x).copy_(torch.frombuffer(data, dtype=torch.uint8, count=x.nbytes, offset=at))
        at += x.nbytes
    tile, *counters = struct.unpack_from(f"<{1 + len(COUNTERS)}q", data, at)
    return Result(tile, dict(zip(COUNTERS, counters, strict=True)))


def bytes_of(x: Tensor) -> Tensor:
    assert x.is_contiguous() and x.numel()
    return x.view(-1).view(torch.uint8)


def without_randomisation(binary: Path) -> list[str]:
    """TSan cannot lay out its memory under some kernels' address space randomisation."""
    setarch = shutil.which("setarch")
    return [setarch, os.uname().machine, "-R"] if setarch and "tsan" in binary.name else []
