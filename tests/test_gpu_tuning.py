"""benchmarks/gpu_tuning.py without a GPU: by an injected timer, by the host's path alone, with a fault planted, dry."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_steps import Deadline, Results
from gpu_tuner import Choice, Tuner, summaries
from harness import Timing

from csp_kernels.kernels import tune

ROOT = Path(__file__).resolve().parents[1]
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton has wheels for Linux only")
KEY = ("bfloat16", 64)


class Clock:
    """Runs the works, and says that they took what `spent` says of the last tile that ran."""

    def __init__(self, spent: Mapping[str, float]) -> None:
        self.spent, self.ran = spent, [""]

    def run(self, tile: str) -> None:
        self.ran.append(tile)

    def __call__(self, works: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        times = {}
        for name, work in works.items():
            work()
            times[name] = Timing.of([self.spent[self.ran[-1]]])
        return times


def tuner(folder: Path, clock: Clock, **more: Any) -> Tuner:
    return Tuner(folder, Results(folder, "tuning"), clock, Deadline(1000), **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tuning.jsonl").read_text().splitlines()]


def test_all_candidates_are_timed_once(tmp_path: Path) -> None:
    """Those too that a cost model would leave out; the next process knows the winner."""
    spent = {"a": 4.0, "b": 3.0, "c": 5.0, "d": 2.0, "e": 6.0}
    clock = Clock(spent)
    with tuner(tmp_path, clock).installed():
        for _ in range(2):
            assert tune.choose("mix.forward", KEY, list(spent), clock.run, cost=lambda t: ord(t)) == "d"
    assert set(clock.ran) - {""} == set(spent)
    found = lines(tmp_path)
    assert [(x["tile"], x["median_ms"], x["first"], x["winner"], x["rank"]) for x in found] == [
        (f"'{t}'", spent[t], t == "a", t == "d", i) for i, t in enumerate(spent)
    ]
    assert {(x["kernel"], x["key"]) for x in found} == {("mix.forward", repr(KEY))}
    again = Clock(spent)
    assert tuner(tmp_path, again).choose("mix.forward", KEY, list(spent), again.run) == "d" and again.ran == [""]


def test_one_candidate_is_not_timed(tmp_path: Path) -> None:
    clock = Clock({})
    assert tuner(tmp_path, clock).choose("mix.dgrad", KEY, ["a"], clock.run) == "a" and clock.ran == [""]


def test_over_time_nothing_is_timed(tmp_path: Path) -> None:
    clock = Clock({"a": 2.0, "b": 1.0})
    late = Tuner(tmp_path, Results(tmp_path, "tuning"), clock, Deadline(-1))
    assert late.choose("mix.dgrad", KEY, ["a", "b"], clock.run) == "a" and clock.ran == [""]


def test_a_choice_inside_another_is_timed_first(tmp_path: Path) -> None:
    """mix.backward in two passes chooses tiles for each."""
    outer, clock = [""], Clock({"a": 2.0, "b": 1.0, "x": 2.0, "y": 1.0})
    made = tuner(tmp_path, clock)

    def run(tile: str) -> None:
        made.choose("inner", KEY, ["x", "y"], clock.run)
        clock.run(tile)
        outer.append(tile)

    assert made.choose("outer", KEY, ["a", "b"], run) == "b"
    assert [line["kernel"] for line in lines(tmp_path)] == ["inner"] * 2 + ["outer"] * 2


class TooLarge(Exception):
    pass


def test_what_cannot_run_loses_and_what_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_unfit", lambda: (TooLarge,))
    clock = Clock({"c": 1.0})

    def run(tile: str) -> None:
        if tile != "c":
            raise {"a": TooLarge("shared memory"), "b": RuntimeError("planted")}[tile]
        clock.run(tile)

    made = tuner(tmp_path, clock)
    assert made.choose("mix.wgrad", KEY, ["a", "b", "c"], run) == "c" and not made.fine
    a, b, c = lines(tmp_path)
    assert (a["message"], a.get("ok")) == ("cannot run: shared memory", None) and a["median_ms"] is None
    assert (b["message"], b["ok"]) == ("RuntimeError: planted", False) and c["winner"]


def test_a_process_that_is_lost_stops_and_the_next_leaves_the_candidate_out(tmp_path: Path) -> None:
    clock = Clock({"a": 1.0, "c": 2.0})

    def run(tile: str) -> None:
        if tile == "b":
            raise RuntimeError("an illegal memory access was encountered")
        clock.run(tile)

    with pytest.raises(RuntimeError, match="illegal"):
        tuner(tmp_path, clock, lost=lambda: "gone").choose("mix.wgrad", KEY, ["a", "b", "c"], run)
    assert tuner(tmp_path, clock).choose("mix.wgrad", KEY, ["a", "b", "c"], run) == "a"
    deadly, a, b, c = lines(tmp_path)
    assert deadly["tile"] == "'b'" and not deadly["ok"] and b["message"] == "a process died or failed in it"
    assert a["winner"] and c["median_ms"] == 2.0 and b["median_ms"] is None


def test_how_good_the_order_is() -> None:
    """Loss of the first candidate, rank of the winner."""
    choices = [
        Choice("mix.forward", "1", {"a": 2.0, "b": 1.0}),
        Choice("mix.forward", "2", {"a": 1.0, "b": 1.0}),
        Choice("mix.forward", "3", {"a": 3.0, "b": 2.0, "c": 4.0}),
        Choice("mix.dgrad", "1", {"a": float("inf")}),
    ]
    assert [(c.winner, c.rank) for c in choices[:3]] == [("b", 1), ("a", 0), ("b", 1)]
    (line,) = summaries(choices)
    assert line["constant"] == "loss of the first candidate: mix.forward" and line["value"] == 1.5
    assert "of 3 choices, at worst 2.000" in line["from"] and line["from"].endswith("how often: 0: 1, 1: 2")


@NEEDS_TRITON
def test_the_kernels_of_constants_do_what_they_are_for() -> None:
    """On sm_90: many mma.sync for each ldmatrix, in the loop and in front of it; reads past the level-1 cache."""
    import gpu_constants

    from csp_kernels.kernels.dry_run import dry_run

    with dry_run("sm_90") as launches:
        out = torch.empty(8, 64, 64, dtype=torch.bfloat16)
        gpu_constants._products[(8,)](out, 9, "ieee", 64, 64, 32, num_warps=1)
        gpu_constants._read_again[(8,)](torch.empty(1 << 20), torch.empty(8, 1024), 1024, 2, 1024, num_warps=4)
    products, read = (launch.asm["ptx"] for launch in launches)
    assert products.count("mma.sync") >= 2 * products.count("ldmatrix") > 0 and "wgmma" not in products
    assert "ld.global.cg.v4" in read


# --- the program ---


def run(script: Path, out: Path, *more: str) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, str(script), "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, lines(out), done.stderr


PLANTED = """
import os, sys
sys.path.insert(0, "benchmarks")
import gpu_tuning, gpu_tuner
gpu_tuning.__file__ = __file__  # what workers start
begin = gpu_tuner.Results.write

def write(results, line):
    begin(results, line)
    if "begin" in line and line["begin"][0:1] == ["conv3x3.dgrad"]:
        os._exit(5)

gpu_tuner.Results.write = write
sys.exit(gpu_tuning.main())
"""


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    """It takes the real path of the host, and launches nothing. A candidate of the 3x3 kills its process: both it and
    the job are reported, the next process goes on with the next job."""
    (tmp_path / "planted.py").write_text(PLANTED)
    more = "--device", "cpu", "--only", "post_dense_block", "--kinds", "bfloat16", "float32"
    status, found, stderr = run(tmp_path / "planted.py", tmp_path / "out", *more)
    assert status == 1 and found[-1] == {"left": []}, stderr
    deadly = [line for line in found if line.get("ok") is False]
    jobs = [line for line in deadly if "tile" not in line]
    assert [line["message"] for line in jobs] == ["exit status 5"] and "post_dense_block" in jobs[0]["kernel"]
    timed = [line for line in found if line.get("median_ms")]
    assert [line["kernel"] for line in deadly if "tile" in line] == ["conv3x3.dgrad"]
    assert {line["kernel"] for line in timed} >= {"mix.forward", "activate.backward", "conv3x3.forward"}
    assert all(line["message"].startswith("the host's path alone") for line in timed)
    keys = {(line["kernel"], line["key"]) for line in timed}
    for at in keys:
        mine = [line for line in timed if (line["kernel"], line["key"]) == at]
        assert len(mine) > 1 and sum(line["winner"] for line in mine) == sum(line["first"] for line in mine) == 1
    assert any("float32" in key for _, key in keys) and any("bfloat16" in key for _, key in keys)


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_stops_at_its_limit(tmp_path: Path) -> None:
    """Constants first: what needs a GPU is said to."""
    start = time.monotonic()
    _, found, stderr = run(ROOT / "benchmarks" / "gpu_tuning.py", tmp_path, "--device", "cpu", "--limit", "20")
    assert time.monotonic() - start < 20 + 8
    assert found[-1]["left"], stderr
    constants = {line["constant"]: line for line in found if "constant" in line}
    assert constants["machine_of.bytes_ns"]["value"] > 0.1
    assert constants["PRODUCT_NS"] == {"constant": "PRODUCT_NS", "value": None, "from": "needs a GPU"}
    assert "conv3x3.forward: who" in {line.get("kernel") for line in found}


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_dry_run_compiles_and_runs_nothing(tmp_path: Path) -> None:
    status, found, stderr = run(ROOT / "benchmarks" / "gpu_tuning.py", tmp_path, "--dry-run", "--device", "cpu")
    layer, concat, last = found
    assert status == 0 and layer["ok"] and concat["ok"] and last == {"left": []}, stderr
    assert layer["job"].startswith("dense layer") and concat["job"].startswith("concat_conv")
    for line in (layer, concat):  # the 1x1 and what is behind it, of which there are two candidates each
        made = re.fullmatch(r"compiled for sm_90, (\d+) builds in .* s; not run", line["message"])
        assert made and int(made[1]) >= 4
