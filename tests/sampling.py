"""Which tests `make test` leaves to `make verify`, and which planted faults fit into a time budget."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
# Folder of tests -> cases of a test function that are enough for each change; others are marked "verify".
SAMPLES = {"kernels": 1, "cuda": 2}


def spread(count: int, enough: int) -> set[int]:
    """Indices of `enough` of `count` things, first and last and evenly between; all if they are not more."""
    if count <= enough:
        return set(range(count))
    return {round(i * (count - 1) / max(1, enough - 1)) for i in range(enough)}


def mark_the_many(items: Iterable[pytest.Item], tests: Path) -> None:
    """Mark what `make test` leaves out: of each function in SAMPLES all but a few cases."""
    functions: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.parent.parent == tests and item.path.parent.name in SAMPLES:
            functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for (path, _), cases in functions.items():
        kept = spread(len(cases), SAMPLES[path.parent.name])
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker("verify")


def within(budget: float, things: Sequence[T], seed: int | None = None) -> Iterator[T]:
    """All of them in order (budget 0), or some, drawn anew every day, until so many seconds are over."""
    if not budget:
        yield from things
        return
    seed = date.today().toordinal() if seed is None else seed
    start, tried = time.monotonic(), 0
    for thing in random.Random(seed).sample(things, len(things)):
        if time.monotonic() - start > budget:
            break
        yield thing
        tried += 1
    print(f"tried {tried} of {len(things)} in {time.monotonic() - start:.0f} s, drawn with seed {seed}")
