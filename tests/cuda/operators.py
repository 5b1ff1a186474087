"""torch.ops.csp_kernels.conv3x3_* for tensors on the CPU: csrc/cuda and its operators, compiled over the emulation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from emulator import FLAGS, HERE, SOURCE, compiler


def build(directory: Path, source: Path = SOURCE) -> Path:
    """The library; loading it registers its kernels for the rest of the process."""
    torch_home, library = Path(torch.__file__).parent, directory / "operators.so"
    command = [
        *compiler(), "-std=c++20", "-march=native", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *FLAGS["plain"],
        "-DCSP_EMULATION", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE / 'emulation'}", f"-I{source}",
        "-isystem", str(torch_home / "include"), "-fPIC", "-fvisibility=hidden", "-shared", "-o", str(library),
        "-x", "c++", *map(str, sorted(source.glob("*.cu"))), f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return library
