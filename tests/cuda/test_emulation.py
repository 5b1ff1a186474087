"""The emulation itself: what it computes, and the mistakes that it must notice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulator
import pytest


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(tmp_path_factory.mktemp("checks"), "plain", program="emulation_checks.cpp")


@pytest.mark.parametrize("name", ["product", "conflicts", "schedules", "copies", "rounding"])
def test_right(checks: Path, name: str) -> None:
    done = subprocess.run([checks, name], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name, message",
    [
        ("barrier", "threads wait at a barrier that others have left without"),
        ("outside", "address outside shared memory"),
        ("misaligned", "misaligned address in shared memory"),
        ("lanes", "the lanes of a warp differ"),
    ],
)
def test_noticed(checks: Path, name: str, message: str) -> None:
    done = subprocess.run([checks, name], text=True, capture_output=True, check=False)
    assert done.returncode == 3 and message in done.stderr
