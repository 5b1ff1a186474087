"""benchmarks/gpu_report.py on invented lines of all steps; tests/test_gpu_speed.py makes one of recorded lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_report
import gpu_report_speed
from gpu_report_speed import COMPILED, EAGER, groups, merged, rows_of

from csp_kernels import winners

STEPS = [{"name": "speed", "status": "timed out", "seconds": 182.4, "limit": 180, "message": "ended at its limit"}]
SCHEDULE = {
    "device": "NVIDIA H100", "capability": [9, 0], "torch": "2.11.0", "triton": "3.6.0", "commit": "abc", "steps": STEPS
}  # fmt: skip
ABOUT = {"kind": "layer", "operator": "dense_block", "case": "12 layers", "batch": 64, "pixels": 50176, "channels": 128}
WORDS = {"build", "correctness", "speed", "tuning", "sanitizer", "counters"}


def line(candidate: str, ms: float, **other: Any) -> dict[str, Any]:
    """Of the speed step. The quartiles are 5 % away."""
    found = {"median_ms": ms, "q1_ms": 0.95 * ms, "q3_ms": 1.05 * ms, "agrees": True, "message": None}
    return {**ABOUT, "dtype": "bfloat16", "mode": "training", "candidate": candidate, **found, **other}


SPEED = [
    {"kind": "ceiling", "operator": "copy", "case": "1 GiB", "dtype": "bytes", "gbs": 3000.0, "tflops": None,
     "median_ms": 0.7},
    {"kind": "ceiling", "operator": "matmul", "case": "8192", "dtype": "bfloat16", "gbs": None, "tflops": 700.0,
     "median_ms": 1.6},
    line(EAGER, 8.0, saved_bytes=1000, peak_bytes=4000),
    line("csp native", 2.0, share_of_copy=0.5, share_of_matmul=0.25, saved_bytes=200, peak_bytes=1000),
    line("csp triton", 4.0),
    line(COMPILED, 3.0),
    line("csp native", 9.0, dtype="float32", agrees=False, median_ms=None, message="the output errs by 1.00e+00"),
    line("cudnn graph", 1.0, mode="inference", agrees=None, median_ms=None, message="not installed | no import"),
    {"left": ["densenet121, float32", "tf32"]},
]  # fmt: skip
OTHERS: dict[str, list[dict[str, Any]]] = {
    "build": [{"what": "library", "seconds": 60.0, "ok": False, "message": "nvcc is missing"}],
    "correctness": [
        {"family": "mix", "case": "a", "dtype": "float32", "backend": "triton", "pass": "training", "ok": True},
        {"family": "mix", "case": "b", "dtype": "float32", "backend": "triton", "pass": "training", "ok": False,
         "message": "gradient 3 is NaN"},
        {"family": "conv3x3", "case": "a", "dtype": "bfloat16", "backend": "native", "pass": "training", "ok": True},
        {"left": []},
    ],
    "tuning": [
        {"kernel": "mix.forward", "key": "('bf16', 64)", "tile": "wide", "median_ms": 3.0, "first": True,
         "winner": False},
        {"kernel": "mix.forward", "key": "('bf16', 64)", "tile": "narrow", "median_ms": 2.0, "first": False,
         "winner": True},
        {"kernel": "mix.dgrad", "key": "1", "tile": "wide", "median_ms": 1.0, "first": True, "winner": True},
        {"constant": "launch_ns", "value": 1800, "from": "an empty kernel"},
        {"constant": "launch_ns", "value": 1700, "from": "an empty kernel, again"},
        {"left": []},
    ],
    "sanitizer": [{"kernel": "mix", "tool": "memcheck", "ok": True, "message": ""}, {"left": []}],
    "counters": [{"kernel": "mix", "metric": "dram__bytes.sum", "value": 12, "unit": "Mbyte"}, {"left": []}],
}  # fmt: skip

Report = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """report(lines of steps, schedule, table of winners before): the document, and the table after."""
    monkeypatch.setattr(winners, "FILE", winners.FILE)  # main sets it
    monkeypatch.setattr(gpu_report.gpu_plot, "draw", lambda *_: [])

    def make(
        lines: Mapping[str, Sequence[Mapping[str, Any]]], schedule: Any = SCHEDULE, before: Sequence[Any] = ()
    ) -> tuple[str, list[dict[str, Any]]]:
        folder, document, table = tmp_path / "run", tmp_path / "performance.md", tmp_path / "winners.json"
        folder.mkdir()
        if schedule:
            (folder / "schedule.json").write_text(json.dumps(schedule))
        for step, found in lines.items():
            (folder / f"{step}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in found))
        table.write_text(json.dumps(list(before)))
        assert gpu_report.main([str(folder), "--document", str(document), "--winners", str(table)]) == 0
        return document.read_text(), json.loads(table.read_text())

    yield make
    winners.table.cache_clear()


def cells(document: str, start: str) -> list[str]:
    """Of the table's first row that begins so."""
    row = next(row for row in document.splitlines() if row.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_whole_run(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    document, rows = report({"speed": SPEED, **OTHERS})
    assert document.startswith("# Measured on NVIDIA H100\n") and "torch 2.11.0, triton 3.6.0, commit abc." in document
    assert cells(document, "speed | timed")[1:] == ["timed out", "182", "180", "ended at its limit"]
    assert cells(document, "copy")[3] == "3000" and cells(document, "matmul")[4] == "700.0"
    found = ["2.000", "4.000", "8.000", "3.000", "4.00", "1.50", "50 %", "25 %", "0.20", "0.25"]
    assert cells(document, "dense_block: 12 layers, batch 64")[1:] == found
    assert cells(document, "mix |")[1:] == ["", "1 of 2"] and cells(document, "conv3x3")[1:] == ["1 of 1", ""]
    assert "Of 2 choices 1 have another winner" in document and cells(document, "mix.forward")[-1] == "1.50"
    assert cells(document, "`launch_ns`")[1] == "1700" and "1 of 1 runs without a complaint" in document
    assert cells(document, "mix | dram")[2:] == ["12", "Mbyte"]
    assert "- speed, 2: densenet121, float32; tf32" in document and "- build: was cut short" in document
    assert "launch_ns = 1700  # an empty kernel, again" in capsys.readouterr().out
    assert len(rows) == 2


def test_what_failed_is_told_and_has_no_ratio(report: Report) -> None:
    document, _ = report({"speed": SPEED, **OTHERS})
    failed = document.split("## Failed")[1].split("\n## ")[0]
    assert "| build | library | nvcc is missing |" in failed
    assert "dense_block 12 layers 64 float32 training csp native | the output errs by 1.00e+00 |" in failed
    assert "correctness | mix b float32 triton training | gradient 3 is NaN |" in failed
    assert "cudnn graph | not installed \\| no import |" in failed and failed.count("\n| ") == 6
    assert "## Training, float32" not in document


def test_winners_of_a_run(report: Report) -> None:
    _, rows = report({"speed": SPEED})
    kind = {"family": "sm_90", "operator": "dense_block", "dtype": "bfloat16", "mode": "training"}
    compiled = {**kind, "caller": "compiled", "pixels": 7, "channels": 7, "native": 1.5}
    assert rows == [compiled, {**kind, "caller": "eager", "pixels": 7, "channels": 7, "native": 4.0, "triton": 2.0}]


@pytest.mark.parametrize(
    "ms, won",
    [(7.0, True), (7.5, False), (8.0, False), (9.0, False)],  # quartiles of 8: 7.6 to 8.4
)
def test_only_what_is_clearly_faster_wins(ms: float, won: bool) -> None:
    (row,) = rows_of(groups([line(EAGER, 8.0), line("csp triton", ms)]), "sm_90")
    assert ("triton" in row) == won and "native" not in row and row["caller"] == "eager"


def test_a_class_of_several_cases_has_the_least_ratio_and_who_won_all() -> None:
    both = [line(EAGER, 8.0), line("csp native", 2.0), line("csp triton", 4.0)]
    other = [dict(item, case="other", batch=32, pixels=25088) for item in both]
    other[1] |= {"median_ms": 4.0, "q3_ms": 4.2}
    other[2] |= {"q3_ms": 9.0}
    (row,) = rows_of(groups([*both, *other]), "sm_90")
    assert row["native"] == 2.0 and "triton" not in row


@pytest.mark.parametrize(
    "lines",
    [
        [line("csp native", 2.0)],
        [line(EAGER, 8.0)],
        [line(EAGER, 8.0, agrees=False), line("csp native", 2.0)],
        [line(EAGER, 8.0), line("csp native", 2.0, agrees=False)],
        [line(EAGER, 8.0), line("csp native", 2.0), line("csp native", 2.0, agrees=False, median_ms=None)],
        [line(name, 2.0, kind="network", operator="densenet121") for name in (EAGER, "csp native")],
    ],
    ids=["no reference", "nothing of ours", "wrong reference", "wrong", "wrong at last", "a network"],
)
def test_what_makes_no_row(lines: list[dict[str, Any]]) -> None:
    assert not rows_of(groups(lines), "sm_90")


def test_rows_of_other_runs_stay(report: Report) -> None:
    ours = {"family": "sm_90", "operator": "dense_block", "dtype": "bfloat16", "mode": "training", "caller": "eager"}
    old = {**ours, "pixels": 7, "channels": 7, "triton": 9.0}
    kept = [{**old, "family": "sm_80"}, {**old, "channels": 6}]
    _, rows = report({"speed": SPEED}, before=[old, *kept])
    assert old not in rows and all(row in rows for row in kept) and len(rows) == 4
    assert merged([old], [{**old, "triton": 1.0}]) == [{**old, "triton": 1.0}]


@pytest.mark.parametrize("lines", [{}, {"speed": []}, {"speed": SPEED[:1]}, {"correctness": OTHERS["correctness"][:1]}])
def test_half_a_run(lines: dict[str, Any], report: Report) -> None:
    """The schedule alone; a step that wrote nothing; one that was killed after its first line."""
    document, rows = report(lines)
    assert not rows and "# Measured on NVIDIA H100" in document and "## Ceilings" in document
    told = document.split("## Left")[1]
    assert {word for word in WORDS if f"- {word}: " in told} == WORDS
    assert ("cut short" in told) == any(lines.values())


def test_without_a_schedule(report: Report) -> None:
    document, rows = report({"speed": SPEED}, schedule=None)
    assert "# Measured on an unknown device" in document and "No step has ended." in document and not rows


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([str(tmp_path), "--document", str(tmp_path / "document.md")]) == 2
    assert "got no schedule.json and no step's .jsonl" in capsys.readouterr().err
    assert not (tmp_path / "document.md").exists()


def test_a_cpu_changes_no_winners(report: Report) -> None:
    _, rows = report({"speed": SPEED}, schedule={**SCHEDULE, "capability": None})
    assert not rows


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = gpu_report.gpu_plot.draw
    names = draw(groups(SPEED), "H100", tmp_path / "performance.md")
    assert names == ["performance-bfloat16-training.png"] and (tmp_path / names[0]).stat().st_size > 1000
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not draw(groups(SPEED), "H100", tmp_path / "performance.md")


def test_the_report_knows_the_candidates_by_name() -> None:
    import gpu_speed_cases

    assert (EAGER, COMPILED) == (gpu_speed_cases.EAGER, gpu_speed_cases.COMPILED)
    assert tuple(f"csp {name}" for name in winners.BACKENDS) == gpu_report_speed.OURS
