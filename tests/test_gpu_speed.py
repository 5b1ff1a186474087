"""benchmarks/gpu_speed.py where there is no GPU: on the CPU, compiled only, and with candidates that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csp_kernels import winners

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_candidates
import gpu_cudnn
import gpu_report
import gpu_speed
import gpu_speed_cases
from gpu_steps import read

BENCHMARKS = Path(gpu_speed.__file__).parent
pytestmark = pytest.mark.usefixtures("quiet")
BLOCK = "dense_block, 2 layers"
FIELDS = {
    "kind", "operator", "case", "batch", "dtype", "mode", "candidate", "median_ms", "q1_ms", "q3_ms", "bytes", "flops",
    "gbs", "tflops", "share_of_copy", "share_of_matmul", "peak_bytes", "agrees",
}  # fmt: skip


@pytest.fixture
def quiet() -> Iterator[None]:
    """What the step sets for its process."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(read(folder / "speed.jsonl"))


def worker(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Does the step's work in this process."""
    assert gpu_speed.main(["--out", str(folder), "--device", "cpu", "--worker", *arguments]) == 0
    return lines_of(folder)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the program has written."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(BENCHMARKS / "gpu_speed.py"), "--out", str(folder), "--device", "cpu"]
    done = subprocess.run([*command, "--only", BLOCK], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_lines_are_whole_ceilings_first(recorded: Path) -> None:
    lines = lines_of(recorded)
    assert lines[-1] == {"left": []} and all(set(line) >= FIELDS for line in lines[:-1])
    assert [line["operator"] for line in lines[:5]] == ["copy", *["matmul"] * 4]
    assert lines[0]["gbs"] > 0 and all(line["tflops"] > 0 for line in lines[1:5])
    assert {line["dtype"] for line in lines[1:5]} == {"bfloat16", "float32", "tf32", "float16"}
    assert [line["dtype"] for line in lines[5:-1:]] == ["bfloat16"] * 6 + ["float32"] * 4


def test_candidates_are_right_and_timed(recorded: Path) -> None:
    timed = [line for line in lines_of(recorded) if line.get("kind") == "layer" and "cudnn" not in line["candidate"]]
    assert {line["candidate"] for line in timed} == {"eager channels_last", "csp native"} and len(timed) == 8
    ceilings = {(line["operator"], line["dtype"]): line for line in lines_of(recorded)[:5]}
    for line in timed:
        assert line["agrees"] is True and line["message"] is None
        assert 0 < line["q1_ms"] <= line["median_ms"] <= line["q3_ms"]
        assert line["gbs"] == pytest.approx(line["bytes"] / line["median_ms"] / 1e6)
        assert line["share_of_copy"] == pytest.approx(line["gbs"] / ceilings["copy", "bytes"]["gbs"])
        share = line["tflops"] / ceilings["matmul", line["dtype"]]["tflops"]
        assert line["share_of_matmul"] == pytest.approx(share)
        assert bool(line["saved_bytes"]) == (line["mode"] == "training")
    saved = {line["candidate"]: line["saved_bytes"] for line in timed if line["mode"] == "training"}
    assert saved["csp native"] < saved["eager channels_last"]


def test_flops_are_those_of_the_layers(recorded: Path) -> None:
    """2 layers of 16 channels, growth 8, bottlenecks of 32, on 2 x 14 x 14 pixels."""
    forward = 2 * 392 * (16 * 32 + 24 * 32 + 2 * 9 * 32 * 8)
    timed = [line for line in lines_of(recorded) if line.get("kind") == "layer" and line["flops"]]
    assert {(line["mode"], line["flops"]) for line in timed} == {("training", 3 * forward), ("inference", forward)}


@pytest.mark.skipif("cudnn" in sys.modules, reason="cuDNN's front end is here")
def test_what_is_not_installed_is_said(recorded: Path) -> None:
    said = [line for line in lines_of(recorded) if "cudnn" in str(line.get("candidate"))]
    assert len(said) == 2 and all("is not installed" in line["message"] for line in said)


@pytest.mark.parametrize("half", [False, True])
def test_a_recorded_folder_makes_a_report(half: bool, recorded: Path, tmp_path: Path) -> None:
    folder, document, table = tmp_path / "run", tmp_path / "performance.md", tmp_path / "winners.json"
    folder.mkdir()
    text = (recorded / "speed.jsonl").read_bytes()
    cut = text.index(b'"candidate": "csp native"', len(text) // 2) if half else len(text)  # in the midst of a line
    (folder / "speed.jsonl").write_bytes(text[:cut])
    (folder / "schedule.json").write_text(json.dumps({"device": "a CPU", "capability": [9, 0], "steps": []}))
    table.write_text("[]")
    before = winners.FILE
    try:
        assert gpu_report.main([str(folder), "--document", str(document), "--winners", str(table)]) == 0
    finally:
        winners.FILE = before
        winners.table.cache_clear()
    written = document.read_text()
    assert ("was cut short" in written) == half and written.count("dense_block: 2 layers") >= (2 if half else 4)
    assert {row["dtype"] for row in json.loads(table.read_text())} >= {"bfloat16"}


def test_a_wrong_candidate_is_reported_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = gpu_candidates.Scene.runner

    def wrong(self: Any, candidate: str) -> Any:
        made = runner(self, candidate)
        if candidate == "csp native":
            with torch.no_grad():
                next(made.module.parameters()).mul_(1.5)
        return made

    monkeypatch.setattr(gpu_candidates.Scene, "runner", wrong)
    lines = worker(tmp_path, "--only", BLOCK, "--dtypes", "float32")
    found = {(line["candidate"], line["mode"]): line for line in lines if line.get("kind") == "layer"}
    for mode in gpu_candidates.MODES:
        bad, good = found["csp native", mode], found["eager channels_last", mode]
        assert bad["agrees"] is False and bad["median_ms"] is None and "against float64" in bad["message"]
        assert good["agrees"] is True and good["median_ms"] > 0


def test_a_candidate_that_raises_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = gpu_candidates.Scene.runner

    def fail(self: Any, candidate: str) -> Any:
        if candidate == "eager channels_last":
            raise RuntimeError("no luck\nat all")
        return runner(self, candidate)

    monkeypatch.setattr(gpu_candidates.Scene, "runner", fail)
    lines = worker(tmp_path, "--only", BLOCK, "--dtypes", "float32")
    found = {(line["candidate"], line["mode"]): line for line in lines if line.get("kind") == "layer"}
    assert found["eager channels_last", "training"]["message"] == "RuntimeError: no luck"
    assert found["csp native", "training"]["agrees"] and found["csp native", "inference"]["agrees"]


def test_nan_is_wrong() -> None:
    scene = gpu_candidates.Scene(gpu_speed_cases.items("cpu")[0][0], "float32", "cpu")
    right = gpu_candidates.work(scene.runner("eager channels_last"), "training")()
    assert not scene.disagreement(right, "training")
    said = scene.disagreement([*right[:-1], right[-1] * float("nan")], "training")
    assert said.startswith(f"gradient {len(right) - 1} of {len(right) - 1} errs by nan") and said.endswith(
        "1 are wrong"
    )


def test_the_most_valuable_comes_first() -> None:
    tasks = list(gpu_speed_cases.tasks("cuda", ["csp native", "csp triton"]))
    assert len(set(map(str, tasks))) == len(tasks)
    assert [t.candidate for t in tasks[:3]] == ["eager channels_last", "csp native", "csp triton"]
    order = [(t.item.operator, t.dtype, t.candidate) for t in tasks]
    first = [order.index(key) for key in (
        ("dense_block", "bfloat16", "csp native"), ("csp_stage", "bfloat16", "csp native"),
        ("partial_transition", "bfloat16", "csp native"), ("concat_conv", "bfloat16", "csp native"),
        ("densenet121", "bfloat16", "csp native"), ("dense_block", "bfloat16", "compile channels_last"),
        ("dense_block", "float32", "csp native"), ("densenet121", "bfloat16", "compile channels_last"),
    )]  # fmt: skip
    assert first == sorted(first)
    blocks = {str(t.item.case.name) for t in tasks if t.item.operator == "dense_block" and t.dtype == "bfloat16"}
    assert len(blocks) == 4 and len(gpu_speed_cases.BLOCKS) == 5  # one shape with two batch sizes
    assert {t.item.operator for t in tasks if t.item.kind == "network"} == set(gpu_speed_cases.NETWORKS)


def test_dry_run_builds_every_launch(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    command = [sys.executable, str(BENCHMARKS / "gpu_speed.py"), "--out", str(tmp_path), "--dry-run"]
    chosen = ["--only", "concat_conv, 2 inputs of 64", "--dtypes", "bfloat16"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    line, end = lines_of(tmp_path)
    assert line["ok"] is True and line["operator"] == "concat_conv" and end == {"left": []}
    assert line["message"].startswith("compiled for sm_90, ") and " 0 builds" not in line["message"]


# --- cuDNN's graphs, on a stand-in for its front end ---


class Name:
    """A tensor of a graph: how it is computed from those that are given."""

    def __init__(self, value: Callable[[dict[Any, Tensor]], Tensor] | None = None) -> None:
        self.value = value

    def of(self, given: dict[Any, Tensor]) -> Tensor:
        return given[self] if self.value is None else self.value(given)

    def set_output(self, _: bool) -> Name:
        return self

    set_data_type = set_dim = set_stride = set_output


class Graph:
    """What benchmarks/gpu_cudnn.py uses of cudnn.pygraph, with its names."""

    def __init__(self, **_: Any) -> None:
        self.result = Name()

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any) -> Name:
        assert len(dim) == len(stride) == 4
        return Name()

    def mul(self, *, a: Name, b: Name, name: str) -> Name:
        return Name(lambda given: a.of(given) * b.of(given))

    def add(self, *, a: Name, b: Name, name: str) -> Name:
        return Name(lambda given: a.of(given) + b.of(given))

    def relu(self, *, input: Name, name: str) -> Name:
        return Name(lambda given: input.of(given).relu())

    def conv_fprop(
        self, *, image: Name, weight: Name, padding: list[int], stride: list[int], dilation: list[int], name: str
    ) -> Name:
        self.result = Name(
            lambda given: F.conv2d(image.of(given), weight.of(given), None, stride, padding, dilation)
        )  # fmt: skip
        return self.result

    def build(self, heuristics: list[Any]) -> None: ...

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensors: dict[Name, Tensor], workspace: Tensor, handle: Any) -> None:
        tensors[self.result].copy_(self.result.of({k: t for k, t in tensors.items() if k is not self.result}))


@pytest.mark.parametrize("candidate", gpu_speed_cases.CUDNN)
def test_cudnn_graphs_compute_the_block(candidate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = types.SimpleNamespace(BFLOAT16=0, HALF=1, FLOAT=2)
    front = types.SimpleNamespace(
        data_type=kinds, pygraph=Graph, heur_mode=types.SimpleNamespace(A=0, FALLBACK=1), create_handle=lambda: None,
        set_stream=lambda **_: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cudnn", front)
    scene = gpu_candidates.Scene(gpu_speed_cases.items("cpu")[0][0], "float32", "cpu")
    call = gpu_candidates.work(scene.runner(candidate), "inference")
    first, second = call(), call()
    assert not scene.disagreement(first, "inference") and not scene.disagreement(second, "inference")
    assert isinstance(scene.runner(candidate).call, gpu_cudnn.FusedGraphs)
