"""The kernels of csrc/cuda, compiled once a session for the host, in whichever process of pytest-xdist is first."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulator


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return once_a_session(tmp_path_factory, "emulation", emulator.build)


def once_a_session(
    factory: pytest.TempPathFactory, folder: str, build: Callable[[Path, str], Path]
) -> Callable[[str], Path]:
    """build(directory, kind), in a directory that the processes of a session share."""
    shared = factory.getbasetemp()
    directory = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / folder
    directory.mkdir(exist_ok=True)

    @cache
    def built(kind: str) -> Path:
        done = directory / f"{kind}.done"
        with (directory / f"{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not done.exists():
                done.write_text(str(build(directory, kind)))
        return Path(done.read_text())

    return built


@pytest.fixture(scope="session")
def runner(build: Callable[[str], Path]) -> Path:
    return build("plain")
