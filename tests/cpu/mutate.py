"""Plants one fault at a time in a copy of csrc/cpu, compiles it and runs the tests that should find it.

python tests/cpu/mutate.py [--only norm.h] [--sample 5 --seed 0] [--budget 300] [--list]

A fault goes into one translation unit alone, compiled with -O1 for the best instruction set here; the copy is built once
(minutes). Exit status 1 if a fault survives.
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """In csrc/cpu/[tile/]<file> `old`, which is there once, becomes `new`; compiled into <unit>.cpp.

    tests: arguments of pytest.
    """

    file: str
    old: str
    new: str
    unit: str
    tests: tuple[str, ...]

    def path(self, root: Path) -> Path:
        return root / "csrc" / "cpu" / ("tile" if self.file.endswith(".h") else "") / self.file

    def applied(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file}: {self.old!r} is there {text.count(self.old)} times, expected once")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        old, new = (" ".join(t.split()) for t in (self.old, self.new))
        return f"{self.file:22} {self.unit:18}  {old} -> {new or '(nothing)'}"


def test(name: str, select: str) -> tuple[str, ...]:
    return f"tests/ops/test_{name}.py", "-k", select


PRE, POST, TRANSITION, CONCAT = "dense_block", "post_dense_block", "partial_transition", "concat_conv"
BLOCK = test(PRE, "test_training and float32 and (basic or odd) or without_kinks and float32 and train")
RECOMPUTE = test(PRE, "test_recompute and float32")
DROPOUT = test(PRE, "dropout")
INFERENCE = test(PRE, "test_inference and float32")
MERGED = test(PRE, "test_training and float and 32x32")  # several tasks
LARGE_MEAN = ("tests/ops/test_large_means.py",)
POSTS = ("tests/layers/test_post_dense_block.py", "tests/layers/test_two_way_dense_block.py", "-k", "three_steps")
JOINS = ("tests/layers/test_partial_transition.py", "-k", "three_steps")
CONCATS = ("tests/layers/test_concat_conv.py", "-k", "three_steps or train or eval")

FAULTS = [
    # norm.h
    Fault("norm.h", "return centre(c) - double(T(centre(c)));", "return 0;", PRE, LARGE_MEAN),
    Fault("norm.h", "return centre(c) - double(T(centre(c)));", "return 0;", POST, (*LARGE_MEAN, "-k", "behind")),
    Fault("norm.h", " - (m - double(T(m))) * s)", ")", POST, (*LARGE_MEAN, "-k", "behind")),
    Fault("norm.h", "double sum = 0, sum_x = 0;\n      for (int t = 0;", "double sum = 0, sum_x = 0;\n      for (int t = 1;",
          CONCAT, CONCATS),
    Fault("norm.h", "ADD ? double(dgamma[c]) + slope : slope", "slope", POST, POSTS),
    Fault("norm.h", "double(gamma[c]) * r * r * double(dgamma[c])", "double(gamma[c]) * r * double(dgamma[c])", POST, POSTS),
    Fault("norm.h", "double(beta[c]) - moments.centre(c) * s", "double(beta[c])", CONCAT, test(CONCAT, "test_inference")),
    Fault("norm.h", "mean[column + c] = T(norm.moments.centre(c))", "mean[column] = T(norm.moments.centre(c))", TRANSITION, JOINS),
    # statistics.h
    Fault("statistics.h", "if (i < rows) s0 += row(i) - pivot;", "", PRE, BLOCK),
    Fault("statistics.h", "(q0 + q1) + d * d * (n * k / (n + k))", "(q0 + q1)", PRE, BLOCK),
    Fault("statistics.h", "+ d * d * n * part", "", PRE, MERGED),
    Fault("statistics.h", "mean[c] += d * part", "mean[c] = d * part", PRE, MERGED),
    # mix.h
    Fault("mix.h", "int64_t n = s.channels - c;\n      auto at", "int64_t n = s.channels - c - 1;\n      auto at", CONCAT, CONCATS),
    Fault("mix.h", "(p / (h * w) * H + p / w % h * 2) * W", "(p / (h * w) * H + p / w % h * 2) * w", TRANSITION, JOINS),
    Fault("mix.h", "store(to, s.add ? load(to, n) + d : d, n)", "store(to, d, n)", POST, POSTS),
    Fault("mix.h", "sum += d, sum_x += d * centred, d *= scale, x", "sum += d, sum_x += d * x, d *= scale, x", TRANSITION, JOINS),
    Fault("mix.h", "for (int64_t x = 0; g.H % 2 && x < g.W; x++)", "for (int64_t x = 0; g.H % 2 && x < g.W - 1; x++)", TRANSITION,
          JOINS),
    Fault("mix.h", "int64_t o = pixel * pitch + n, left = channels - n;", "int64_t o = pixel * pitch + n, left = channels - n - 1;",
          TRANSITION, JOINS),
    # conv3x3.h
    Fault("conv3x3.h", "top + i >= 0 && top + i < g.H ? value", "top + i >= 0 && top + i < g.H + 1 ? value", PRE, BLOCK),
    Fault("conv3x3.h", "  blank(0);\n", "", PRE, BLOCK),
    Fault("conv3x3.h", "seen += pixels;", "seen = pixels;", PRE, BLOCK),
    Fault("conv3x3.h", "c.dropout(y[u][v], pixel, ch)", "c.dropout(y[u][v], pixel + 1, ch)", PRE, DROPOUT),
    Fault("conv3x3.h", "sum += d, sum_z += d * centred;", "sum += d, sum_z = d * centred;", PRE, BLOCK),
    # pointwise.h
    Fault("pointwise.h", "load(f + d * L, K - k - d * L)", "load(f + d * L, K - k - d * L - 1)", PRE, BLOCK),
    Fault("pointwise.h", "s += d, sx += d * centred, g_out = gin + d * scale", "s += d, sx += d * centred, g_out = d * scale",
          PRE, BLOCK),
    Fault("pointwise.h", "if (stats) stats[task].count = seen;", "if (stats) stats[task].count = seen + 1;", PRE, BLOCK),
    # activate.h
    Fault("activate.h", "y < h && x < w ? (p / (W * H) * h + y) * w + x : -1", "x < w ? (p / (W * H) * h + y) * w + x : -1",
          TRANSITION, JOINS),
    Fault("activate.h", "T part = grid.pool ? T(0.25) : T(1);", "T part = T(1);", TRANSITION, JOINS),
    Fault("activate.h", "if (dn) store(dn + (p0 + q) * pitch + k, d);\n            sum += d",
          "if (dn) store(dn + (p0 + q) * pitch + k, d);\n            sum = d", CONCAT, CONCATS),
    # pack.h
    Fault("pack.h", "TRANSPOSED ? 8 - t : t", "t", PRE, BLOCK),
    Fault("pack.h", "c = n + j * L, left = depth - k;", "c = n + j * L, left = depth - k - 1;", CONCAT, CONCATS),
    Fault("pack.h", "(b - k0) * 9 - q * L,", "(b - k0) * 9 - q * L - 1,", PRE, BLOCK),
    # fused_layer.h
    Fault("fused_layer.h", "min64(H, tl.y(last) + M + 1)", "min64(H, tl.y(last) + M)", PRE, INFERENCE),
    Fault("fused_layer.h", "if (u < ym && v < xm) store", "if (u < ym && v <= xm) store", PRE, INFERENCE),
    # the operators
    Fault("dense_block.cpp", "owed_mean[c] += s * double(dbeta[c])", "owed_mean[c] = s * double(dbeta[c])", PRE, BLOCK),
    Fault("dense_block.cpp", "a.mean + C + l * b, a.var + C + l * b, weight(p.mean2)",
          "a.mean + C, a.var + C + l * b, weight(p.mean2)", PRE, BLOCK),
    Fault("dense_block.cpp", "if (!a.z) pack<false>(packed, l), bottleneck", "if (!a.z && l) pack<false>(packed, l), bottleneck",
          PRE, RECOMPUTE),
    Fault("post_dense_block.cpp", "memcpy(p.reduce[i].norm.var, both + (2 + i) * b", "memcpy(p.reduce[i].norm.var, both + 2 * b",
          POST, POSTS),
    Fault("post_dense_block.cpp", "in.s[1].column + s * g, g);", "in.s[1].column, g);", POST, POSTS),
    Fault("partial_transition.cpp", "store(f + o * pitch + c, d * T(0.25), C - c)",
          "store(f + o * pitch + c, d, C - c)", TRANSITION, JOINS),
    Fault("partial_transition.cpp", "correction.fill(n, 0, c.out, pixels, false);", "correction.fill(n, 0, c.out, P, false);",
          TRANSITION, JOINS),
    Fault("concat_conv.cpp", "Norm<T>{a.norm, channel}.fill(norm.from(column), size);",
          "Norm<T>{a.norm, 0}.fill(norm.from(column), size);", CONCAT, CONCATS),
    Fault("concat_conv.cpp", "correction.fill(n, column, size, mix.P, false);", "correction.fill(n, column, size, mix.P + 1, false);",
          CONCAT, CONCATS),
]  # fmt: skip


class Copy:
    """A copy of the sources, built; one fault at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("csp_kernels", "csrc", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, root / name, ignore=ignored, dirs_exist_ok=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root)
        self.build()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        flags = {
            "CSP_KERNELS_CUDA": "0",
            "CSP_KERNELS_ISAS": "native",
            "CXXFLAGS": "-O1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment = {**os.environ, **flags, "OMP_NUM_THREADS": "2"}
        environment.pop("CSP_KERNELS_LIBRARY", None)
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip

    def build(self) -> None:
        """Compiles what is stale and links."""
        done = self.command("setup.py", "-q", "build_ext", "--inplace")
        if done.returncode:
            raise SystemExit(done.stdout)

    def link(self, compiler: str, first: Path) -> None:
        """Of an inline function that several objects have, the linker keeps that of the first: the fault's."""
        library, torch_lib = self.root / "csp_kernels" / "_C.abi3.so", Path(torch.__file__).parent / "lib"
        objects = sorted((self.root / "build" / "native").glob("*.o"), key=lambda path: (path != first, path))
        fresh = library.with_suffix(".new")
        command = [compiler, "-shared", *map(str, objects), "-o", str(fresh), f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        fresh.replace(library)

    def test(self, arguments: tuple[str, ...]) -> str:
        """The last line of pytest; "" if all passed."""
        done = self.command("-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments)
        if done.returncode in (2, 3, 4, 5):  # nothing selected, or an error of pytest itself
            raise SystemExit(f"{arguments}: {done.stdout}")
        return "" if done.returncode == 0 else (done.stdout.strip().splitlines() or [str(done.returncode)])[-1]

    def attempt(self, fault: Fault) -> bool:
        """Whether it is caught. Headers keep their time, so that no other unit looks stale."""
        path, start = fault.path(self.root), time.monotonic()
        stamps = (self.root / "build" / "native").glob(f"{fault.unit}.*.cmd")
        (unit,) = (stamp.with_suffix(".o") for stamp in stamps if f"cpu/{fault.unit}.cpp" in stamp.read_text())
        text, times, kept = path.read_text(), path.stat(), unit.read_bytes()
        path.write_text(fault.applied(text))
        try:
            command = shlex.split(unit.with_suffix(".cmd").read_text(), comments=True)
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        finally:
            path.write_text(text)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if done.returncode:
            raise SystemExit(f"{fault}: does not compile\n{done.stdout}")
        self.link(command[0], unit)
        outcome = self.test(fault.tests)
        unit.write_bytes(kept)
        print(f"{'caught' if outcome else 'SURVIVED':8} {time.monotonic() - start:4.0f}s  {fault}", flush=True)
        return bool(outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginning of the file's name")
    parser.add_argument("--sample", type=int, help="so many of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which no other is begun; 0: all")
    parser.add_argument("--root", type=Path, help="where to copy to, kept; otherwise a temporary directory")
    parser.add_argument("--list", action="store_true", help="say what would be planted")
    given = parser.parse_args()
    for fault in FAULTS:  # all strings before anything is built
        fault.applied(fault.path(ROOT).read_text())
    faults = [fault for fault in FAULTS if fault.file.startswith(given.only)]
    if given.sample is not None:
        faults = random.Random(given.seed).sample(faults, min(given.sample, len(faults)))
    if given.list:
        print(*faults, sep="\n")
        return 0
    start, survivors, passed = time.monotonic(), 0, set()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Copy(given.root or Path(temporary))
        for i, fault in enumerate(faults):
            if given.budget and time.monotonic() - start > given.budget:
                faults = faults[:i]
                break
            if fault.tests not in passed and (failure := copy.test(fault.tests)):
                raise SystemExit(f"without a fault: {fault.tests}: {failure}")
            passed.add(fault.tests)
            survivors += not copy.attempt(fault)
    print(f"{len(faults)} faults, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
