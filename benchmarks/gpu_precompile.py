"""Compiles what a step will launch in several processes beside it: Triton takes a second for a kernel, and keeps it on
disk.

A step's program says what its jobs launch, by name, in the order of the jobs. Each process launches all of it on
tensors of the CPU (csp_kernels.kernels.dry_run), compiles its share, and notes each part that it is through with in a
file of a folder. `Compiled.of(name)` waits until all are through with a part. A process that dies leaves its share to
whoever launches it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu_steps import Deadline, Results, read

Part = tuple[str, Callable[[], object]]  # name of a job, and what it launches
TARGET = "sm_90"  # of a dry run
POLL = 0.05  # seconds between two looks at the notes


def processes() -> int:
    """How many compile: all cores but two, which the step itself needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 2) if cores > 2 else cores


class Compilers:
    """The processes, while the context is open: `command` and --compile FOLDER I N each."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self.command, self.count = [*command], count
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Path:
        """The folder of their notes."""
        self.folder = tempfile.TemporaryDirectory(prefix="csp-compile-")
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        (Path(self.folder.name) / "count").write_text(str(self.count))
        for i in range(self.count):
            share = ["--compile", self.folder.name, str(i), str(self.count)]
            self.running.append(subprocess.Popen([*self.command, *share], env={**os.environ, **threads}))
        return Path(self.folder.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()
        self.folder.cleanup()


def compile_share(
    parts: Iterable[Part], folder: Path, share: tuple[int, int], target: str, limit: float, candidates: bool = False
) -> int:
    """What one process does: of each part its share, until `limit` seconds are over. candidates: all of a choice."""
    from gpu_dry_run import SHARED, Clock, Triton
    from triton import knobs

    import csp_kernels as csp
    from csp_kernels.kernels.dry_run import dry_run

    csp.use_backend("native")  # its operators are what `Triton` takes the place of
    deadline, clock, told = Deadline(limit), Clock(), 0
    knobs.compilation.listener = clock
    name = f"{share[0]}"
    with Results(folder, name) as notes, dry_run(target, candidates, share) as launches:
        for part, work in parts:
            if deadline.over():
                break
            failed = []
            try:
                with Triton():
                    work()
            except Exception as error:  # of a compiler: the other parts are compiled all the same
                failed.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            made, told = launches[told:], len(launches)
            limit_of = SHARED.get(target)
            failed += [
                f"{one.kernel}: {one.shared} bytes of shared memory, {target} has {limit_of}"
                for one in made
                if limit_of is not None and one.shared > limit_of
            ]
            notes.write({"part": part, "builds": len(made), "seconds": sum(clock.seconds.values()), "failed": failed})
            clock.seconds.clear()
        notes.write({"end": True})
    return 0


def target_of(device: str, dry: bool) -> str:
    """What to compile for: in a dry run TARGET, otherwise what the device is."""
    if dry or device != "cuda":
        return TARGET
    import torch

    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{10 * major + minor}"


@dataclass
class Outcome:
    """Of a part: builds and seconds of all processes together, what could not be built."""

    builds: int = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)
    whole: bool = True  # False: some process did not come to it


class Compiled:
    """The notes of the processes, for the step that launches what they compile. folder None: nothing is compiled."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = int((folder / "count").read_text()) if folder else 0
        self.sizes = [-1] * self.count
        self.notes: list[dict[str, dict[str, Any]]] = [{} for _ in range(self.count)]
        self.ended = [False] * self.count

    def of(self, part: str, patience: float) -> Outcome:
        """Waits until all processes are through with a part, or have ended, or `patience` seconds are over."""
        patient = Deadline(patience)
        while True:
            self.look()
            missing = [i for i in range(self.count) if part not in self.notes[i]]
            if patient.over() or all(self.ended[i] for i in missing):
                break
            time.sleep(POLL)
        found = Outcome(whole=not missing)
        for notes in self.notes:
            line = notes.get(part, {"builds": 0, "seconds": 0.0, "failed": []})
            found.builds, found.seconds = found.builds + line["builds"], found.seconds + line["seconds"]
            found.failed += [message for message in line["failed"] if message not in found.failed]
        return found

    def look(self) -> None:
        for i in range(self.count):
            path = (self.folder or Path()) / f"{i}.jsonl"
            if path.exists() and path.stat().st_size != self.sizes[i]:
                self.sizes[i] = path.stat().st_size
                for line in read(path):
                    self.ended[i] = self.ended[i] or bool(line.get("end"))
                    if "part" in line:
                        self.notes[i][line["part"]] = line


def command(script: str, given: Sequence[str]) -> list[str]:
    return [sys.executable, script, *given]


@contextlib.contextmanager
def compilers(script: str, args: argparse.Namespace, given: Sequence[str]) -> Iterator[list[str]]:
    """What a step's command line needs to find the processes that compile: on the CPU there are none."""
    if args.device != "cuda" and not args.dry_run:
        yield []
        return
    with Compilers(command(script, given), processes()) as folder:
        yield ["--compiled", str(folder)]
