"""What keeps a device busy on small maps: deep and small tiles, channels split over blocks, and who chooses them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import emulator
import pytest
import torch
from conv3x3_case import DGRAD, FORWARD, SM_90_SHARED, WGRAD, Case, Outcome, run

LAUNCH_NS = "2000"  # dense_block.h


@dataclass(frozen=True)
class Planned:
    """A forward case, and what the planner makes of it."""

    images: tuple[int, int, int]
    bottleneck: int
    growth: int
    multiprocessors: int
    tile: int
    splits: int = 1

    def __str__(self) -> str:
        images = "x".join(map(str, self.images))
        return f"{images}-b{self.bottleneck}-g{self.growth}-m{self.multiprocessors}-tile{self.tile}-{self.splits}splits"

    def case(self) -> Case:
        dtype = torch.bfloat16 if self.growth % 16 else torch.float16
        return Case(FORWARD, self.images, self.bottleneck, self.growth, dtype, multiprocessors=self.multiprocessors)


# with launches that cost nothing: last splits of fewer or ragged channels, several tiles a block, several rounds
SPLIT = (
    Planned((1, 7, 7), 40, 16, 3, 8, 2),
    Planned((1, 7, 7), 40, 24, 24, 11, 2),
    Planned((1, 3, 3), 96, 24, 3, 5, 3),
    Planned((1, 7, 7), 128, 32, 24, 11, 4),
    Planned((1, 7, 7), 128, 32, 3, 2, 4),
    Planned((2, 5, 6), 192, 32, 24, 8, 6),
    Planned((1, 7, 7), 192, 48, 132, 11, 6),
    Planned((2, 7, 7), 256, 24, 24, 5, 8),
    Planned((1, 3, 3), 512, 32, 3, 12, 8),
    Planned((1, 3, 3), 520, 8, 6, 14, 5),
    Planned((2, 7, 7), 392, 16, 4, 16, 4),
    Planned((1, 7, 7), 1000, 24, 132, 17, 8),
    Planned((1, 20, 20), 520, 32, 6, 2, 6),
)
# with launches that cost what they cost
DEEP = (
    Planned((1, 7, 7), 40, 32, 3, 12),
    Planned((1, 3, 3), 40, 32, 3, 13),
    Planned((1, 7, 7), 40, 24, 24, 14),
    Planned((2, 9, 10), 128, 32, 4, 15),
    Planned((2, 7, 7), 128, 16, 3, 16),
    Planned((2, 7, 7), 128, 8, 3, 17),
    Planned((2, 13, 9), 128, 32, 24, 16),
    Planned((1, 7, 7), 192, 48, 132, 17),
)
FOUR = SPLIT[3]


def check(binary: Path, case: Case, tile: int, splits: int = 1) -> Outcome:
    outcome = run(binary, case)
    assert divmod(outcome.result.tile, 256) == (splits - 1, tile)
    assert outcome.error <= 1, f"output: {outcome.error:.2f} of what rounding allows"
    assert outcome.sums_error < 2e-6, f"sums: {outcome.sums_error:.1e}"
    return outcome


@pytest.fixture
def free_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSP_LAUNCH_NS", "0")


@pytest.mark.usefixtures("free_launches")
@pytest.mark.parametrize("planned", SPLIT, ids=str)
def test_splits(runner: Path, planned: Planned) -> None:
    check(runner, planned.case(), planned.tile, planned.splits)


@pytest.mark.parametrize("planned", DEEP, ids=str)
def test_deep_tiles(runner: Path, planned: Planned) -> None:
    check(runner, planned.case(), planned.tile)


@pytest.mark.usefixtures("free_launches")
@pytest.mark.parametrize("planned", SPLIT[5:7], ids=str)
@pytest.mark.parametrize("statistics", [True, False])
def test_dropout_of_splits(runner: Path, planned: Planned, statistics: bool) -> None:
    check(runner, replace(planned.case(), dropout=0.3, statistics=statistics), planned.tile, planned.splits)


@pytest.mark.parametrize("statistics", [True, False])
def test_dropout_of_deep_tiles(runner: Path, statistics: bool) -> None:
    check(runner, replace(DEEP[2].case(), dropout=0.3, statistics=statistics), DEEP[2].tile)


@pytest.mark.usefixtures("free_launches")
def test_splits_of_a_large_mean(runner: Path) -> None:
    check(runner, replace(FOUR.case(), mean=100.0), FOUR.tile, FOUR.splits)


@pytest.mark.usefixtures("free_launches")
@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("planned", [FOUR, SPLIT[10], SPLIT[4]], ids=str)
def test_schedules_of_splits(runner: Path, planned: Planned, schedule: int) -> None:
    check(runner, replace(planned.case(), schedule=schedule), planned.tile, planned.splits)


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("planned", [DEEP[0], DEEP[5]], ids=str)
def test_schedules_of_deep_tiles(runner: Path, planned: Planned, schedule: int) -> None:
    check(runner, replace(planned.case(), schedule=schedule), planned.tile)


@pytest.mark.usefixtures("free_launches")
def test_splits_are_repeatable(runner: Path) -> None:
    """What is counted, and the sums, are the same whatever the order of threads."""
    planned = SPLIT[-1]
    first, second = (check(runner, replace(planned.case(), schedule=s), planned.tile, planned.splits) for s in (0, 4))
    assert first == second


@pytest.mark.usefixtures("free_launches")
def test_bytes_of_splits(runner: Path) -> None:
    """Sums of splits are written and read once, the slice is written once, z is read once a block of columns."""
    case = Case(FORWARD, (1, 8, 8), 128, 32, multiprocessors=24)
    counters = check(runner, case, 11, 4).result.counters
    z, sums, out = 2 * 64 * 128, 4 * 4 * 64 * 32, 2 * 64 * 32
    assert counters["global_store_bytes"] == sums + out
    assert 4 * z + sums <= counters["global_load_bytes"] <= 2 * 4 * z + sums


@pytest.mark.usefixtures("free_launches")
@pytest.mark.parametrize("planned", [*SPLIT[2:6], *SPLIT[8:12]], ids=str)
def test_no_bank_conflicts(runner: Path, planned: Planned) -> None:
    counters = check(runner, planned.case(), planned.tile, planned.splits).result.counters
    assert counters["matrix_wavefronts"] == counters["matrices"] > 0
    # idle threads of a ragged stage read too
    assert counters["shared_load_wavefronts"] <= 4.05 * counters["shared_loads"]
    assert counters["shared_store_wavefronts"] <= 4 * counters["shared_stores"]


@pytest.mark.parametrize("case, tile", [
    (Case(DGRAD, (1, 7, 7), 40, 24, multiprocessors=24), 9),
    (Case(DGRAD, (3, 7, 7), 96, 32, torch.bfloat16, multiprocessors=24), 9),
    (Case(DGRAD, (2, 13, 9), 40, 24, multiprocessors=24, dropout=0.3), 8),
    (Case(DGRAD, (1, 7, 7), 40, 24, multiprocessors=3), 8),
    (Case(WGRAD, (1, 7, 7), 128, 32, multiprocessors=24), 3),
    (Case(WGRAD, (2, 13, 9), 128, 32, torch.bfloat16, multiprocessors=24, dropout=0.3), 2),
    (Case(WGRAD, (3, 7, 7), 96, 24, multiprocessors=24), 3),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("schedule", [0, 3])
def test_small_tiles_of_gradients(runner: Path, case: Case, tile: int, schedule: int) -> None:
    check(runner, replace(case, schedule=schedule), tile)


# Exact buffers: nothing lies beside what the kernels may touch.
@pytest.mark.usefixtures("free_launches")
@pytest.mark.parametrize("planned", [SPLIT[5], SPLIT[9]], ids=str)
def test_address_sanitizer(build: Callable[[str], Path], planned: Planned) -> None:
    case = replace(planned.case(), padding=0, guard=0, dropout=0.2, schedule=2)
    check(build("asan"), case, planned.tile, planned.splits)


@pytest.mark.usefixtures("free_launches")
@pytest.mark.parametrize("planned", [FOUR, SPLIT[10]], ids=str)
def test_thread_sanitizer(build: Callable[[str], Path], planned: Planned) -> None:
    check(build("tsan"), replace(planned.case(), schedule=4), planned.tile, planned.splits)


@dataclass(frozen=True)
class Choice:
    tile: int
    splits: int
    blocks: int
    ns: int  # predicted


@dataclass(frozen=True)
class Plan:
    name: str
    pixels: int
    now: Choice
    usual: Choice


def plans(binary: Path, multiprocessors: int, shared: int, layers: Sequence[tuple[int, ...]], ns: str) -> list[Plan]:
    text = "\n".join(" ".join(map(str, layer)) for layer in layers)
    command = [str(binary), str(multiprocessors), str(shared), ns]
    found = []
    for line in subprocess.run(command, input=text, text=True, capture_output=True, check=True).stdout.splitlines():
        n, h, w, b, g, kernel, *numbers = line.split()
        values = [int(v) for v in numbers]
        name = f"{h}x{w} x{n}, {b} to {g}, {kernel}"
        found.append(Plan(name, int(n) * int(h) * int(w), Choice(*values[:4]), Choice(*values[4:])))
    return found


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(tmp_path_factory.mktemp("plans"), program="plans.cpp")


DENSENET = [(n, hw, hw, 128, 32) for hw in (56, 28, 14, 7) for n in (1, 8, 32, 64)]
DEVICES = [(132, SM_90_SHARED), (108, 163 * 1024)]  # H100, A100


@pytest.mark.parametrize("multiprocessors, shared", DEVICES)
def test_plans(planner: Path, multiprocessors: int, shared: int) -> None:
    """Where more than half of a device was idle it is no longer, or no tile is smaller; large maps are as they were."""
    found = plans(planner, multiprocessors, shared, DENSENET, LAUNCH_NS)
    assert len(found) == 3 * len(DENSENET)
    for plan in found:
        print(f"{plan.name:28} {plan.usual.blocks:4} -> {plan.now.blocks:4} blocks "
              f"{plan.usual.ns:6} -> {plan.now.ns:6} ns, tile {plan.now.tile:2}, {plan.now.splits} splits")  # fmt: skip
        assert plan.now.ns <= plan.usual.ns
        if 2 * plan.usual.blocks < multiprocessors:
            assert plan.now.blocks > plan.usual.blocks, plan.name
            assert plan.now.ns < plan.usual.ns, plan.name
        if plan.pixels >= 32 * 28 * 28:
            assert plan.now == plan.usual, plan.name


def test_a_launch_is_not_free(planner: Path) -> None:
    """Splits of DenseNet's 128 channels save less than a launch; those of many channels do not."""
    small, wide = (1, 7, 7, 128, 32), (1, 7, 7, 1024, 32)
    assert [plans(planner, *DEVICES[0], [small], ns)[0].now.splits for ns in ("0", LAUNCH_NS)] == [4, 1]
    assert plans(planner, *DEVICES[0], [wide], LAUNCH_NS)[0].now.splits == 8
