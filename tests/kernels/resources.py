"""What the compiled kernels need of a GPU: registers, spills, shared memory, tensor cores, width of their loads.

python tests/kernels/resources.py --target sm_90 --rows rows.json   # compiles every launch of CASES
python tests/kernels/resources.py --document   # for all targets, into docs/gpu.md
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import cases
from cases import BlockCase, Case, ConcatConvCase, GraphCase, StageCase, TransitionCase
from gpu_cases import DenseCase

import csp_kernels as csp
from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
TESTED = tuple(os.environ.get("CSP_KERNELS_TARGETS", "sm_90").split(","))  # by test_compile.py
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes a program
TENSOR = {  # opcodes of tensor cores
    "HMMA": r"\bHMMA\.", "HGMMA": r"\bHGMMA\.", "UTCMMA": r"\bUTC\w*MMA\b", "DMMA": r"\bDMMA\.", "MFMA": r"\bv_mfma_",
}  # fmt: skip
SIZES = ("BP", "BN", "BK", "STAGES")
WORKERS = 2


@dataclass(frozen=True)
class Row:
    """A kernel in one configuration, of one type and alignment, for one target."""

    target: str
    operator: str
    case: str
    aligned: bool  # channels are multiples of 16 bytes
    narrow: bool  # a product has few channels
    kernel: str
    tile: str
    dtype: str  # of its first tensor
    precision: str
    warps: int
    registers: int
    spills: int  # bytes stored and loaded; on AMD registers
    shared: int
    tensor: dict[str, int]
    wide_loads: int  # of 16 bytes, from global memory
    loads: int
    constants: dict[str, Any]
    digest: str


# --- what is compiled ---

LARGE, SMALL = (8, 56, 56), (2, 14, 14)
_DENSE = DenseCase(size=LARGE, layers=1, channels=64, growth=32, width=128)
_TRANSITION = TransitionCase(size=LARGE, part=64, dense=128, mid=128, out=128)
_CONCAT = ConcatConvCase(size=LARGE, channels=(64, 128), out=128, options={"act": "silu"})
_POST = BlockCase(size=LARGE, layers=1, channels=64, growth=32, width=128)


def downsampling(channels: int, width: int, groups: int) -> Graph:
    """A 3x3 and a 1x1 with stride 2, groups with and without one, maxima; in inference a residual behind each."""
    build = Builder(channels)
    x = build.read(0)
    down = conv_norm(build, [build.read(build.conv([x], width, 3, stride=2), build.norm(width), "relu")], width, 3)
    pooled = build.max_pool(build.read(0), 3, stride=2)
    shortcut = build.read(build.conv([build.read(pooled)], width), build.norm(width))
    a = build.read(build.sum([conv_norm(build, [down], width, 3, groups=groups), shortcut]))
    b = build.read(build.sum([conv_norm(build, [a], width), a]))
    halved = build.conv([down], width, 3, stride=2, groups=groups), build.conv([b], width, stride=2)
    build.write([build.read(build.sum([build.read(v) for v in halved]), build.norm(width), "relu")])
    return build.graph()


_STAGE = StageCase(size=LARGE, layers=1, channels=128, part=64, growth=32, width=128, mid=128, out=128)
_DOWN = downsampling(64, 128, 16)
HALF, BF16 = torch.float16, torch.bfloat16
EVERY = ("dense_block", "partial_transition")  # operators whose kernels are compiled in every configuration
CASES: dict[str, list[tuple[str, Case]]] = {  # (float32's precision, case)
    "dense_block": [
        ("ieee", replace(_DENSE, dtype=HALF)),
        ("ieee", replace(_DENSE, dtype=BF16, growth=48, width=192, size=SMALL)),
        ("ieee", replace(_DENSE, dtype=BF16, channels=24, growth=12, width=48, size=SMALL)),
        ("ieee", replace(_DENSE, frozen=(True,))),
        ("tf32", _DENSE),
    ],
    "concat_conv": [("ieee", replace(_CONCAT, dtype=HALF)), ("tf32", replace(_CONCAT, options={"act": "mish"}))],
    "partial_transition": [("ieee", replace(_TRANSITION, dtype=BF16)), ("ieee", _TRANSITION)],
    "post_dense_block": [("ieee", replace(_POST, dtype=BF16))],
    "csp_stage": [
        ("ieee", replace(_STAGE, dtype=HALF, layer="two_way")),
        ("ieee", replace(_STAGE, dtype=BF16, layer="pre")),
    ],
    "stage": [
        ("ieee", GraphCase(size=LARGE, dtype=HALF, graph=_DOWN)),
        ("tf32", GraphCase(size=LARGE, graph=_DOWN)),
        ("ieee", GraphCase(size=LARGE, graph=_DOWN)),
    ],
}


def aligned(case: Case) -> bool:
    """Whether pixels of every image begin at a multiple of 16 bytes."""
    channels = [*case.inputs.values(), *(c for shape in case.shapes.values() if len(shape) == 4 for c in shape[:2])]
    return all(c * case.dtype.itemsize % 16 == 0 for c in channels)


def narrow(case: Case) -> bool:
    """Whether some product's accumulator has fewer rows of channels than a warp group takes."""
    kernels = [shape for shape in case.shapes.values() if len(shape) == 4]
    return min(min(shape[1], shape[0] if shape[2] == 1 else shape[1]) for shape in kernels) < 64


def label(precision: str, case: Case) -> str:
    n, h, w = case.size
    widths = "-".join(str(c) for c in dict.fromkeys([*case.inputs.values(), *(s[0] for s in case.shapes.values())]))
    kind = str(case.dtype).removeprefix("torch.") if precision == "ieee" else precision
    return f"{kind} {n}x{h}x{w} {widths}"


def run(precision: str, case: Case) -> None:
    """Forward, backward, and inference."""
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    cases.run(case, csp.ops, case.leaves(), case.running())
    fixed = replace(case, frozen=(True,))
    with torch.no_grad():
        fixed(csp.ops, fixed.leaves(), fixed.running())


@contextmanager
def on_triton() -> Iterator[None]:
    """The operators on CPU tensors call the Triton functions."""
    from csp_kernels.kernels import stage
    from csp_kernels.ops import _packed

    csp.use_backend("native")
    with (
        patch.object(_packed, "SHARES", False),
        torch.library._scoped_library("csp_kernels", "IMPL") as library,
    ):
        library.impl("stage", stage.forward, "CPU", allow_override=True)
        library.impl("stage_backward", stage.backward, "CPU", allow_override=True)
        yield


def compile_all(target: str, operators: Sequence[str] = tuple(CASES)) -> list[dict[str, Any]]:
    """Rows; where a launch cannot be built, the error instead."""
    from csp_kernels.kernels.dry_run import dry_run

    rows: list[dict[str, Any]] = []
    for operator in operators:
        for precision, case in CASES[operator]:
            name = label(precision, case)
            about = {"target": target, "operator": operator, "case": name, "aligned": aligned(case)}
            about["narrow"] = narrow(case)
            with dry_run(target, candidates=operator in EVERY) as launches, on_triton():
                try:
                    run(precision, case)
                except Exception:
                    rows.append({**about, "error": traceback.format_exc()})
            rows += [asdict(_row(about, one)) for one in launches]
    return rows


# --- what came out ---


def _row(about: dict[str, Any], one: Any) -> Row:
    code = one.asm["cubin"] if "cubin" in one.asm else one.asm["amdgcn"].encode()
    registers, spills, tensor, wide, loads = (_nvidia if "cubin" in one.asm else _amd)(code)
    tile = " ".join(f"{key}{one.constants[key]}" for key in SIZES if key in one.constants)
    constants = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in one.constants.items()}
    dtype = next((t for t in one.types.values() if t and "float" in t and t != "float64"), "float64")
    return Row(
        **about, kernel=one.kernel, tile=tile, dtype=dtype, precision=one.constants.get("PRECISION", ""),
        warps=one.warps, registers=registers, spills=spills, shared=one.shared, tensor=tensor, wide_loads=wide,
        loads=loads, constants=constants, digest=hashlib.sha256(code).hexdigest(),
    )  # fmt: skip


Counts = tuple[int, int, dict[str, int], int, int]


def _tensor(text: str) -> dict[str, int]:
    return {name: n for name, pattern in TENSOR.items() if (n := len(re.findall(pattern, text)))}


@cache
def _nvidia(cubin: bytes) -> Counts:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    local = re.findall(r"\b(?:LDL|STL)(?:\.\w+)*?(?:\.(64|128))?\s", sass)
    spills = sum(int(bits or 32) // 8 for bits in local)
    assert bool(spills) == bool(int(found[2])), (spills, usage)  # local memory is there for nothing else
    wide = len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128|\bUTMALDG", sass))
    return int(found[1]), spills, _tensor(sass), wide, len(re.findall(r"\b(?:LDG|LDGSTS|UTMALDG)\b", sass))


@cache
def _amd(code: bytes) -> Counts:
    text = code.decode()
    spilled, registers, scratch = (
        int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])
        for name in ("vgpr_spill_count", "vgpr_count", "private_segment_fixed_size")
    )
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))
    return registers, max(spilled, scratch), _tensor(text), wide, len(re.findall(r"\b(?:global|buffer)_load_", text))


# --- all targets ---


def compile_apart(folder: Path, target: str) -> list[dict[str, Any]]:
    """compile_all in a process of its own."""
    out = folder / f"{target}.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / f"cache-{target}"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--target", target, "--rows", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:  # the compiler may have ended the process
        about = {"target": target, "case": "all", "error": f"exit {done.returncode}\n{done.stderr}"}
        return [{**about, "operator": name} for name in CASES]
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def split(found: Sequence[dict[str, Any]]) -> tuple[list[Row], list[str]]:
    """Rows, and what could not be built."""
    errors = [f"{one['operator']}, {one['case']}, {one['target']}: {one['error']}" for one in found if "error" in one]
    return [Row(**one) for one in found if "error" not in one], errors


# --- the document ---

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
PROSE = """# What the Triton kernels need of a GPU

Generated by `python tests/kernels/resources.py --document` without a GPU, by triton {triton} (ptxas {ptxas}; for sm_100
and sm_120 {blackwell}). Nothing here was measured on a device. `tests/kernels/test_compile.py` compiles the same for
sm_90, or for what CSP_KERNELS_TARGETS names, and fails on a spill, on too much shared memory, and where tensor cores or
16-byte loads are missing.

A cell: registers a thread (AMD: VGPRs), KiB of shared memory a program, and tensor-core instructions. Where alignments
or absent arguments make several kernels of one configuration, the most registers and memory of them. A spill is said,
in bytes. Empty: not a configuration for that target.

Numbers at the end of their range, float32 and bfloat16:

- NaN and infinity go where they go in plain PyTorch: ReLU keeps NaN and passes its gradient, a gradient in front of a
  ReLU that is not active is 0 whatever it is, statistics of a channel that has one are not finite. The 3x3 is a direct
  sum here, so one pixel reaches the eight around it and no more; of groups it also reaches those that are computed
  with its own, as many as have 32 channels. In 16 bits CUDA C++ also hands NaN of a feature to its
  gradient where fixed norms owe nothing, which plain PyTorch does not, and the gradient of a norm's weight does not see
  minus infinity behind a ReLU, where plain PyTorch has NaN.
- Batch statistics in Triton are right as long as float32 holds each deviation from the mean of its tile (3.4e38);
  CUDA C++ sums squares in float32, up to a deviation of about 1e18. Beyond that the variance is NaN, never a finite
  number or infinity (which would make finite outputs of nothing but the bias).
- What a norm takes from the gradient of its input is kept as a float32 slope, gamma / variance * mean(dn * normalised
  x). Where that is below 1.2e-38 it loses digits without a word, below 1.4e-45 it counts as 0: for gradients of 1e-8
  from standard deviations of about 1e15 on.

BP, BN, BK: pixels, output and input channels of a tile; w: warps.

"""


def _version(tool: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V([\d.]+)", text)[0]


def document(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        kind = row.dtype if row.precision in ("", "ieee") else row.precision
        key = row.kernel, f"{row.tile} w{row.warps}".strip(), kind
        groups.setdefault(key, {}).setdefault(row.target, []).append(row)
    versions = {"triton": importlib.metadata.version("triton"), "ptxas": _version("ptxas")}
    lines = [PROSE.format(**versions, blackwell=_version("ptxas-blackwell"))]
    lines += [f"| kernel | configuration | type | {' | '.join(TARGETS)} |\n", f"|{'---|' * (3 + len(TARGETS))}\n"]
    for key, by_target in sorted(groups.items()):
        cells = [_cell(by_target.get(target, [])) for target in TARGETS]
        lines.append(f"| {' | '.join((*key, *cells))} |\n")
    return "".join(lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    registers, shared, spills = (max(getattr(r, k) for r in rows) for k in ("registers", "shared", "spills"))
    tensor = "".join(f", {n} {name}" for name, n in max(rows, key=lambda r: r.registers).tensor.items())
    return f"{registers}, {shared / 1024:.0f} K{tensor}{f', spills {spills}' if spills else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--operators", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", type=Path, help="file to write")
    parser.add_argument("--document", action="store_true")
    args = parser.parse_args()
    if args.target:
        args.rows.write_text(json.dumps(compile_all(args.target, args.operators)))
        return 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(partial(compile_apart, Path(folder)), TARGETS))
    rows, errors = split([one for of_target in found for one in of_target])
    DOCUMENT.write_text(document(rows))
    print("\n".join(errors), file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
