"""Runs the jobs of a step in a process that may die: a kernel that crashes, hangs or poisons its process costs one job.

A step's program hands `main` a function that makes its jobs, most valuable first:

    def jobs(args: argparse.Namespace, results: Results) -> list[Job]: ...

    if __name__ == "__main__":
        sys.exit(gpu_worker.main("speed", __file__, __doc__, jobs, job_limit=20))

The program then starts itself again with --worker and looks on. The worker makes the jobs and notes which it begins and
ends, in FOLDER/<step>.progress.jsonl. If it dies, or is at one job for more than job_limit seconds and is killed, the
job's line `lost` is written with "ok": false and a message, and a fresh worker does the jobs that were not begun. The
last line of the results is {"left": [names]}: what there was no time for.

What looks on needs no torch: a program that imports it inside `jobs` alone starts seconds sooner.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_steps import Deadline, Results, parser, read, remaining

POISONED = 75  # exit status of a worker whose CUDA context is lost: its last job has been reported
POLL = 0.05  # seconds between two looks at the worker
LATE = 2.0  # seconds that a job may go on after the step's end


@dataclass(frozen=True)
class Job:
    """A part of a step. name: unique in the step. work: writes its own lines, True if all was fine; it may raise.
    lost: the line that is written in its stead if it raises or its process dies."""

    name: str
    work: Callable[[], bool]
    lost: dict[str, Any] = field(default_factory=dict)


Jobs = Callable[[argparse.Namespace, Results], Sequence[Job]]


def main(
    step: str,
    script: str,
    description: str,
    jobs: Jobs,
    job_limit: float,
    argv: Sequence[str] | None = None,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """The exit status of a step's program: 0 if everything that was tried was fine. arguments: adds its own."""
    made = parser(description)
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    if arguments:
        arguments(made)
    args = remaining(made.parse_args(argv), argv)
    if args.worker:
        return work(step, args, jobs)
    given = [*(sys.argv[1:] if argv is None else argv)]
    return Watch(step, args.out, [sys.executable, script, *given, "--worker"], job_limit).run(Deadline(args.limit))


# --- in the worker ---


def work(step: str, args: argparse.Namespace, jobs: Jobs) -> int:
    """Does the jobs that no worker before has begun, until the time is over."""
    deadline = Deadline(args.limit)
    begun = {line["begin"] for line in read(progress_file(step, args.out)) if "begin" in line}
    with Results(args.out, step) as results, Results(args.out, f"{step}.progress") as progress:
        todo = list(jobs(args, results))
        progress.write({"plan": [[job.name, job.lost] for job in todo]})
        for job in todo:
            if job.name in begun:
                continue
            if deadline.over():
                break
            progress.write({"begin": job.name})
            fine = attempt(job, results)
            lost = args.device == "cuda" and not args.dry_run and poisoned()
            if lost and fine:  # the job has not noticed: its kernels ran behind it
                results.write({**job.lost, "ok": False, "message": lost})
            progress.write({"end": job.name, "ok": fine and not lost})
            if lost:
                print(f"{job.name}: {lost}; a fresh process goes on", file=sys.stderr, flush=True)
                return POISONED
    return 0


def attempt(job: Job, results: Results) -> bool:
    """Whether the job was fine; an exception is written to the results and to stderr."""
    try:
        return job.work()
    except Exception as error:  # of a compiler, for want of memory, of a wrong launch: the others are done all the same
        traceback.print_exc()
        results.write({**job.lost, "ok": False, "message": said(error)})
        return False


def said(error: BaseException) -> str:
    """One line for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def poisoned() -> str:
    """What CUDA says in a process that no kernel can run in any more; "" where all is well."""
    import torch

    if not torch.cuda.is_available():
        return ""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        return said(error)
    return ""


# --- in the process that looks on ---


def progress_file(step: str, folder: Path) -> Path:
    return folder / f"{step}.progress.jsonl"


@dataclass
class Progress:
    """What workers have noted so far."""

    plan: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> the line of a job that is lost
    begun: list[str] = field(default_factory=list)
    ended: dict[str, bool] = field(default_factory=dict)  # name -> was it fine

    @classmethod
    def of(cls, path: Path) -> Progress:
        found = cls()
        for line in read(path):
            found.plan |= dict(line.get("plan", []))
            found.begun += [line["begin"]] if "begin" in line else []
            found.ended |= {line["end"]: line["ok"]} if "end" in line else {}
        return found

    @property
    def open(self) -> str | None:
        """The job that a worker is at, or died in."""
        return next((name for name in self.begun if name not in self.ended), None)


class Watch:
    """Starts workers, one after the other, and writes down what they lose."""

    def __init__(self, step: str, folder: Path, command: Sequence[str], job_limit: float) -> None:
        self.step, self.folder, self.command, self.job_limit = step, folder, [*command], job_limit
        self.path = progress_file(step, folder)

    def run(self, deadline: Deadline) -> int:
        """1 if a job failed, was lost, or no worker could be started."""
        self.path.unlink(missing_ok=True)
        fine, before = True, -1
        with Results(self.folder, self.step) as results:
            while len((progress := Progress.of(self.path)).begun) > before and not deadline.over():
                before = len(progress.begun)
                message = self.one_worker(deadline)
                job = Progress.of(self.path).open
                if not message:
                    break
                print(f"{job or self.step}: {message}", file=sys.stderr, flush=True)
                if job is None:  # late at its exit, it has lost nothing
                    fine = fine and deadline.over() and bool(Progress.of(self.path).plan)
                elif not deadline.over():  # the job that the step's end cuts short is not lost, but left
                    results.write({**Progress.of(self.path).plan[job], "ok": False, "message": message})
                    self.close(job)
            progress = Progress.of(self.path)
            results.write({"left": [name for name in progress.plan if name not in progress.ended]})
        return 0 if fine and all(progress.ended.values()) else 1

    def close(self, job: str) -> None:
        """Notes the end of a job whose worker could not."""
        with Results(self.folder, f"{self.step}.progress") as progress:
            progress.write({"end": job, "ok": False})

    def one_worker(self, deadline: Deadline) -> str:
        """Runs a worker to its end. What happened to it; "" if it did all that it came to."""
        worker = subprocess.Popen([*self.command, "--limit", str(max(0.1, deadline.left()))])
        job, since, size = None, time.monotonic(), 0
        while worker.poll() is None:
            time.sleep(POLL)
            if self.path.exists() and self.path.stat().st_size != size:
                size, since = self.path.stat().st_size, time.monotonic()
                job = Progress.of(self.path).open
            if deadline.left() < -LATE or (job is not None and time.monotonic() - since > self.job_limit):
                worker.kill()
                worker.wait()
                return f"took more than {time.monotonic() - since:.0f} s and was killed"
        return ended(worker.returncode)


def ended(status: int) -> str:
    """Of a worker's exit status, in words; "" if it is that of a worker that did its jobs."""
    if status == 0:
        return ""
    if status == POISONED:
        return "its CUDA context is lost"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
