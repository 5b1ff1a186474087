"""The GPU schedule without a GPU: limits, crashes and kills of steps and of their workers, and the whole of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_schedule
import gpu_steps
from gpu_machine import Machine
from gpu_schedule import Plan, run_step
from gpu_steps import Deadline, Results

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
MACHINE = Machine("toy", None, "2", None)


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return list(gpu_steps.read(path))


def programs(folder: Path, **bodies: str) -> Path:
    """gpu_<step>.py of each body, with args and results at hand."""
    for step, body in bodies.items():
        head = f"import os, subprocess, sys, time\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport gpu_steps\n"
        head += f"args = gpu_steps.parse('')\nresults = gpu_steps.Results(args.out, {step!r})\n"
        (folder / f"gpu_{step}.py").write_text(head + body)
    return folder


# --- steps ---

HANGS = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
results.write({"child": child.pid})
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; somebody may not have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    programs(tmp_path, speed=HANGS)
    command = [sys.executable, str(tmp_path / "gpu_speed.py"), "--out", str(tmp_path)]
    before = time.monotonic()
    outcome = run_step("speed", command, 1.5, tmp_path, grace=0.5)
    assert (outcome.status, outcome.message) == ("timed out", "killed after 1.5 + 0.5 s")
    assert 2 <= time.monotonic() - before < 10
    (line,) = lines(tmp_path / "speed.jsonl")
    limit = Deadline(5)
    while not gone(line["child"]) and not limit.over():
        time.sleep(0.01)
    assert gone(line["child"])


def test_outcomes_are_on_disk_before_the_next_step_begins(tmp_path: Path) -> None:
    """One that crashes, one that fails, one that can do nothing; the last sees what the others came to."""
    look = (
        "print((args.out / 'schedule.json').read_text()); results.write({'device': args.device, 'dry': args.dry_run})"
    )
    programs(
        tmp_path,
        build="results.write({'one': 1}); os.abort()",
        correctness="print('no luck'); sys.exit(1)",
        speed="print('no such tool'); sys.exit(gpu_steps.SKIPPED)",
        tuning=look,
    )
    steps, out = dict.fromkeys(("build", "correctness", "speed", "tuning"), 20.0), tmp_path / "out"
    outcomes = gpu_schedule.run(Plan(steps, out, "cpu", True, programs=tmp_path), MACHINE)
    expected = [("failed", "killed by SIGABRT; see build.log"), ("failed", "no luck"), ("skipped", "no such tool")]
    assert [(o.status, o.message) for o in outcomes] == [*expected, ("ok", "")]
    assert lines(out / "build.jsonl") == [{"one": 1}]
    assert lines(out / "tuning.jsonl") == [{"device": "cpu", "dry": True}]
    seen, final = (json.loads(text) for text in ((out / f).read_text() for f in ("tuning.log", "schedule.json")))
    assert [step["name"] for step in seen["steps"]] == ["build", "correctness", "speed"]
    assert seen["steps"] == final["steps"][:3] and len(final["steps"]) == 4
    assert final["device"] == "toy" and final["torch"] == "2" and final["capability"] is None
    assert {*final["steps"][0]} == {"name", "status", "seconds", "limit", "message"}


def test_steps_share_the_time_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second gets what is left, the third nothing."""
    monkeypatch.setattr(gpu_schedule, "GRACE", 0.2)
    monkeypatch.setattr(gpu_schedule, "LEAST", 0.5)
    programs(tmp_path, build="time.sleep(0.3)", speed="time.sleep(60)", tuning="")
    plan = Plan({"build": 50.0, "speed": 50.0, "tuning": 50.0}, tmp_path, "cpu", total=3.0, programs=tmp_path)
    first, second, third = gpu_schedule.run(plan, MACHINE)
    assert first.status == "ok" and first.limit <= 2.8
    assert second.status == "timed out" and 0.5 <= second.limit < 2.6
    assert (third.status, third.message) == ("skipped", "3 s for all steps are over")


def test_a_later_run_continues_and_another_commit_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, build="results.write({'n': 1})", speed="results.write({'n': 2})")
    out = tmp_path / "out"

    def once(*names: str) -> list[str]:
        gpu_schedule.run(Plan(dict.fromkeys(names, 9.0), out, "cpu", programs=tmp_path), MACHINE)
        return [step["name"] for step in json.loads((out / "schedule.json").read_text())["steps"]]

    monkeypatch.setattr(gpu_schedule, "commit", lambda: "one")
    assert once("build", "speed") == ["build", "speed"] and once("speed") == ["build", "speed"]
    assert len(lines(out / "speed.jsonl")) == 2 and len(lines(out / "build.jsonl")) == 1
    monkeypatch.setattr(gpu_schedule, "commit", lambda: "two")
    assert once("speed") == ["speed"]
    assert len(lines(out / "speed.jsonl")) == 1 and len(lines(out / "before-1" / "speed.jsonl")) == 2


@pytest.mark.parametrize("names", ["speed,sped", "all", "build correctness x"])
def test_an_unknown_step_is_an_error_before_any_work(names: str, tmp_path: Path) -> None:
    done = start("benchmarks/gpu_schedule.py", "--steps", names, "--device", "cpu", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "expected some of build,correctness,speed,tuning,sanitizer,counters" in done.stderr


def test_steps_keep_their_order() -> None:
    assert gpu_schedule.chosen("speed, build") == ["build", "speed"]
    assert gpu_schedule.parse([]).steps == gpu_schedule.chosen("") == [*gpu_schedule.STEPS]


def test_a_schedule_that_is_stopped_leaves_no_step_behind(tmp_path: Path) -> None:
    programs(tmp_path, build="results.write({'pid': os.getpid()}); time.sleep(60)")
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_schedule as s
from pathlib import Path
plan = s.Plan({{"build": 50.0}}, Path({str(tmp_path)!r}), "cpu", programs=Path({str(tmp_path)!r}))
with s.stopping_on_signals():
    s.run(plan, s.Machine("toy", None, None, None))
"""
    running, limit = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL), Deadline(20)
    while not lines(tmp_path / "build.jsonl") and not limit.over():
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(10) != 0
    (line,) = lines(tmp_path / "build.jsonl")
    assert gone(line["pid"])


# --- results ---


def test_results_survive_a_kill_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"b": ')
    with Results(tmp_path, "x") as results:
        results.write({"c": float("nan"), "d": [float("inf"), 1.5]})
        assert lines(tmp_path / "x.jsonl") == [{"a": 1}, {"c": None, "d": [None, 1.5]}]  # before the file is closed


# --- workers ---

WORKER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_worker
from gpu_worker import Job

def jobs(args, results):
    def write(name):
        return lambda: results.write({{"name": name, "pid": os.getpid()}}) is None
    def fail():
        raise ValueError("of this one\\nat length")
    def die():
        results.write({{"name": "die", "half": True}})
        os.kill(os.getpid(), signal.SIGKILL)
    bad = {{"raise": fail, "die": die, "hang": lambda: time.sleep(60), "wrong": lambda: False}}
    names = os.environ["JOBS"].split()
    return [Job(name, bad.get(name, write(name)), {{"name": name}}) for name in names]

sys.exit(gpu_worker.main("toy", __file__, "", jobs, job_limit=1.5))
"""


def work(folder: Path, names: str, limit: float = 30) -> tuple[int, list[dict[str, Any]]]:
    (folder / "toy.py").write_text(WORKER)
    where = ("--device", "cpu", "--out", str(folder), "--limit", str(limit))
    done = start(str(folder / "toy.py"), *where, env={**os.environ, "JOBS": names})
    return done.returncode, lines(folder / "toy.jsonl")


def test_jobs_run_in_one_worker(tmp_path: Path) -> None:
    status, (a, b, end) = work(tmp_path, "a b")
    assert status == 0 and a["pid"] == b["pid"] and end == {"left": []}


def test_a_worker_killed_midway_leaves_its_lines_and_costs_one_job(tmp_path: Path) -> None:
    status, (a, half, lost, b, end) = work(tmp_path, "a die b")
    assert status == 1 and half == {"name": "die", "half": True} and end == {"left": []}
    assert lost == {"name": "die", "ok": False, "message": "killed by SIGKILL"}
    assert a["name"] == "a" and b["name"] == "b" and a["pid"] != b["pid"]


def test_jobs_that_fail_or_hang(tmp_path: Path) -> None:
    status, found = work(tmp_path, "raise hang wrong a")
    assert status == 1 and len(found) == 4
    assert found[0] == {"name": "raise", "ok": False, "message": "ValueError: of this one"}
    assert found[1] == {"name": "hang", "ok": False, "message": "took more than 2 s and was killed"}
    assert found[2]["name"] == "a" and found[3] == {"left": []}


def test_what_there_was_no_time_for_is_said(tmp_path: Path) -> None:
    """The job that the end cuts short is left too: it has not failed."""
    began = time.monotonic()
    status, (a, end) = work(tmp_path, "a hang b", limit=0.8)
    assert status == 0 and a["name"] == "a" and end == {"left": ["hang", "b"]} and time.monotonic() - began < 10


# --- make ---


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_with_a_python_uses_it_as_it_is() -> None:
    """One command and no other: no virtual environment, no pip. Without PYTHON it is .venv's, made anew (-B)."""
    chosen = ("make", "-n", "-B", "gpu", "STEPS=build,speed", "OUT=a folder", "ARGS=--total 60")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
    }
    bare, usual = (
        subprocess.run([*chosen, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        for more in (("PYTHON=python3.99",), ())
    )
    options = '--steps "build,speed" --out "a folder" --total 60'
    assert bare.splitlines() == [f"python3.99 benchmarks/gpu_schedule.py {options}"]
    assert usual.splitlines()[-1] == f".venv/bin/python benchmarks/gpu_schedule.py {options}" and "pip" in usual


# --- the whole ---


@pytest.mark.verify
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dry", [False, True], ids=["cpu", "dry run"])
def test_the_whole_schedule(dry: bool, tmp_path: Path) -> None:
    """Every step's code path on tiny sizes, 30 s of each (a busy machine imports torch in 15): what can run here is
    fine, what cannot says so."""
    if dry:
        pytest.importorskip("triton", reason="triton has wheels for Linux only")
    options = ["--dry-run"] if dry else []
    done = start("benchmarks/gpu_schedule.py", "--device", "cpu", *options, "--out", str(tmp_path), "--limit", "30")
    found = json.loads((tmp_path / "schedule.json").read_text())
    statuses = {step["name"]: step["status"] for step in found["steps"]}
    logs = "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(tmp_path.glob("*.log")))
    expected = dict.fromkeys(gpu_schedule.STEPS, "ok") | dict.fromkeys(("sanitizer", "counters"), "skipped")
    assert done.returncode == 0 and statuses == expected, f"{statuses}\n{done.stdout}{done.stderr}\n{logs}"
    for step in ("correctness", "speed", "tuning", "sanitizer", "counters"):
        *done_lines, end = lines(tmp_path / f"{step}.jsonl")
        assert [*end] == ["left"], f"{step} has not come to its end\n{logs}"
        assert dry or done_lines, f"{step} has done nothing\n{logs}"  # dry: compiling one layer may take that long
