"""The kernels of csrc/cuda, compiled once a session for the host."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulator


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("emulation")
    return cache(lambda kind: emulator.build(directory, kind))


@pytest.fixture(scope="session")
def runner(build: Callable[[str], Path]) -> Path:
    return build("plain")
