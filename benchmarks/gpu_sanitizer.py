"""Step of the GPU schedule: one small case of each kernel (gpu_small.py) under NVIDIA's compute-sanitizer.

Several runs side by side, a tool and a backend each: starting them takes longer than the kernels. A line of
sanitizer.jsonl for each case under each tool, written when the case ends: {"kernel": case, "tool", "ok", "message"}; of
something wrong the message says what, and in which function. On the CPU and in a dry run the cases run without a tool,
and a line says that they were not looked at.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_machine import find_tool
from gpu_steps import SKIPPED, Deadline, Results, parse

SMALL = Path(__file__).resolve().parent / "gpu_small.py"
# Tool, backend: addresses first, then what shared memory and barriers of the CUDA C++ kernels may get wrong.
RUNS = (
    ("memcheck", "native"), ("memcheck", "triton"), ("racecheck", "native"), ("synccheck", "native"),
    ("initcheck", "native"), ("initcheck", "triton"), ("racecheck", "triton"),
)  # fmt: skip
FEW = ("dense block, bfloat16", "transition")  # to try out a dry run, which compiles for a minute
CORES = 3  # that a run keeps busy while it starts
BENIGN = ("COMPUTE-SANITIZER", "Target application returned an error", "Saved host backtrace", "This tool is")


def command(tool: str | None, name: str, *arguments: str) -> list[str]:
    """Of a run; tool None: without one. What the cases start themselves, such as ptxas, is not looked at."""
    program = [sys.executable, str(SMALL), *arguments]
    if tool is None:
        return program
    options = ["--tool", name, "--target-processes", "application-only", "--print-limit", "20"]
    return [tool, *options, *(["--padding", "64"] if name == "memcheck" else []), *program]


class Report:
    """Reads what a run prints, line by line: the cases' own lines, and between them what the tool has found."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.case: str | None = None
        self.found: list[str] = []  # headline and function of each error of the case
        self.notes: list[str] = []  # warnings, which are no errors
        self.summary, self.last = False, ""

    def feed(self, text: str) -> dict[str, Any] | None:
        """The result of the case that ends with this line, if one does."""
        text = text.rstrip()
        if match := re.fullmatch(r"case (.+) (begins|ends)", text):
            if match[2] == "ends":
                return self.close()
            stray = self.close() if self.found else None  # of what was found behind the last case
            self.case = match[1]
            return stray
        if match := re.fullmatch(r"case (.+) failed: (.*)", text):
            self.found.append(match[2])
            return self.close()
        if match := re.match(r"=========( +)(\S.*)", text):
            self.message(match[2], nested=len(match[1]) > 1)
        elif text:
            self.last = text
        return None

    def message(self, text: str, nested: bool) -> None:
        """A line of the tool's. nested: it says more about the one before."""
        if nested:
            match = re.match(r"at (?:0x[0-9a-f]+ in )?(.+?)(?:\+0x[0-9a-f]+)?(?: in \S+)?$", text)
            if match and self.found and " at " not in self.found[-1]:
                self.found[-1] += f" at {match[1]}"
        elif "SUMMARY:" in text:
            self.summary = True
        elif text.startswith("Warning:"):
            self.notes.append(text)
        elif not text.startswith(BENIGN):
            self.found.append(text)

    def close(self) -> dict[str, Any]:
        """The line of the open case."""
        different = list(dict.fromkeys(self.found or self.notes))
        more = f" (and {len(different) - 1} others)" if len(different) > 1 else ""
        line = {"kernel": self.case or "behind a case", "tool": self.tool, "ok": not self.found}
        line["message"] = f"{different[0][:300]}{more}" if different else ""
        self.case, self.found, self.notes = None, [], []
        return line

    def finish(self, status: int, watched: bool) -> dict[str, Any] | None:
        """What is wrong with how the run ended: in a case, or without the tool's last word, which says that it
        looked. watched: under a tool."""
        if self.case is not None:
            self.found.append(f"the process ended with status {status}; the last line was: {self.last[:200]}")
        elif watched and not self.summary:
            self.found.append(f"{self.tool} has no summary, status {status}; the last line was: {self.last[:200]}")
        return self.close() if self.found else None


class Runs:
    """The runs of a step, some at a time; all write to one file of results."""

    def __init__(self, results: Results, deadline: Deadline) -> None:
        self.results, self.deadline, self.lock = results, deadline, threading.Lock()
        self.fine, self.ended, self.processes = True, list[str](), list[subprocess.Popen[str]]()

    def write(self, line: dict[str, Any] | None, backend: str) -> None:
        if line is None:
            return
        with self.lock:
            if self.deadline.over():  # then it is the end that was reported
                return
            self.results.write({**line, "backend": backend})
            self.fine &= bool(line["ok"])

    def run(self, name: str, backend: str, line: Sequence[str], watched: bool) -> None:
        """One run to its end."""
        environment = {**os.environ}
        if name in ("memcheck", "initcheck"):  # each tensor an allocation of its own
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        with self.lock:
            if self.deadline.over():
                return
            process = subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
            )
            self.processes.append(process)
        report = Report(name)
        assert process.stdout is not None
        for text in process.stdout:
            print(f"[{name} {backend}] {text}", end="", flush=True)
            self.write(report.feed(text), backend)
        self.write(report.finish(process.wait(), watched), backend)
        if not self.deadline.over():
            self.ended.append(f"{name} {backend}")

    def all(self, planned: Sequence[tuple[str, str, Sequence[str]]], watched: bool, abreast: int) -> None:
        """(tool, backend, command) each, `abreast` at a time, until the time is over."""
        todo, threads = list(planned), list[threading.Thread]()

        def work() -> None:
            while not self.deadline.over():
                with self.lock:
                    if not todo:
                        return
                    name, backend, line = todo.pop(0)
                self.run(name, backend, line, watched)

        for _ in range(max(1, abreast)):
            threads.append(threading.Thread(target=work, daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(max(0.0, self.deadline.left()))
        with self.lock:
            for process in self.processes:
                process.kill()
        for thread in threads:
            thread.join(1.0)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a case fails or the tool finds something; 77 where there is no tool to look with."""
    args = parse(__doc__, argv)
    deadline, tool, why_not = Deadline(args.limit), find_tool("compute-sanitizer"), ""
    planned: list[tuple[str, str, Sequence[str]]] = []
    if args.dry_run or args.device == "cpu":
        why_not = "compute-sanitizer needs a GPU: the small cases were not looked at"
        options = ["--dry-run"] if args.dry_run else ["--device", "cpu"]
        options += ["--cases", *FEW] if args.dry_run and args.device == "cpu" else []
        planned = [("none", "native", command(None, "none", *options))]
    elif tool is None:
        why_not = "compute-sanitizer is not installed (it comes with the CUDA toolkit): nothing was looked at"
    else:
        arguments = ("--device", "cuda", "--backend")
        planned = [(name, backend, command(tool, name, *arguments, backend)) for name, backend in RUNS]
    with Results(args.out, "sanitizer") as results:
        runs = Runs(results, deadline)
        runs.all(planned, not why_not, cores() // CORES)
        if why_not:
            results.write({"kernel": "all", "tool": "compute-sanitizer", "ok": None, "message": f"skipped: {why_not}"})
        names = [f"{name} {backend}" for name, backend, _ in planned]
        results.write({"left": [name for name in names if name not in runs.ended]})
    if why_not:
        print(why_not)
    return 1 if not runs.fine else SKIPPED if why_not else 0


if __name__ == "__main__":
    sys.exit(main())
