"""Times every candidate of every choice among configurations (csp_kernels.kernels.tune.choose) that a model meets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_steps import Deadline, Results, read
from harness import Timing

from csp_kernels.kernels import tune

Works = Mapping[str, Callable[[], object]]
Timer = Callable[[Works], Mapping[str, Timing]]  # of what is to be compared, in milliseconds


@dataclass
class Choice:
    """What was measured of one choice: the milliseconds of each candidate, by its repr, in the order of the list;
    infinite where it cannot run."""

    kernel: str
    key: str
    times: dict[str, float] = field(default_factory=dict)

    @property
    def winner(self) -> str:
        """The fastest, of equals the first."""
        return min(self.times, key=lambda tile: self.times[tile])

    @property
    def loss(self) -> float:
        """The first one's time by the winner's."""
        return next(iter(self.times.values())) / self.times[self.winner]

    @property
    def rank(self) -> int:
        """Of the winner in the list, from 0."""
        return list(self.times).index(self.winner)


class Tuner:
    """Stands in for tune.choose: the first time that it meets a choice it times all candidates, not only those that the
    cost model would keep, and writes a line of each. It returns the winner.

    Which candidate is being tried is noted in FOLDER/tuning.timing.jsonl: one in which a process died is reported, and
    left out by the next process. known: choices that were measured before. settle: waits for the device. lost: what
    keeps this process from using it any more, "" if nothing.
    """

    def __init__(
        self, folder: Path, results: Results, timer: Timer, deadline: Deadline, note: str = "",
        settle: Callable[[], object] = lambda: None, lost: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        self.results, self.timer, self.deadline, self.note = results, timer, deadline, note
        self.settle, self.lost = settle, lost
        self.known = measured(folder)
        self.begun = Results(folder, "tuning.timing")
        self.banned = self._report_deadly(folder)
        self.fine = True  # whether no candidate has failed

    @contextmanager
    def installed(self) -> Iterator[None]:
        with patch.object(tune, "choose", self.choose):
            yield

    def choose(
        self, kernel: str, key: tuple[object, ...], candidates: Sequence[Any], run: Callable[[Any], object],
        cost: Any = None, timer: Any = None,
    ) -> Any:  # fmt: skip
        """As tune.choose."""
        tiles = {repr(tile): tile for tile in candidates}
        choice = self.known.get((kernel, repr(key)))
        if choice is None:
            if len(candidates) == 1 or self.deadline.over():
                return candidates[0]
            works = {name: (lambda tile=tile: run(tile)) for name, tile in tiles.items()}
            choice = self.compare(kernel, repr(key), works, known_failures=tune._unfit())
        return tiles.get(choice.winner, candidates[0])

    def compare(self, kernel: str, key: str, works: Works, first: str = "", known_failures: Any = ()) -> Choice:
        """Times the works, which do the same, and writes a line of each. first: what runs untuned, else the first one.
        known_failures: exceptions that say that a device cannot run a candidate."""
        fit: dict[str, Callable[[], object]] = {}
        told: dict[str, str] = {}
        for name, work in works.items():
            if (kernel, key, name) in self.banned:
                told[name] = "a process died or failed in it"
                continue
            self.begun.write({"begin": [kernel, key, name]})
            try:
                work()
                self.settle()
                fit[name] = work
            except known_failures as error:
                told[name] = f"cannot run: {error}"
            except Exception as error:  # one candidate's: the others are timed all the same
                if self.lost():
                    raise
                told[name], self.fine = f"{type(error).__name__}: {error}", False
        timings = self.timer(fit) if fit else {}
        self.begun.write({"end": [kernel, key]})
        choice = Choice(kernel, key, {n: timings[n].median if n in timings else float("inf") for n in works})
        self.known[kernel, key] = choice
        first = first or next(iter(works))
        for rank, (name, time) in enumerate(choice.times.items()):
            line = {"kernel": kernel, "key": key, "tile": name, "median_ms": time, "first": name == first}
            line |= {"winner": name == choice.winner, "rank": rank, "message": told.get(name, self.note)}
            if name in told and not told[name].startswith("cannot run"):
                line["ok"] = False
            if name in timings:
                line |= {"q1_ms": timings[name].low, "q3_ms": timings[name].high}
            self.results.write(line)
        return choice

    def _report_deadly(self, folder: Path) -> set[tuple[str, str, str]]:
        """Candidates that were begun and whose choice never came to its end: the last one begun of each."""
        open_: dict[tuple[str, str], str] = {}
        for line in read(folder / "tuning.timing.jsonl"):
            if "begin" in line:
                kernel, key, tile = line["begin"]
                open_[kernel, key] = tile
            elif "end" in line:
                open_.pop(tuple(line["end"]), None)
        for (kernel, key), tile in open_.items():
            line = {"kernel": kernel, "key": key, "tile": tile, "median_ms": None, "first": False, "winner": False}
            self.results.write({**line, "ok": False, "message": "a process died or failed in it"})
        return {(kernel, key, tile) for (kernel, key), tile in open_.items()}


def measured(folder: Path) -> dict[tuple[str, str], Choice]:
    """By kernel and key, from the lines of processes before this one."""
    found: dict[tuple[str, str], Choice] = {}
    for line in read(folder / "tuning.jsonl"):
        if "tile" in line and "rank" in line:
            at = line["kernel"], line["key"]
            time = line["median_ms"]
            found.setdefault(at, Choice(*at)).times[line["tile"]] = float("inf") if time is None else time
    return found


def summaries(choices: Sequence[Choice]) -> Iterator[dict[str, Any]]:
    """Of each kernel, how good the order of its list is: the lists are what stands for a cost model, no launcher gives
    one to tune.choose."""
    for kernel in sorted({choice.kernel for choice in choices}):
        mine = [c for c in choices if c.kernel == kernel and c.times[c.winner] < float("inf")]
        if not mine:
            continue
        losses, ranks = [c.loss for c in mine], [c.rank for c in mine]
        counts = ", ".join(f"{rank}: {ranks.count(rank)}" for rank in sorted(set(ranks)))
        said = f"first candidate's time by the winner's, median of {len(mine)} choices, at worst {max(losses):.3f}"
        said += f"; winner's place in the list, and how often: {counts}"
        yield {"constant": f"loss of the first candidate: {kernel}", "value": statistics.median(losses), "from": said}
