"""Every test: fixed seed, NaN in uninitialised memory, process-wide settings restored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `tolerances`

import sampling

import csp_kernels as csp
from csp_kernels.backends import selected


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    sampling.mark_the_many(items, tests)
    # the long files first, whose tests are processes of their own: run last, one process would be left alone with them
    items.sort(key=lambda item: item.path.parent not in (tests, tests / "kernels"))


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    torch.manual_seed(0)
    previous = selected()
    yield
    csp.use_backend(previous)
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: their maximum), also in the C++ operators, which use the dispatcher."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The longest sums a task can have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """More than one task."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native() -> None:
    """Force the compiled operators; fails with the fix if they are missing."""
    csp.use_backend("native")
