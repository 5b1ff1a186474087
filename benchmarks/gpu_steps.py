"""What the steps of the GPU schedule (gpu_schedule.py) share: arguments, a clock, and a file of results.

A step is a program `gpu_<step>.py --out FOLDER --device cuda|cpu --limit SECONDS [--dry-run]`. It does the most
valuable work first, writes what it finds to FOLDER/<step>.jsonl as it finds it, stops by itself when its time is over,
and exits with 0 if all that it tried was fine, 1 if something failed, SKIPPED if it can do nothing here. gpu_worker.py
runs a step's work in processes that may die.

A dry run needs no GPU, whatever --device says: "cuda" stands for the sizes that a GPU would get, "cpu" for tiny ones.

This file imports no torch, which takes seconds: a step imports it first, so that those count.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

STARTED = time.monotonic()  # of the process, or nearly
SKIPPED = 77  # exit status of a step that can do nothing here; the last line that it prints says why


class Deadline:
    """A clock that runs from its making: `seconds` of it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the end, negative after it."""
        return self._end - time.monotonic()

    def over(self) -> bool:
        return self.left() <= 0


class Results:
    """FOLDER/<name>.jsonl: one JSON object a line, on disk when `write` returns, so that a kill loses nothing.

    Lines are added to those that are there: the processes of a step write to one file, and a later run continues it. Of
    two lines about the same thing the later one counts. The schedule puts files of another commit aside.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        self._file = self.path.open("a+b")
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # ends the line that a process was killed in

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line. Numbers that are not finite become null, which every reader of JSON knows."""
        self._file.write(json.dumps(finite(dict(line))).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, in lists, tuples and dictionaries too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(member) for member in value]
    return value


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of results, in order; none if there is no file. Lines cut short by a kill are left out."""
    if not path.exists():
        return
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected a positive number of seconds")
    return value


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every step takes, for those that add their own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder that results are written to")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try a step out")
    made.add_argument("--limit", type=seconds, default=600.0, help="seconds after which to stop (default: 600)")
    made.add_argument("--dry-run", action="store_true", help="compile every launch for sm_90, run none")
    return made


def parse(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """out: Path, device: str, limit: float, dry_run: bool. Of the command line (argv None) the time that the process
    has spent on its imports is taken off the limit."""
    return remaining(parser(description).parse_args(argv), argv)


def remaining(args: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """Takes what the process has run for off args.limit, if the arguments are those of the process."""
    if argv is None:
        args.limit = max(0.0, args.limit - (time.monotonic() - STARTED))
    return args
