"""The choice of a configuration: pruned, timed with an injected timer, remembered in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csp_kernels.kernels import tune as tuning
from csp_kernels.kernels.tune import cache_file, choose, tune


@dataclass(frozen=True)
class Tile:
    pixels: int
    warps: int = 4


TILES = [Tile(pixels) for pixels in (16, 32, 64, 128, 256)]


@dataclass
class Clock:
    """Runs the work, and takes from `spent` what it is said to have taken."""

    spent: dict[Tile, float] = field(default_factory=dict)
    ran: list[Tile] = field(default_factory=list)

    def run(self, tile: Tile) -> None:
        self.ran.append(tile)

    def time(self, work: Callable[[], None]) -> float:
        work()
        return self.spent.get(self.ran[-1], 10.0 + self.ran[-1].pixels)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(tuning, "_on", False)
    return tmp_path / "cache"


def forget() -> None:
    """As a new process would."""
    tuning._winners.clear()


def pick(
    clock: Clock, tiles: Sequence[Tile] = TILES, key: tuple[object, ...] = ("float32", 64), **more: object
) -> Tile:
    return choose("mix.forward", key, tiles, clock.run, timer=clock.time, **more)  # type: ignore[arg-type]


def test_off_takes_the_first_and_runs_nothing(cache_folder: Path) -> None:
    clock = Clock({TILES[1]: 1.0})
    assert pick(clock) == TILES[0] and not clock.ran
    with tune():
        with tune(False):
            assert pick(clock) == TILES[0] and not clock.ran
        assert pick(clock) == TILES[1]
    assert pick(clock) == TILES[0]  # though a winner is known


def test_one_candidate_is_not_timed() -> None:
    clock = Clock()
    with tune():
        assert pick(clock, TILES[2:3]) == TILES[2] and not clock.ran


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: False)
    clock = Clock()
    with tune():
        assert choose("mix.forward", (), TILES, clock.run) == TILES[0] and not clock.ran


def test_the_fastest_of_the_cheapest_and_the_first() -> None:
    clock = Clock({TILES[1]: 0.0, TILES[2]: 2.0, TILES[3]: 1.0})
    with tune():
        assert pick(clock, cost=lambda tile: -tile.pixels) == TILES[3]
    assert clock.ran == [TILES[0], TILES[4], TILES[3], TILES[2]]  # TILES[1] is fast but was predicted not to be


def test_a_tie_goes_to_the_earlier() -> None:
    clock = Clock(dict.fromkeys(TILES, 1.0))
    with tune():
        assert pick(clock) == TILES[0]


def test_remembered_in_memory_and_on_disk_by_key() -> None:
    clock = Clock({TILES[1]: 1.0})
    with tune():
        assert pick(clock) == pick(clock) == TILES[1] and len(clock.ran) == 3
        forget()
        assert pick(clock) == TILES[1] and len(clock.ran) == 3
        clock.spent = {TILES[2]: 1.0}
        assert pick(clock, key=("float64", 64)) == TILES[2] and len(clock.ran) == 6
        assert choose("conv3x3.forward", ("float32", 64), TILES, clock.run, timer=clock.time) == TILES[2]
    assert len(json.loads(cache_file().read_text())) == 3


def test_none_is_a_candidate_like_any() -> None:
    """Another kernel altogether."""
    times, ran = {None: 1.0, TILES[0]: 2.0}, []
    with tune():
        for _ in range(2):
            choice = choose("mix", (), [TILES[0], None], ran.append, timer=lambda work: (work(), times[ran[-1]])[1])
            assert choice is None and len(ran) == 2


def test_a_winner_that_is_no_candidate_any_more_is_tuned_again() -> None:
    clock = Clock({TILES[1]: 1.0})
    with tune():
        assert pick(clock) == TILES[1]
        assert pick(clock, TILES[2:]) == TILES[2]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"{\"mix.forward ('float32', 64)\": 3}", b"\xff\xfe"])
def test_a_damaged_file_is_replaced(content: bytes) -> None:
    cache_file().parent.mkdir()
    cache_file().write_bytes(content)
    clock = Clock({TILES[1]: 1.0})
    with tune():
        assert pick(clock) == TILES[1]
    assert json.loads(cache_file().read_text()) == {"mix.forward ('float32', 64)": repr(TILES[1])}
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]  # nothing left over


def test_what_other_processes_wrote_stays() -> None:
    clock = Clock({TILES[1]: 1.0})
    with tune():
        pick(clock)
        other = {**json.loads(cache_file().read_text()), "another kernel": "Tile()"}
        cache_file().write_text(json.dumps(other))
        pick(clock, key=("float64", 64))
    assert set(json.loads(cache_file().read_text())) == {*other, "mix.forward ('float64', 64)"}


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(tuning.DIRECTORY, str(tmp_path / "file"))
    clock = Clock({TILES[1]: 1.0})
    with tune(), pytest.warns(RuntimeWarning, match="not kept"):
        assert pick(clock) == TILES[1]
    with tune():
        assert pick(clock) == TILES[1] and len(clock.ran) == 3


def test_never_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({TILES[1]: 1.0})
    with tune():
        path = cache_file()
        with monkeypatch.context() as capturing:
            capturing.setattr(tuning, "cache_file", lambda: path)
            capturing.setattr(tuning.torch.cuda, "is_available", lambda: True)
            capturing.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: True)
            assert pick(clock) == TILES[0] and not clock.ran
        assert pick(clock) == TILES[1]
        with monkeypatch.context() as capturing:
            capturing.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: True)
            assert pick(clock) == TILES[1] and len(clock.ran) == 3


def test_candidates_that_cannot_run_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge(Exception):
        pass

    monkeypatch.setattr(tuning, "_unfit", lambda: (TooLarge,))
    clock = Clock({TILES[2]: 1.0})

    def time(work: Callable[[], None]) -> float:
        work()
        if clock.ran[-1] == TILES[0]:
            raise TooLarge("shared memory")
        return clock.time(work)

    with tune(), pytest.warns(RuntimeWarning, match="cannot run: shared memory"):
        assert choose("mix.forward", (), TILES, clock.run, timer=time) == TILES[2]


def test_the_file_depends_on_device_triton_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    name = cache_file().name
    assert name.endswith(".json") and name.count("-") >= 2
    tuning._file_name.cache_clear()
    monkeypatch.setattr(tuning.importlib.metadata, "version", lambda _: "99.9")
    assert "-99.9-" in cache_file().name != name
    tuning._file_name.cache_clear()
