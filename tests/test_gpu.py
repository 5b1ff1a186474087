"""tests/gpu, which need a GPU, still fit: parts by the C++ operators."""

from __future__ import annotations

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
