"""benchmarks/gpu_correctness.py without a GPU: by the C++ operators, with faults planted, and a dry run."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_checks
from gpu_checks import INSTRUCTIONS, Check, Table

from csp_kernels.stage import program

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"family", "case", "dtype", "backend", "pass", "errors", "allowed", "ok", "message"}


def run(script: Path, out: Path, *more: str) -> tuple[int, list[dict[str, Any]], list[str], str]:
    """Exit status, lines of checks, what was left, stderr."""
    command = [sys.executable, str(script), "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *lines, last = (json.loads(line) for line in (out / "correctness.jsonl").read_text().splitlines())
    return done.returncode, lines, last["left"], done.stderr


@pytest.mark.usefixtures("native")
def test_on_the_cpu(tmp_path: Path) -> None:
    more = "--device", "cpu", "--only", "alone", "--kinds", "float32", "tf32"
    status, lines, left, stderr = run(ROOT / "benchmarks" / "gpu_correctness.py", tmp_path, *more)
    assert status == 0 and not left, stderr
    assert {line["family"] for line in lines} == set(INSTRUCTIONS)
    assert {line["dtype"] for line in lines} == {"float32", "tf32"}
    assert {line["pass"] for line in lines} == {"training", "inference"} and len(lines) == 4 * len(INSTRUCTIONS)
    for line in lines:
        assert set(line) == FIELDS and line["ok"] and line["backend"] == "native"
        assert line["errors"] and all(e <= a for e, a in zip(line["errors"], line["allowed"], strict=True))


PLANTED = """
import os, sys, time
sys.path.insert(0, "benchmarks")
import gpu_correctness, gpu_checks
gpu_correctness.__file__ = __file__  # what workers start
gpu_correctness.JOB_LIMIT = 8
right = gpu_checks.Check.run

def wrong(check, device):
    if check.family == "Copy": raise RuntimeError("planted")
    if check.family == "Measure": os._exit(3)
    if check.family == "Fill": time.sleep(60)
    if check.family != "Product": return right(check, device)
    infer, gpu_checks.stage_cases.infer = gpu_checks.stage_cases.infer, lambda *a: [y + 1 for y in infer(*a)]
    try: return right(check, device)
    finally: gpu_checks.stage_cases.infer = infer

gpu_checks.Check.run = wrong
sys.exit(gpu_correctness.main())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    """An exception, a process that dies, one that hangs, wrong numbers."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    more = "--device", "cpu", "--only", "alone, bfloat16, native, inference"
    status, lines, left, stderr = run(script, tmp_path / "out", *more)
    found = {line["family"]: line for line in lines}
    assert status == 1 and not left and len(lines) == len(found) == len(INSTRUCTIONS), stderr
    bad = {name: line["message"] for name, line in found.items() if not line["ok"]}
    assert bad.keys() == {"Copy", "Measure", "Fill", "Product"}
    assert bad["Copy"] == "RuntimeError: planted" and bad["Measure"] == "exit status 3"
    assert "killed" in bad["Fill"] and re.fullmatch(r"0: \d\.\de[+-]\d\d, allowed \d.*", bad["Product"])
    assert all(line["errors"] for name, line in found.items() if name not in ("Copy", "Measure", "Fill"))


SLOW = """
import sys, time
sys.path.insert(0, "benchmarks")
import gpu_correctness, gpu_checks
gpu_correctness.__file__ = __file__
right = gpu_checks.Check.run
gpu_checks.Check.run = lambda *given: (time.sleep(0.5), right(*given))[1]
sys.exit(gpu_correctness.main())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_stops_at_its_limit(tmp_path: Path) -> None:
    """What it did not come to is its last line; the first checks are those of whole layers."""
    (tmp_path / "slow.py").write_text(SLOW)
    start = time.monotonic()
    status, lines, left, stderr = run(tmp_path / "slow.py", tmp_path / "out", "--device", "cpu", "--limit", "20")
    assert time.monotonic() - start < 20 + 8
    checks = Table("cpu", False).checks()
    assert status in (0, 1) and left and len(lines) + len(left) == len(checks), stderr
    assert left == [str(check) for check in checks[len(lines) :]] and all(line["ok"] for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_dry_run_compiles_and_runs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    more = "--dry-run", "--device", "cpu"
    status, lines, left, stderr = run(ROOT / "benchmarks" / "gpu_correctness.py", tmp_path, *more)
    assert status == 0 and not left and [line["family"] for line in lines] == [*gpu_checks.FAMILIES], stderr
    assert all(line["ok"] and not line["errors"] and line["backend"] == "triton" for line in lines)
    builds = [re.fullmatch(r"compiled for sm_90, (\d+) builds in .* s; not run", line["message"]) for line in lines]
    assert all(builds) and sum(int(b[1]) for b in builds if b) >= 15


# --- nothing is forgotten ---


def test_every_instruction_has_a_check() -> None:
    known = {step.__name__ for step in get_args(program.Backward)}
    on_a_cpu_alone = {"Maximum", "MaximumBackward"}
    assert set(INSTRUCTIONS) == known - on_a_cpu_alone
    for check in Table("cuda", False).checks(["bfloat16"]):
        if check.name == "alone" and check.training == (check.family != "Bottleneck"):
            steps = check.program.forward + check.program.backward
            assert check.family in {type(step).__name__ for step in steps}, check.family


def test_every_kernel_is_launched() -> None:
    """Of those that csp_kernels.kernels launches, by the layers and the small graphs alone."""
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    from triton.runtime.jit import JITFunction

    from csp_kernels.kernels import launch

    names = ("mix", "conv3x3", "activate", "elementwise", "statistics", "norm", "stage_norms")
    modules = [importlib.import_module(f"csp_kernels.kernels.{name}") for name in names]
    launched = {f"{m.__name__}.{n}" for m in modules for n in re.findall(r"(\w+)\[\(", Path(m.__file__).read_text())}
    assert len(launched) >= 16
    found: set[str] = set()
    table = Table("cuda", False)
    with (
        patch.object(JITFunction, "run", lambda self, *_, **__: found.add(f"{self.__module__}.{self.__name__}")),
        patch.object(launch, "architecture", lambda _: 90),
    ):
        for kind in ("bfloat16", "float32"):
            for check in (*table.layers(kind), *table.small(kind)):
                check.launch()
    assert found == launched


def test_names_are_unique_and_cuda_is_checked_where_it_is() -> None:
    with_cuda, without = (Table("cuda", there).checks() for there in (True, False))
    assert len({str(check) for check in with_cuda}) == len(with_cuda)
    assert all(check.backend == "triton" for check in without)
    extra = [check for check in with_cuda if check.backend == "native"]
    assert {check.kind for check in extra} == {"bfloat16", "float32", "tf32", "float16"}
    assert {check.takes for check in extra} == {gpu_checks.CONVOLUTIONS, ("layer",)}
    assert all(check.family == "dense_block" for check in with_cuda[:2])


def test_cuda_that_does_not_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton takes a layer that CUDA C++ was to take."""
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    check = next(c for c in Table("cuda", True).checks(["float32"]) if c.takes)
    monkeypatch.setattr(gpu_checks.stage_cases, "judged", lambda *_: ([0.0], [1.0]))
    line = Check.run(check, "cuda")
    assert not line["ok"] and "dgrad of CUDA C++ did not run" in line["message"]


def test_tf32_twin() -> None:
    """Ten bits of each fraction, forward and backward; nothing of float64."""
    import tf32

    x = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, -1 - 2.0**-11], dtype=torch.float32)
    assert tf32.cut(x).tolist() == [1 + 2.0**-10, 1.0, -1.0] and torch.equal(tf32.cut(x.double()), x.double())
    image, bias = torch.randn(2, 8, 5, 4), torch.randn(6)
    for stride, groups in ((1, 1), (2, 1), (1, 2)):
        weight = torch.randn(6, 8 // groups, 3, 3)
        results = []
        for inside in (False, True):
            leaves = [t.clone().requires_grad_() for t in (image, weight, bias)]
            with tf32.truncated() if inside else nullcontext():
                y = torch.nn.functional.conv2d(*leaves, stride=stride, padding=1, groups=groups)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for exact, cut in zip(*results, strict=True):
            assert 1e-5 < ((cut - exact).norm() / exact.norm()).item() < 3e-3


def test_shares_of_what_is_compiled_are_all_of_it() -> None:
    """Each launch is of one share, whatever is compiled already."""
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    from csp_kernels.kernels import activate
    from csp_kernels.kernels.dry_run import dry_run
    from csp_kernels.kernels.launch import Geometry

    z, out = torch.empty(20, 16), torch.empty(20, 16)

    def compiled(share: tuple[int, int]) -> list[int]:
        activate._forward.device_caches.clear()  # as in another process
        with dry_run("sm_90", share=share) as launches:
            for code in range(6):
                activate.forward(z, None, out, Geometry(1, 4, 5), activate.Activation(code, 0.1))
        return [launch.constants["ACT"] for launch in launches]

    first, second = compiled((0, 2)), compiled((1, 2))
    assert first and second and sorted(first + second) == compiled((0, 1)) == list(range(6))
    assert compiled((0, 2)) == first
