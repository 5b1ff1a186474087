"""What `make test` leaves to `make verify`, and faults that fit into a budget."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sampling


def marked(function: str, count: int) -> list[bool]:
    """Which of so many cases are left to `make verify`."""
    tests = Path("tests")
    file, _, name = function.partition("::")
    left: list[int] = []
    items: list[Any] = [
        SimpleNamespace(
            path=tests / file, originalname=name, name=f"{name}[{i}]", add_marker=lambda _, i=i: left.append(i)
        )
        for i in range(count)
    ]
    sampling.mark_the_many(items, tests)
    return [i in left for i in range(count)]


@pytest.mark.parametrize("enough", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_spread(count: int, enough: int) -> None:
    kept = sampling.spread(count, enough)
    assert len(kept) == min(count, enough) and 0 in kept and (enough == 1 or count - 1 in kept)
    assert kept <= set(range(count))


def test_cases_of_each_function_stay() -> None:
    assert marked("kernels/test_mix.py::test_forward", 4) == [False, True, True, True]
    assert marked("cuda/test_conv3x3.py::test_shapes", 4) == [False, True, True, False]
    assert marked("layers/test_dense_block.py::test_compiled_eval", 3) == [False, True, False]
    assert marked("layers/test_dense_block.py::test_modes", 9) == [False] * 9
    assert marked("cuda/test_conv3x3.py::test_single", 1) == [False]
    assert marked("cuda/test_conv3x3.py::test_address_sanitizer", 2) == [True, True]


def test_within(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All without a budget; with one, others on another day, and how many is said."""
    things = list(range(50))
    assert list(sampling.within(0, things)) == things
    clock = iter(range(1000))
    monkeypatch.setattr(sampling.time, "monotonic", lambda: next(clock))
    drawn = [list(sampling.within(10, things, seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and all(0 < len(d) == len(set(d)) <= 10 for d in drawn)
    assert f"tried {len(drawn[0])} of 50 in" in capsys.readouterr().out
