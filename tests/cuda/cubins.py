"""Builds csrc/cuda with nvcc (no GPU needed) and looks at what came out. Spills and local memory are errors, as is a
kernel without tensor-core instructions or 16-byte accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from emulator import SOURCE

ARCHITECTURES = ("80", "90", "100")
STRICT = "-Xptxas=-v,-warn-spills,-warn-lmem-usage"
# what each kernel's machine code must hold; its tensor cores are fed by LDSM
PRODUCT = ("HMMA.16816", "LDSM.16.MT88", r"STS\.128", r"LDS[.\w]*\.128")
WIDE = (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128")
STAGED = (r"LDGSTS[.\w]*\.128", r"STS\.128", r"LDS[.\w]*\.128")
TF32 = ("HMMA.1688.F32.TF32",)
EXPECTED = {
    "conv3x3_forward_kernel": (*PRODUCT, "LDSM.16.M88.4", r"LDG\.E[.\w]*\.128", r"LDGSTS[.\w]*\.128"),
    "conv3x3_dgrad_kernel": (*PRODUCT, "LDSM.16.M88.4", r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "conv3x3_wgrad_kernel": (*PRODUCT, r"LDGSTS[.\w]*\.128"),
    "forward_float32_kernel<Ieee": (*STAGED, "FFMA"),
    "forward_float32_kernel<Tf32": (*STAGED, *TF32, "LDSM.16.M88.4"),
    "dgrad_float32_kernel<Ieee": (*STAGED, "FFMA", *WIDE),
    "dgrad_float32_kernel<Tf32": (*STAGED, *TF32, "LDSM.16.M88.4", *WIDE),
    "wgrad_float32_kernel<Ieee": (*STAGED, "FFMA", r"LDS[.\w]*\.64"),
    "wgrad_float32_kernel<Tf32": (*STAGED, *TF32, r"LDS[.\w]*\.64"),
}
LOCAL_MEMORY = r"\b(LDL|STL)\b"


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, without arguments
    architecture: str
    registers: int
    spilled_bytes: int

    def __str__(self) -> str:
        return (
            f"sm_{self.architecture:4} {self.registers:4} registers  {self.spilled_bytes:3} bytes spilled  {self.name}"
        )


def nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def disassembler() -> str | None:
    """cuobjdump: the toolkit's, or the one that comes with triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def build(compiler: str, source: Path, architecture: str, cubin: Path) -> list[Kernel]:
    """Compiles for one architecture; raises RuntimeError with what nvcc says, spills among it."""
    command = [compiler, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", STRICT, "-Werror", "all-warnings"]
    command += [f"-I{SOURCE}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return [*kernels(done.stdout + done.stderr, architecture)]


def kernels(log: str, architecture: str) -> list[Kernel]:
    """What ptxas -v says."""
    pattern = r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, log, re.DOTALL)
    return [Kernel(demangled(name), architecture, int(used), int(a) + int(b)) for name, a, b, used in found]


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], text=True, capture_output=True, check=True).stdout.strip()
    arguments = r"\((float32::)?(Forward|Dgrad|Wgrad|Pack|Slab|Split|Statistics|DenseLayer)Arguments.*"
    return re.sub(rf"csp::cuda::(float32::)?|^void |\(int\)|\(csp.*|{arguments}", "", text)


def functions(cubin: Path, tool: str) -> dict[str, str]:
    """Machine code by kernel."""
    text = subprocess.run([tool, "-sass", str(cubin)], text=True, capture_output=True, check=True).stdout
    parts = re.split(r"\n\s*Function : ", text)[1:]
    return {demangled(part.partition("\n")[0].strip()): part for part in parts}


def complaints(cubin: Path, tool: str) -> list[str]:
    """What is missing in machine code, or should not be there."""
    found = []
    for name, code in functions(cubin, tool).items():
        for prefix, expected in EXPECTED.items():
            if name.startswith(prefix):
                found += [f"{name}: no {e}" for e in expected if not re.search(e, code)]
        if re.search(r"@!?U?P\d+\s+(HMMA|LDSM)", code):
            found.append(f"{name}: not all lanes take part in a product")
        if re.search(LOCAL_MEMORY, code):
            found.append(f"{name}: uses local memory")
    return found
