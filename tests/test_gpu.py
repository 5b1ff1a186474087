"""tests/gpu, which only `make gpu` collects, and its benchmark still fit: parts by the C++ operators, and a dry run."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PART = (
    "first_channels or opcheck_inference or (three_steps and train) or (autocast and bfloat16) or epsilon or mish-two"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.usefixtures("native")
def test_bodies_run_on_the_cpu() -> None:
    done = run("-m", "pytest", "tests/gpu", "--device", "cpu", "-k", PART)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu runs them")
def test_without_a_gpu_they_fail_with_one_message() -> None:
    done = run("-m", "pytest", "tests/gpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and not done.stdout.strip()
    assert done.stderr.startswith("ERROR: tests/gpu need a GPU: ") and len(done.stderr.splitlines()) <= 2


@pytest.mark.usefixtures("native")
def test_the_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    """Its candidates agree, its rows are whole, and they can be drawn."""
    file = tmp_path / "cpu.csv"
    small = ("--operators", "post_dense_block", "--batch", "1", "--rounds", "1")
    where = ("--device", "cpu", "--dtypes", "float32", "--compilers", "--csv", str(file), "--plot")
    done = run("benchmarks/gpu.py", *small, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["candidate"] for row in rows} == {"csp", "eager NCHW", "eager channels_last", "checkpointed"}
    assert {row["pass"] for row in rows} == {"forward", "backward", "step"} and len(rows) == 4 * 3
    for row in rows:
        assert row["agrees"] == "True" and float(row["median_ms"]) > 0
        assert (float(row["bytes"] or 0) > 0) == (row["candidate"] != "checkpointed") == bool(row["share_of_copy"])
    assert (tmp_path / "cpu-float32.png").stat().st_size > 1000


DRY = ("benchmarks/gpu.py", "--dry-run", "--operators", "post_dense_block", "--dtypes", "bfloat16")


@pytest.mark.usefixtures("native")
def test_dry_run_builds_every_launch() -> None:
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    done = run(*DRY)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.splitlines()
    assert table[0] == "dry run for sm_90: 1 cases, nothing was executed"
    assert {"mix._forward", "conv3x3._forward", "conv3x3._dgrad", "conv3x3._wgrad"} <= {
        line.split()[0] for line in table
    }
    assert re.fullmatch(r"\d\d+ builds for \d\d+ launches, \d+ s of compilation", table[-1])


TROUBLE = """
import sys
sys.path.insert(0, "benchmarks")
import gpu, gpu_dry_run
def fail(*_): raise RuntimeError("does not compile")
gpu_dry_run.benchmark_jobs = lambda *_: [("one", fail), ("same", fail), ("fine", lambda: None)]
gpu.why_not_triton = lambda: "no luck"
print([gpu.main(options) for options in ([], ["--dry-run"], ["--dry-run", "--target", "h100"])])
"""


@pytest.mark.usefixtures("native")
def test_trouble_is_told_and_no_success() -> None:
    """No GPU; a launch that cannot be built; a target that nobody knows."""
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    done = run("-c", TROUBLE)
    assert done.stdout.splitlines()[-1:] == ["[1, 1, 2]"], done.stdout + done.stderr
    first, second, third = done.stderr.splitlines()
    assert first == "no GPU benchmark: no luck; --dry-run compiles the kernels"
    assert second == "FAILED: one: RuntimeError: does not compile"
    assert third.startswith("--target: target: expected sm_<number>")
