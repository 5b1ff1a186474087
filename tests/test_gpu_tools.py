"""The GPU schedule's build, sanitizer and counters without their tools: compilers that only write files, command lines,
and what compute-sanitizer and ncu print, in the form that their documentation and users' reports have."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_build
import gpu_counters
import gpu_sanitizer
import gpu_steps
from gpu_sanitizer import Report
from gpu_steps import Deadline, Results

# --- build ---

# Writes an object, and the makefile that -MF names; $FAIL: a word of sources that do not compile, $SLOW: that hang.
COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo "release 13.0, V13.0.1"; exit;;
  *--list-gpu-arch*) echo compute_80; echo compute_90; exit;;
  *--dryrun*) exit;;
esac
case "$*" in *"${FAIL:-nothing}"*) echo "error: no such thing"; exit 1;; esac
case "$*" in *"${SLOW:-nothing}"*) exec sleep 60;; esac
while [ $# -gt 0 ]; do
  case "$1" in -MF) echo "x: " > "$2"; shift;; -o) echo object > "$2"; shift;; esac
  shift
done
"""


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: float = 30.0, **words: str) -> tuple[bool, Path, Any]:
    """Whether all was well, the library, and what -> the last line about it. words: FAIL, SLOW."""
    for name in ("c++", "nvcc"):
        (folder / name).write_text(COMPILER)
        (folder / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith("CSP_KERNELS_")]:
        monkeypatch.delenv(name)
    settings = {"CXX": str(folder / "c++"), "NVCC": str(folder / "nvcc"), "CSP_KERNELS_ISAS": "baseline"}
    for name, value in {**settings, **words, "MAX_JOBS": "16"}.items():
        monkeypatch.setenv(name, value)
    setup, target = gpu_build.load_setup(), folder / "_C.so"
    setup.OBJECTS = folder / "objects"
    setup.has_gpu, setup.capabilities = (lambda: True), (lambda: ("90",))
    target.write_text("of other sources")
    with Results(folder, "build") as results:
        linked = lambda: results.write({"what": "linked", "ok": target.exists(), "seconds": 0})  # noqa: E731
        fine = gpu_build.Build(setup, target, True, results, Deadline(limit), linked).everything()
    found = list(gpu_steps.read(folder / "build.jsonl"))
    return fine, target, {line.get("what", "left"): line for line in found}


def test_build_has_the_gpu_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, target, found = build(tmp_path, monkeypatch)
    assert fine and target.read_text() == "object\n" and found["left"] == {"left": []}
    assert found["link"]["message"] == "CUDA: sm_90" and found["compile dense_block.cu with CUDA"]["ok"]
    assert found["linked"]["ok"]  # what waits for a library is told
    assert all(line["ok"] and line["seconds"] >= 0 for what, line in found.items() if what != "left")


def test_cuda_that_does_not_compile_costs_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, target, found = build(tmp_path, monkeypatch, FAIL="dense_layer.cu")
    assert not fine and target.read_text() == "object\n" and found["link"]["message"] == "without CUDA"
    bad = [what for what, line in found.items() if not line.get("ok", True)]
    assert bad == ["compile dense_layer.cu with CUDA"]
    assert found[bad[0]]["message"].startswith("csp_kernels: compiling dense_layer.cu failed:")


def test_a_compiler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, target, found = build(tmp_path, monkeypatch, limit=3.0, SLOW="dense_layer.cu")
    assert not fine and target.read_text() == "object\n" and found["link"]["message"] == "without CUDA"
    assert found["left"] == {"left": ["dense_layer.cuda.o"]}


def test_no_old_library_is_left_where_nothing_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, target, found = build(tmp_path, monkeypatch, FAIL="stage.cpp")
    assert not fine and not target.exists() and "link" not in found


def test_build_without_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setuptools", None)  # its import fails
    setup = gpu_build.load_setup()
    assert setup.setuptools.__version__ == "77" and setup.plan(["c++"], {"v3": []}, Path("torch"), None)
    assert sys.modules["setuptools"] is None


def test_kernels_are_compiled_ahead_for_the_gpu_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By processes of a part of the cases each; one of them fails, one is late."""
    (tmp_path / "small.py").write_text(
        "import sys, time\nassert sys.argv[1:4] == ['--dry-run', '--target', 'sm_103'], sys.argv\n"
        "part = sys.argv[5]\ntime.sleep(60 if part == '1/3' else 0)\nsys.exit(part == '2/3')\n"
    )
    monkeypatch.setattr(gpu_build, "SMALL", tmp_path / "small.py")
    monkeypatch.setattr(gpu_build, "PARTS", 3)
    ahead = gpu_build.Ahead(SimpleNamespace(capabilities=lambda: ("103",)))
    ahead.start()
    ahead.start()  # the second link
    with Results(tmp_path, "build") as results:
        ahead.finish(results, Deadline(gpu_build.LOAD + 2))
    (line,) = gpu_steps.read(tmp_path / "build.jsonl")
    assert (line["ok"], line["message"]) == (False, "1 of 3 processes") and 1 < line["seconds"] < 10


# --- compute-sanitizer ---

MEMCHECK = """========= COMPUTE-SANITIZER
case post begins
case post ends
case two_way begins
========= Invalid __global__ read of size 4 bytes
=========     at csp::cuda::add_splits_kernel(const float *, float *, int)+0x80 in dense_block.cu:17
=========     by thread (96,0,0) in block (3906,0,0)
=========     Address 0x79fd33fd0980 is out of bounds
=========     and is 129 bytes after the nearest allocation at 0x79fd33c00000 of size 4,000,000 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main [0x8ae3] in python
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on call to cudaMalloc.
case two_way failed: AcceleratorError: CUDA error: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
case dense block, tf32 begins
========= Error: Race reported between Write access at conv3x3_forward_kernel+0x140
=========     and Read access at conv3x3_forward_kernel+0xe0 [4 hazards]
=========
case dense block, tf32 ends
case transition begins
========= Warning: Race reported between Read access at _forward+0x260
=========     and Write access at _forward+0x200 [294 hazards]
case transition ends
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def reported(tool: str, text: str, status: int = 0) -> list[tuple[str, bool, str]]:
    report = Report(tool)
    found = [report.feed(line) for line in text.splitlines(keepends=True)]
    return [(d["kernel"], d["ok"], d["message"]) for d in (*found, report.finish(status, True)) if d]


def test_memcheck_is_read() -> None:
    first, second = reported("memcheck", MEMCHECK)
    assert first == ("post", True, "")
    where = "at csp::cuda::add_splits_kernel(const float *, float *, int)"
    assert second == ("two_way", False, f"Invalid __global__ read of size 4 bytes {where} (and 2 others)")


def test_racecheck_is_read() -> None:
    """A warning is told, and is no error."""
    first, second = reported("racecheck", RACECHECK)
    assert first[:2] == ("dense block, tf32", False) and "Write access at conv3x3_forward_kernel" in first[2]
    assert second[:2] == ("transition", True) and second[2].startswith("Warning: Race reported")


@pytest.mark.parametrize("error", ["Uninitialized __global__ memory read of size 4 bytes", "Barrier error detected."])
def test_other_tools_are_read(error: str) -> None:
    text = f"case post begins\n========= {error}\n=========     at _dgrad+0xb0 in mix.py:20\ncase post ends\n"
    assert reported("initcheck", f"{text}========= ERROR SUMMARY: 1 error") == [("post", False, f"{error} at _dgrad")]


def test_a_tool_that_did_not_look_is_no_success() -> None:
    """It died in a case, or never came to its summary."""
    begun = reported("memcheck", "case post begins\nSegmentation fault\n", -11)
    assert begun == [("post", False, "the process ended with status -11; the last line was: Segmentation fault")]
    silent = reported("memcheck", "case post begins\ncase post ends\n", 1)
    assert silent[0][1] and silent[1][:2] == ("behind a case", False) and "no summary" in silent[1][2]


def test_commands() -> None:
    line = gpu_sanitizer.command("/cuda/compute-sanitizer", "memcheck", "--device", "cuda")
    assert line[:3] == ["/cuda/compute-sanitizer", "--tool", "memcheck"] and line[-3].endswith("gpu_small.py")
    assert line[line.index("--target-processes") + 1] == "application-only"
    line = gpu_counters.command("ncu", ["_forward", "a+b"], "--device", "cuda")
    assert line[line.index("--kernel-name") + 1] == r"regex:^(_forward|a\+b)$" and "--csv" in line
    assert line[-3:] == ["--profiled", "--device", "cuda"] and line[-4].endswith("gpu_small.py")


FAKE = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"; echo "case post begins"; echo "case post ends"
case "$*" in *racecheck*) exec sleep 60;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_each_case_is_written_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tool that hangs in racecheck: what the runs have said by then is there, and what is left."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE)
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_sanitizer, "find_tool", lambda _: str(tool))
    monkeypatch.setattr(gpu_sanitizer, "cores", lambda: 100)
    assert gpu_sanitizer.main(["--out", str(tmp_path), "--limit", "2"]) == 0
    *found, end = gpu_steps.read(tmp_path / "sanitizer.jsonl")
    assert {(d["tool"], d["backend"], d["ok"]) for d in found} == {(*run, True) for run in gpu_sanitizer.RUNS}
    assert end == {"left": ["racecheck native", "racecheck triton"]}


def test_without_the_tools_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sanitizer, "find_tool", lambda _: None)
    assert gpu_sanitizer.main(["--out", str(tmp_path)]) == gpu_steps.SKIPPED
    line, end = gpu_steps.read(tmp_path / "sanitizer.jsonl")
    assert line["ok"] is None and line["message"].startswith("skipped: compute-sanitizer is not installed")
    assert end == {"left": []}


# --- ncu ---

HEAD = (
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
    "Device", "CC", "Section Name", "Metric Name", "Metric Unit", "Metric Value",
)  # fmt: skip
DGRAD = "void csp::cuda::conv3x3_dgrad_kernel<csp::cuda::Tile<2, 4>, __half>(float *)"


def row(*fields: str) -> str:
    return ",".join(f'"{field}"' for field in fields)


def launch(number: int, kernel: str, *metric: str) -> str:
    where = "Command line profiler metrics"
    program = f"{number}", "1234", "python3", "127.0.0.1", kernel, "1", "7"
    return row(*program, "(256, 1, 1)", "(98, 1, 1)", "0", "9.0", where, *metric)


NCU = "\n".join(
    (
        "==PROF== Connected to process 1234 (/usr/bin/python3)",
        '==PROF== Profiling "_forward" - 0: 0%....50%....100% - 3 passes',
        row(*HEAD),
        launch(0, "_forward", "dram__bytes_read.sum", "byte", "1,000"),
        launch(0, "_forward", "sm__throughput.avg.pct_of_peak_sustained_elapsed", "%", "40.5"),
        launch(1, "_forward", "dram__bytes_read.sum", "byte", "3,000"),
        launch(2, DGRAD, "dram__bytes_read.sum", "byte", "n/a"),
        "==PROF== Disconnected from process 1234",
    )
)


def test_counters_are_read() -> None:
    """Launches of one shape by their mean; a counter that this GPU does not have is left out."""
    kernel = "_forward, grid (98, 1, 1), block (256, 1, 1)"
    assert gpu_counters.counters(NCU) == [
        {"kernel": kernel, "metric": "dram__bytes_read.sum", "value": 2000.0, "unit": "byte"},
        {"kernel": kernel, "metric": "sm__throughput.avg.pct_of_peak_sustained_elapsed", "value": 40.5, "unit": "%"},
    ]
    assert not gpu_counters.counters("==PROF== nothing\nof this program\n")


def test_complaints_of_ncu() -> None:
    text = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters\n"
    assert "administrators alone" in gpu_counters.complaint(text, 1)
    assert gpu_counters.complaint("==ERROR== no such metric\nbye", 9).endswith("status 9: ==ERROR== no such metric")


def test_heaviest_kernels() -> None:
    name = "void csp::cuda::(anonymous namespace)::conv3x3_dgrad_kernel<csp::cuda::Tile<2, 4>, __half>(float *, int)"
    assert gpu_counters.plain(name) == "conv3x3_dgrad_kernel" and gpu_counters.plain("_forward") == "_forward"
    lines = [{"name": n, "us": t} for n, t in (("a", 5), ("b<1>(int)", 3), ("c", 1), ("b<2>(int)", 3), ("d", 2))]
    assert gpu_counters.heaviest(lines) == ["b", "a", "d"]
