"""The operators on CUDA tensors: by the Triton kernels, and where the library has CUDA kernels also by
the two together. `make test`, which must pass without a GPU, leaves them out;
`make gpu` runs them. `pytest tests/gpu --device cpu` runs the same bodies by the C++ operators: they still fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `gpu_cases`; tests/conftest.py does the same

import cases

import csp_kernels as csp
from csp_kernels.backends import why_not_cuda, why_not_triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cuda", help="of the tests in tests/gpu")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and why_not_triton() and not config.getoption("--collect-only"):
        raise pytest.UsageError(
            f"tests/gpu need a GPU: {why_not_triton()}. `make gpu` then compiles the kernels without running them; "
            "`pytest tests/gpu --device cpu` runs the same tests by the C++ operators"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--device") == "cpu":
        backends = ["native"]
    elif why_not_cuda():
        backends = ["triton"]
    else:
        backends = ["triton", "native"]
    metafunc.parametrize("backend", backends)


@pytest.fixture(autouse=True)
def device(
    settings: None, backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Name of the device that tensors are on by default; the backend is chosen, TF32 off."""
    name: str = request.config.getoption("--device")
    plain = cases.grads

    def grads(case: cases.Case, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.device("cpu"):  # where its generator is
            return [g.to(name) for g in plain(case, outputs)]

    monkeypatch.setattr(cases, "grads", grads)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # in the reference
    csp.use_backend(backend)
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)


@pytest.fixture
def cuda(device: str) -> None:
    if device != "cuda":
        pytest.skip("about streams, graphs and memory of a GPU")
