"""Which machine and which source tree results belong to, found out without an import of torch into this process."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "gpu" / "_C.so"  # of gpu_build.py
WAIT = 60.0  # seconds for torch to be imported and to name the device


@dataclass(frozen=True)
class Machine:
    """What runs the steps. capability: (9, 0) of a GPU, None without one; versions None where a package is missing."""

    device: str
    capability: tuple[int, int] | None
    torch: str | None
    triton: str | None


DESCRIBE = """
import importlib.metadata, json, torch
def version(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
there = torch.cuda.is_available()
print(json.dumps([
    torch.cuda.get_device_name() if there else "",
    torch.cuda.get_device_capability() if there else None,
    torch.__version__, version("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"),
]))
"""


def describe() -> Machine:
    """Asks torch, in a process of its own: a driver that hangs or crashes takes that alone. Raises RuntimeError with
    the end of what it said."""
    command = [sys.executable, "-c", DESCRIBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"torch did not say in {WAIT:.0f} s what GPU there is") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{sys.executable} cannot ask torch for a GPU: {last}")
    name, capability, torch, triton = json.loads(done.stdout.splitlines()[-1])
    return Machine(name, tuple(capability) if capability else None, torch, triton)


def processor() -> str:
    """The CPU's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """Of the source tree, with "-dirty" where files differ from it; None where git does not know."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def slug(name: str) -> str:
    """A folder's name of a device's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc or of CUDA_HOME; None: nowhere."""
    home, compiler = os.environ.get("CUDA_HOME"), shutil.which(os.environ.get("NVCC") or "nvcc")
    folders = [Path(home, "bin")] if home else []
    folders += [Path(compiler).resolve().parent] if compiler else []
    return shutil.which(name) or next((str(f / name) for f in folders if os.access(f / name, os.X_OK)), None)


def library(on_gpu: bool) -> Path | None:
    """The library that steps load: on a GPU the one of gpu_build.py, elsewhere only if none is in place; None: the one
    in place."""
    in_place = any((ROOT / "csp_kernels").glob("_C*.so"))
    return BUILT if BUILT.exists() and (on_gpu or not in_place) else None
