"""Nine minutes on a GPU: steps, most valuable first, each in processes of its own and under its own limit of time.

    python benchmarks/gpu_schedule.py                                   # all of it; without a GPU a dry run
    python benchmarks/gpu_schedule.py --steps build,speed --out results # some of it, into another folder
    python benchmarks/gpu_schedule.py --device cpu                      # tries every step out, on tiny sizes

A step is a program, gpu_<step>.py (gpu_steps.py has what they share). It writes FOLDER/<step>.jsonl line by line, and
what it prints goes to FOLDER/<step>.log; FOLDER/schedule.json, written anew after each step, says how it ended. So a
machine that is taken away leaves what was done, and benchmarks/gpu_report.py makes a report of it. docs/gpu_schedule.md
says what is known after each step, and what to do with a second nine minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from gpu_machine import ROOT, Machine, commit, describe, library, processor, slug
from gpu_steps import SKIPPED, Deadline, seconds

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = {"build": 90, "correctness": 90, "speed": 180, "tuning": 120, "sanitizer": 40, "counters": 30}  # seconds
TOTAL = 540.0  # seconds of all together: a step gets what is left
PATIENCE = 3600.0  # seconds of a step of a dry run, which nobody's machine is lent for
GRACE = 5.0  # seconds that a step may go on after its limit, before it is killed
LEAST = 5.0  # seconds under which a step is not begun


@dataclass(frozen=True)
class Outcome:
    """How a step ended. status: "ok", "failed", "timed out" or "skipped". message: why, in a line."""

    name: str
    status: str
    seconds: float
    limit: float
    message: str = ""


# --- a step ---


def environment(on_gpu: bool) -> dict[str, str]:
    """Of a step: the package of this tree, and the library of gpu_build.py unless CSP_KERNELS_LIBRARY names another."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if file := library(on_gpu):
        found.setdefault("CSP_KERNELS_LIBRARY", str(file))
    return found


def run_step(
    name: str, command: Sequence[str], limit: float, folder: Path, on_gpu: bool = False, grace: float = GRACE
) -> Outcome:
    """Runs a step's program to its end, or to limit + grace seconds: then it is killed, with all that it started."""
    start = time.monotonic()
    with (folder / f"{name}.log").open("ab") as log:
        step = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment(on_gpu),
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                step.wait(limit + grace)
        finally:  # also what the step has left behind, and what runs when somebody presses Ctrl-C
            late = step.poll() is None
            kill_group(step.pid)
            step.wait()
    spent = round(time.monotonic() - start, 1)
    if late:
        return Outcome(name, "timed out", spent, limit, f"killed after {limit:g} + {grace:g} s")
    status = {0: "ok", SKIPPED: "skipped"}.get(step.returncode, "failed")
    return Outcome(name, status, spent, limit, "" if status == "ok" else reason(step.returncode, folder, name))


def kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says the second
        os.killpg(leader, signal.SIGKILL)


def reason(status: int, folder: Path, name: str) -> str:
    """Why a step failed or did nothing: its signal, or the last line that it printed."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {name}.log"
    lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {status}"


# --- all of them ---


@dataclass(frozen=True)
class Plan:
    """What to run, and where. programs: the folder that has gpu_<step>.py."""

    steps: Mapping[str, float]  # name -> seconds
    folder: Path
    device: str
    dry_run: bool = False
    total: float = TOTAL
    programs: Path = Path(__file__).resolve().parent

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda" and not self.dry_run

    def command(self, step: str, limit: float) -> list[str]:
        """Of a step."""
        words = [sys.executable, str(self.programs / f"gpu_{step}.py"), "--out", str(self.folder)]
        words += ["--device", self.device, "--limit", f"{limit:.1f}"]
        return [*words, "--dry-run"] if self.dry_run else words


def run(plan: Plan, machine: Machine) -> list[Outcome]:
    """Runs the steps in order; each one's outcome is on disk before the next begins."""
    deadline, outcomes = Deadline(plan.total), list[Outcome]()
    about = {**asdict(machine), "commit": commit(), "dry_run": plan.dry_run}
    plan.folder.mkdir(parents=True, exist_ok=True)
    put_aside(plan.folder, about)
    earlier = [step for step in recorded(plan.folder).get("steps", []) if step["name"] not in plan.steps]
    record(plan.folder, about, earlier, outcomes)
    for name, own in plan.steps.items():
        limit = round(min(own, deadline.left() - GRACE), 1)
        if limit < min(LEAST, own):
            outcome = Outcome(name, "skipped", 0.0, own, f"{plan.total:g} s for all steps are over")
        else:
            print(f"{name:<12} at most {limit:g} s", flush=True)
            outcome = run_step(name, plan.command(name, limit), limit, plan.folder, plan.on_gpu, GRACE)
        outcomes.append(outcome)
        record(plan.folder, about, earlier, outcomes)
        print(f"{name:<12} {outcome.status:<10} {outcome.seconds:6.1f} s  {outcome.message}".rstrip(), flush=True)
    return outcomes


def recorded(folder: Path) -> dict[str, Any]:
    """schedule.json of an earlier run; empty where there is none."""
    file = folder / "schedule.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def put_aside(folder: Path, about: Mapping[str, Any]) -> None:
    """Results of another commit or machine must not mix with those to come: they move to a folder in the folder."""
    before = recorded(folder)
    if not before or all(before.get(key) == value for key, value in json.loads(json.dumps(about)).items()):
        return
    number = 1
    while (target := folder / f"before-{number}").exists():
        number += 1
    target.mkdir()
    for file in (*folder.glob("*.json*"), *folder.glob("*.log")):
        file.rename(target / file.name)
    print(f"results of {before.get('commit') or 'another commit'} on {before.get('device')} are in {target} now")


def record(folder: Path, about: Mapping[str, Any], earlier: Sequence[Any], outcomes: Sequence[Outcome]) -> None:
    """schedule.json in one piece, whenever the machine goes. earlier: steps of runs before that this one leaves out."""
    text = json.dumps({**about, "steps": [*earlier, *map(asdict, outcomes)]}, indent=1)
    fresh = folder / "schedule.json.new"
    with fresh.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / "schedule.json")


# --- the command line ---


def chosen(text: str) -> list[str]:
    """Steps named in a list with commas, in the schedule's order."""
    names = [name for name in re.split(r"[,\s]+", text) if name]
    if unknown := sorted({*names} - {*STEPS}):
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, expected some of {','.join(STEPS)}")
    return [name for name in STEPS if name in names or not names]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU, or a dry run where there is none")
    parser.add_argument("--dry-run", action="store_true", help="compile every launch for sm_90, run none")
    parser.add_argument("--steps", type=chosen, default=[*STEPS], help=f"some of {','.join(STEPS)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    parser.add_argument("--total", type=seconds, help=f"seconds for all steps (default: {TOTAL:g}; dry run: none)")
    parser.add_argument("--limit", type=seconds, help="most seconds of a step, where its own limit is larger")
    return parser.parse_args(argv)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a step as Ctrl-C does: nothing goes on behind a closed terminal."""

    def stop(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every step was fine; 1 if one failed or was late, or there is no GPU that was asked for; 130: stopped."""
    args = parse(argv)
    try:
        machine = describe()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if args.device == "cuda" and not machine.device and not args.dry_run:
        print("--device cuda: torch finds no GPU; --dry-run compiles its kernels, --device cpu tries the steps out")
        return 1
    device, dry_run = args.device or "cuda", args.dry_run
    if not args.device and not machine.device and not dry_run:
        print("no GPU: a dry run, which compiles every kernel for sm_90 and runs none")
        dry_run = True
    if device == "cpu" or not machine.device:
        machine = Machine(processor(), None, machine.torch, machine.triton)
    limits = dict.fromkeys(STEPS, PATIENCE) if dry_run else STEPS
    steps = {name: min(limits[name], args.limit or PATIENCE) for name in args.steps}
    total = args.total or (sum(steps.values()) + GRACE * len(steps) if dry_run else TOTAL)
    name = f"{slug(machine.device)}{'-dry-run' if dry_run else ''}"
    plan = Plan(steps, (args.out or RESULTS / name).resolve(), device, dry_run, total)
    print(f"{machine.device}, torch {machine.torch}, triton {machine.triton}; results go to {plan.folder}")
    try:
        with stopping_on_signals():
            outcomes = run(plan, machine)
    except KeyboardInterrupt:
        print(f"\nstopped; what was done is in {plan.folder}")
        return 130
    return 0 if all(outcome.status in ("ok", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
