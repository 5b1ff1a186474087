"""What setup.py builds, without building it: CUDA where it is of use, objects that builds share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

import csp_kernels as csp

ROOT = Path(__file__).resolve().parents[1]
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "release 13.0, V13.0.1";;
  --list-gpu-arch) echo compute_80; echo compute_90; echo compute_100;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """setup.py as a module, in an environment without CSP_KERNELS_*."""
    for name in [name for name in os.environ if name.startswith("CSP_KERNELS_") or name in ("NVCC", "CUDA_HOME")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("csp_kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that answers questions."""
    file = tmp_path / "nvcc"
    file.write_text(NVCC)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return file


def gpus(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, int]) -> None:
    """torch finds these, by their compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device])
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize(
    ("gpu", "environment", "expected"),
    [
        (False, {}, "skips CUDA: torch finds no GPU here; CSP_KERNELS_CUDA=1 compiles for other machines"),
        (False, {"CSP_KERNELS_CUDA": "1"}, ("80", "90", "100")),
        (False, {"CSP_KERNELS_CUDA_ARCHS": "9.0"}, ("90",)),
        (False, {"CSP_KERNELS_CUDA": "0", "CSP_KERNELS_CUDA_ARCHS": "90"}, "skips CUDA: CSP_KERNELS_CUDA=0"),
        (True, {}, ("90",)),  # that of the GPU alone
        (True, {"CSP_KERNELS_CUDA": "1"}, ("80", "90", "100")),
        (True, {"CSP_KERNELS_CUDA_ARCHS": "80"}, ("80",)),
        (True, {"CSP_KERNELS_CUDA": "0"}, "skips CUDA: CSP_KERNELS_CUDA=0"),
    ],
)
def test_cuda_is_compiled_where_it_is_of_use(
    build: Any,
    nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpu: bool,
    environment: dict[str, str],
    expected: str | tuple[str, ...],
) -> None:
    """One line says why not."""
    gpus(monkeypatch, *[(9, 0), (9, 0)] if gpu else [])
    for name, value in {"NVCC": str(nvcc), **environment}.items():
        monkeypatch.setenv(name, value)
    cuda = build.find_cuda()
    said = capsys.readouterr().err
    if isinstance(expected, str):
        assert cuda is None and said == f"csp_kernels: {expected}\n"
    else:
        assert cuda.architectures == expected and not said


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        ([(8, 0), (10, 0)], ("80", "100"), ""),
        ([(8, 9)], ("80",), "csp_kernels: builds for sm_80 instead of sm_89, which {} does not know\n"),
        ([(7, 5)], None, "csp_kernels: skips CUDA: a GPU here is sm_75, and the kernels need sm_80 or later\n"),
    ],
)
def test_cuda_is_compiled_for_the_gpus_that_are_there(
    build: Any,
    nvcc: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: list[tuple[int, int]],
    expected: tuple[str, ...] | None,
    said: str,
) -> None:
    """All of them; a GPU that nvcc is too old for, and one that the kernels are too new for."""
    monkeypatch.setenv("NVCC", str(nvcc))
    gpus(monkeypatch, *found)
    cuda = build.find_cuda()
    assert (cuda and cuda.architectures) == expected and capsys.readouterr().err == said.format(nvcc)


def test_asked_for_cuda_without_nvcc(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSP_KERNELS_CUDA", "1")
    monkeypatch.setenv("NVCC", "no_such_compiler")
    with pytest.raises(SystemExit, match="CSP_KERNELS_CUDA=1, but no_such_compiler is not found"):
        build.find_cuda()


def commands(build: Any, isas: str, cuda: Any = None) -> dict[str, Any]:
    """Object -> how it is made."""
    flags = {name: build.X86_ISAS[name] for name in isas.split()}
    return {job.object.name: (job.compiler, job.flags) for job in build.plan(["c++"], flags, Path("torch"), cuda)}


def test_builds_share_objects(build: Any) -> None:
    """More instruction sets or CUDA add objects and change none: what is compiled stays compiled."""
    one, every = commands(build, "v3"), commands(build, "baseline v3 v4")
    kernels = {name: how for name, how in one.items() if ".of." not in name}
    assert len(kernels) == len(list((ROOT / "csrc" / "cpu").glob("*.cpp")))
    assert kernels.items() <= every.items()
    assert not {name for name in one if ".of." in name} & {*every}  # these know which sets there are
    cuda = build.Cuda("nvcc", "13", ("90",), ())
    with_cuda = commands(build, "v3", cuda)
    assert {name for name, how in one.items() if with_cuda.get(name) != how} == {"library.of.v3.o"}
    assert "library.of.v3.cuda.o" in with_cuda


def test_long_compilations_start_first(build: Any) -> None:
    jobs = build.plan(["c++"], {"v3": []}, Path("torch"), build.Cuda("nvcc", "13", ("90",), ()))
    first = [job.source.name for job in sorted(jobs, key=build.duration, reverse=True)]
    cuda = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert all(name.endswith(".cu") for name in first[:cuda])
    assert first[cuda : cuda + len(build.SLOWEST)] == [f"{name}.cpp" for name in build.SLOWEST]


def test_native_is_what_the_library_picks(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """csrc/cpu/isa.h and setup.py agree on what this machine can run."""
    monkeypatch.delenv("CSP_KERNELS_ISA", raising=False)
    compiler = build.find_compiler()
    compiled = csp.native.isas()
    best = build.native_instruction_set(compiler, reversed(compiled))
    assert compiled and best == csp.native.isa()
    monkeypatch.setenv("CSP_KERNELS_ISAS", "native")
    assert {*build.instruction_sets(compiler)} == {best} | {build.NEEDS.get(best, best)}


def test_unknown_instruction_set(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSP_KERNELS_ISAS", "v5")
    with pytest.raises(SystemExit, match="CSP_KERNELS_ISAS: got v5, expected some of baseline"):
        build.instruction_sets(build.find_compiler())
