"""Loads the compiled operators (csp_kernels/_C*.so, libtorch stable ABI) and says what is missing when it cannot.

CSP_KERNELS_LIBRARY names another build of them: one with sanitizers, or with a fault planted.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

ENVIRONMENT = "CSP_KERNELS_LIBRARY"
FIX = "build it with `pip install .` or `make build` in the source tree"


def _load() -> str:
    """Load the library beside this file; return "" or the reason why it did not load."""
    named = os.environ.get(ENVIRONMENT)
    files = [Path(named)] if named else sorted(Path(__file__).parent.glob("_C*"))
    found = [p for p in files if p.suffix in (".so", ".dylib", ".pyd")]
    if not found:
        return f"the compiled library csp_kernels/_C*.so is missing; {FIX}"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {found[0].name} does not load with torch {torch.__version__} ({error}); {FIX}"
    return ""


_WHY_NOT = _load()


def available() -> bool:
    """True if the compiled operators are loaded."""
    return not _WHY_NOT


def why_not() -> str:
    """Why the compiled operators are not loaded and what to do about it; "" if they are."""
    return _WHY_NOT


def isa() -> str:
    """Instruction set the CPU kernels use here, for example "x86-64-v4"."""
    return str(torch.ops.csp_kernels.cpu_isa()) if available() else ""


def isas() -> list[str]:
    """Instruction sets compiled into the library."""
    return str(torch.ops.csp_kernels.cpu_isas()).split(",") if available() else []


def cuda_architectures() -> list[int]:
    """Compute capabilities the CUDA kernels are compiled for, for example [80, 90]; empty: built without CUDA."""
    listed = str(torch.ops.csp_kernels.cuda_architectures()) if available() else ""
    return [int(a) for a in listed.split(",") if a]


def cuda_error() -> str:
    """What keeps the library's CUDA runtime from running here, for example a driver older than it; "" if nothing."""
    return str(torch.ops.csp_kernels.cuda_error()) if cuda_architectures() else ""


def scratch_bytes() -> int:
    """Bytes of scratch memory that the CPU kernels hold, all threads together."""
    return int(torch.ops.csp_kernels.scratch_bytes()) if available() else 0


def empty_cache() -> int:
    """Give back what the CPU kernels keep between calls; how many bytes.

    That is scratch memory, of all threads that are in no call, which otherwise goes back some seconds after its last
    use, at the next call of any operator; and packed weights of inference, which otherwise live as long as the weights
    do, or until they are trained.
    """
    from csp_kernels.ops import _packed  # imports this module

    return _packed.empty() + int(torch.ops.csp_kernels.empty_cache()) if available() else 0
