"""Choosing a backend, the report, the command line, and a package without its library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import csp_kernels as csp
from csp_kernels import native as library
from csp_kernels import winners
from csp_kernels.__main__ import main
from csp_kernels._tracing import constant_when_traced
from csp_kernels.backends import _find_triton, resolve, selected, why_not_cuda, why_not_triton

OPERATORS = ["stage", "stage_backward"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_library_is_loaded() -> None:
    assert library.available(), library.why_not()
    assert library.why_not() == "" and library.isa() in library.isas()


def test_report() -> None:
    report = csp.backends()
    assert list(report) == ["auto", "native", "triton", "reference"]
    assert report["native"].available and library.isa() in report["native"].reason
    assert report["triton"].available == (not why_not_triton()) and report["triton"].reason
    assert report["reference"].available
    assert all(name in str(report) for name in report)


@pytest.mark.parametrize("gpu, measured", [(False, False), (True, False), (True, True)], ids=str)
def test_report_says_what_auto_does_and_why(gpu: bool, measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = sys.modules["csp_kernels.backends"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("csp_kernels.winners.family", lambda device: "sm_90")
    row = {winners.Kind("sm_90", "dense_block", "bfloat16", "training", "eager"): {(7, 7): ("native",), (6, 8): ()}}
    monkeypatch.setattr("csp_kernels.winners.table", lambda: row if measured else {})
    if gpu:
        monkeypatch.setattr(backends, "_WHY_NOT_TRITON", "")
    reason = backends._auto()
    assert reason.startswith("CPU: native; ")
    if not gpu:
        assert reason == "CPU: native; no GPU here" == csp.backends()["auto"].reason
    elif not measured:
        assert "GPU: reference: nothing has been measured on sm_90" in reason
    else:
        assert "GPU: on sm_90 native or triton for 1 of 2 measured classes of calls" in reason
    monkeypatch.setattr(backends, "_WHY_NOT_TRITON", "triton is too old")
    assert gpu == ("GPU: reference: triton is too old" in backends._auto())


def test_setter_and_context_manager() -> None:
    csp.use_backend("reference")
    assert selected() == "reference" and resolve("cpu") == "reference"
    with csp.use_backend("native"):
        assert resolve("cpu") == "native"
        with csp.use_backend("auto"):
            assert resolve("cpu") == "native" and resolve("cuda") == "reference"
        assert selected() == "native"
    assert selected() == "reference"
    with pytest.raises(KeyError), csp.use_backend("native"):
        raise KeyError
    assert selected() == "reference"


def test_refused_choices_change_nothing() -> None:
    csp.use_backend("reference")
    with pytest.raises(ValueError, match="name: got 'cuda', expected one of auto, native, triton, reference"):
        csp.use_backend("cuda")
    assert selected() == "reference"


@needs_no_gpu
def test_triton_needs_a_gpu() -> None:
    csp.use_backend("reference")
    with pytest.raises(RuntimeError, match=r"'triton' is not available: .*finds no GPU; choose 'native'"):
        csp.use_backend("triton")
    assert selected() == "reference" and "finds no GPU" in csp.backends()["triton"].reason
    for name in OPERATORS:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"csp_kernels::{name}", "CUDA")


def test_triton_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["csp_kernels.backends"], "_WHY_NOT_TRITON", "")  # csp.backends is a function
    with csp.use_backend("auto"):
        assert resolve("cuda") == "reference"  # has to be asked for
        assert resolve("cpu") == "native" and resolve("xpu") == "reference"
    with csp.use_backend("triton"):
        assert resolve("cuda") == "triton"
        with pytest.raises(RuntimeError, match="'triton': got tensors on 'cpu', expected 'cuda'; choose backend"):
            resolve("cpu")


@pytest.mark.parametrize("missing", ["", "library", "triton", "version"])
def test_why_triton_cannot_run(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("csp_kernels.native._WHY_NOT", "no library; make build" if missing == "library" else "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if missing == "triton" else name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.5.1" if missing == "version" else "3.10.0+git")
    reasons = {
        "": "",
        "library": "no library; make build",
        "triton": "triton is not installed; `pip install 'triton>=3.6'`, or choose 'reference'",
        "version": "triton 3.5.1 is too old; `pip install 'triton>=3.6'`, or choose 'reference'",
    }
    assert _find_triton() == reasons[missing]


def test_native_runs_on_the_cpu_and_on_a_gpu_it_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    csp.use_backend("native")
    with pytest.raises(RuntimeError, match="got tensors on 'xpu', expected 'cpu' or 'cuda'"):
        resolve("xpu")
    monkeypatch.setattr(sys.modules["csp_kernels.backends"], "why_not_cuda", lambda: "no luck")
    with pytest.raises(RuntimeError, match="'native' is not available on 'cuda': no luck"):
        resolve("cuda")
    monkeypatch.setattr("csp_kernels.native.cuda_architectures", lambda: [80])
    assert "GPU: CUDA C++ for sm_80; no luck" in csp.backends()["native"].reason and resolve("cpu") == "native"
    monkeypatch.setattr(sys.modules["csp_kernels.backends"], "why_not_cuda", lambda: "")
    assert resolve("cuda") == "native" and "sm_80, 3x3 of layers" in csp.backends()["native"].reason


@pytest.mark.parametrize(
    "compiled, here, error, reason",
    [
        ([80, 90], (9, 0), "", ""),
        ([80, 90], (9, 0), "old driver", "CUDA kernels: old driver; rebuild with a CUDA that the driver supports"),
        ([80, 90], (8, 6), "", ""),  # machine code of the same generation, an earlier one of it
        ([80, 90], (12, 0), "", ""),  # PTX of the latest
        ([86, 90], (8, 0), "", "compiled for [86, 90], not for 80; rebuild with CSP_KERNELS_CUDA_ARCHS=80"),
        ([90], (8, 0), "", "compiled for [90], not for 80; rebuild with CSP_KERNELS_CUDA_ARCHS=80"),
        ([], (9, 0), "", "built without CUDA kernels; rebuild where nvcc is on PATH"),
    ],
)
def test_why_cuda_cannot_run(
    compiled: list[int], here: tuple[int, int], error: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["csp_kernels.backends"], "_WHY_NOT_TRITON", "")
    monkeypatch.setattr("csp_kernels.native.cuda_architectures", lambda: compiled)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: here)
    monkeypatch.setattr("csp_kernels.native.cuda_error", lambda: error)
    got = why_not_cuda.__wrapped__()
    assert (reason in got) if reason else not got


def test_backends_agree() -> None:
    block, x = csp.DenseBlock(2, 8, 4), torch.randn(2, 8, 5, 5)
    outputs = []
    for name in ("auto", "native", "reference"):
        with csp.use_backend(name):
            outputs.append(block(x))
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[2])


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (csp.__version__, torch.__version__, library.isa(), str(csp.backends())):
        assert text in printed


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "info" in capsys.readouterr().err


def test_bench_outside_the_source_tree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("csp_kernels.__main__.BENCH", tmp_path / "nothing.py")
    assert main(["bench", "--help"]) == 1
    assert "run it from the source tree" in capsys.readouterr().err


def run_python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(csp.__file__).parents[1] if path is None else path
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=root)


def test_environment_variable() -> None:
    code = "import csp_kernels.backends as b, sys; print(sys.modules['csp_kernels.backends'].selected())"
    assert run_python(code, CSP_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    bad = run_python("import csp_kernels", CSP_KERNELS_BACKEND="fast")
    assert bad.returncode != 0 and "CSP_KERNELS_BACKEND: got 'fast', expected one of auto" in bad.stderr


REGISTERED = """
import sys, torch
torch.cuda.is_available = lambda: True
import csp_kernels
from csp_kernels.backends import resolve
print(*(torch._C._dispatch_has_kernel_for_dispatch_key("csp_kernels::" + name, "CUDA") for name in sys.argv[1:]))
print(resolve("cuda"), "csp_kernels.kernels" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
def test_kernels_are_registered_but_not_imported() -> None:
    """A kernel is compiled or interpreted as the environment says when it is imported."""
    done = run_python(f"import sys; sys.argv[1:] = {OPERATORS}\n{REGISTERED}")
    assert done.stdout.split() == [*["True"] * len(OPERATORS), "reference", "False"], done.stderr


def test_torch_compile_is_not_imported() -> None:
    """It took longer than all else that `import csp_kernels` adds to torch."""
    done = run_python("import sys, csp_kernels; print('torch._dynamo' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr


def test_the_mark_is_torch_compilers() -> None:
    def mine() -> None: ...

    def theirs() -> None: ...

    assert vars(constant_when_traced(mine)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


WITHOUT = """
import torch, csp_kernels as csp
y = csp.DenseBlock(2, 8, 4)(torch.randn(2, 8, 5, 5))
y.sum().backward()
print(csp.backends())
try:
    csp.use_backend("native")
except RuntimeError as error:
    print("refused:", error)
"""


def test_works_without_the_library(tmp_path: Path) -> None:
    """Reference backend and exactly one warning, which names the fix."""
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(Path(csp.__file__).parent, tmp_path / "csp_kernels", ignore=ignore)
    done = run_python(WITHOUT, tmp_path, CSP_KERNELS_BACKEND="")
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning: csp_kernels" in line]
    assert len(warned) == 1 and "pip install ." in warned[0] and "make build" in warned[0]
    assert "refused: backend 'native' is not available" in done.stdout and "native     no" in done.stdout


def test_says_why_a_broken_library_does_not_load(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(Path(csp.__file__).parent, tmp_path / "csp_kernels", ignore=ignore)
    (tmp_path / "csp_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    done = run_python(WITHOUT, tmp_path, CSP_KERNELS_BACKEND="")
    assert done.returncode == 0 and "does not load with torch" in done.stderr
