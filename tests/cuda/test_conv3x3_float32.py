"""The float32 3x3 kernels of csrc/cuda on the host, against float64: shapes, widths, slices, schedules, sanitizers.
"ieee" multiplies float32 as it is, "tf32" on tensor cores what was rounded for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import emulator
import pytest
import torch
import torch.nn.functional as F
from conv3x3_case import DGRAD, FORWARD, SM_90_SHARED, WGRAD, Outcome
from conv3x3_float32_case import ONE_BLOCK, SM_80_SHARED, SM_86_SHARED, Case, Problem, launch_forward, run
from torch import Tensor

KERNELS = (FORWARD, DGRAD, WGRAD)
SCHEDULES = range(5)
SEVERAL_TILES = (6, 13, 9)  # three of the largest for each of two blocks
both_types = pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
all_kernels = pytest.mark.parametrize("kernel", KERNELS, ids=["forward", "dgrad", "wgrad"])

Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    directory = tmp_path_factory.mktemp("float32")
    return cache(lambda kind: emulator.build(directory, kind, program="runner_float32.cpp"))


@pytest.fixture(scope="module")
def runner(build: Build) -> Path:
    return build("plain")


def check(binary: Path, case: Case) -> Outcome:
    outcome = run(binary, case)
    assert outcome.error <= 1, f"output: {outcome.error:.2f} of what rounding allows"
    assert outcome.sums_error < 2e-6, f"sums: {outcome.sums_error:.1e}"
    return outcome


def name(value: object) -> str:
    return str(value).replace(" ", "")


@both_types
@pytest.mark.parametrize("images", [(3, 7, 7), (2, 13, 9), (2, 1, 1), (2, 3, 17), (1, 28, 28), (1, 2, 70)], ids=name)
@all_kernels
def test_shapes(runner: Path, kernel: int, images: tuple[int, int, int], tf32: bool) -> None:
    check(runner, Case(kernel, images, 64, 32, tf32=tf32))


WIDTHS = [(128, 32), (64, 16), (192, 48), (24, 8), (40, 40), (8, 64), (48, 12), (4, 4), (100, 20), (96, 28)]


@both_types
@pytest.mark.parametrize("widths", WIDTHS, ids=name)
@all_kernels
def test_widths(runner: Path, kernel: int, widths: tuple[int, int], tf32: bool) -> None:
    check(runner, Case(kernel, (2, 9, 10), *widths, tf32=tf32))


@both_types
@pytest.mark.parametrize("schedule", SCHEDULES)
@all_kernels
def test_schedules(runner: Path, kernel: int, schedule: int, tf32: bool) -> None:
    check(runner, Case(kernel, SEVERAL_TILES, 64, 32, tf32=tf32, schedule=schedule))


# in the order of the lists in dense_block_float32.cu
FORWARD_TILES = [
    Case(FORWARD, SEVERAL_TILES, 24, 32),
    Case(FORWARD, (8, 4, 11), 24, 32),
    Case(FORWARD, SEVERAL_TILES, 24, 24),
    Case(FORWARD, SEVERAL_TILES, 24, 16),
    Case(FORWARD, SEVERAL_TILES, 24, 16, multiprocessors=7),
    Case(FORWARD, SEVERAL_TILES, 24, 8),
    Case(FORWARD, SEVERAL_TILES, 24, 8, multiprocessors=7),
]
DGRAD_TILES = [
    Case(DGRAD, SEVERAL_TILES, 64, 24),
    Case(DGRAD, SEVERAL_TILES, 32, 24),
    Case(DGRAD, (3, 13, 9), 32, 24, multiprocessors=7),
]
WGRAD_TILES = [Case(WGRAD, SEVERAL_TILES, 72, g) for g in (32, 24, 16, 8)]


@both_types
@pytest.mark.parametrize("tiles", [FORWARD_TILES, DGRAD_TILES, WGRAD_TILES], ids=["forward", "dgrad", "wgrad"])
def test_every_tile(runner: Path, tiles: list[Case], tf32: bool) -> None:
    for i, case in enumerate(tiles):
        assert check(runner, replace(case, schedule=i % 5, tf32=tf32)).result.tile == i


@both_types
@all_kernels
def test_dropout(runner: Path, kernel: int, tf32: bool) -> None:
    check(runner, Case(kernel, (2, 9, 7), 64, 48, dropout=0.3, tf32=tf32))


@all_kernels
def test_channels_last_weight(runner: Path, kernel: int) -> None:
    check(runner, Case(kernel, (1, 5, 6), channels_last_weight=True))


@both_types
@all_kernels
def test_large_mean(runner: Path, kernel: int, tf32: bool) -> None:
    """What a folded norm would lose."""
    check(runner, Case(kernel, (2, 13, 9), mean=100.0, tf32=tf32))


@all_kernels
def test_far_apart(runner: Path, kernel: int) -> None:
    """Offsets beyond 32 bits."""
    check(runner, Case(kernel, (1, 3, 3), 32, 16, padding=0, guard=0, pitch=1 << 28))


@both_types
@all_kernels
def test_not_finite(runner: Path, kernel: int, tf32: bool) -> None:
    """NaN and infinity go where the convolution takes them; ReLU's masks are PyTorch's."""
    check(runner, Case(kernel, SEVERAL_TILES, 64, 32, not_finite=True, tf32=tf32))


@pytest.mark.parametrize("factor", [1e16, 1e20, 1e30])
def test_statistics_are_right_or_nan(runner: Path, factor: float) -> None:
    """Squares that float32 cannot hold must not become an infinite variance, which makes outputs finite."""
    _, got, (mean, var) = launch_forward(runner, Problem(Case(FORWARD, (2, 13, 9), factor=factor)))
    assert got.isfinite().all() and (mean - got.mean(0)).abs().max() <= 1e-6 * got.abs().max()
    if factor > 1e18:
        assert var.isnan().all()
    else:
        torch.testing.assert_close(var, got.var(0, correction=0), rtol=1e-5, atol=0)


@both_types
def test_without_statistics(runner: Path, tf32: bool) -> None:
    check(runner, Case(FORWARD, (2, 13, 9), statistics=False, tf32=tf32))


@both_types
@all_kernels
def test_many_blocks(runner: Path, kernel: int, tf32: bool) -> None:
    check(runner, Case(kernel, (3, 13, 9), 64, 32, multiprocessors=7, tf32=tf32))


@all_kernels
def test_repeatable(runner: Path, kernel: int) -> None:
    """What is counted, and the sums, are the same whatever the order of threads."""
    first, second = (check(runner, Case(kernel, (2, 7, 7), schedule=s)) for s in (0, 4))
    assert first == second


def naive(problem: Problem) -> Tensor:
    """[P, g] in float32, term by term."""
    case = problem.case
    columns = F.unfold(problem.image(problem.h().float()), 3, padding=1)  # [n, 9 b, h w]
    columns = columns.transpose(1, 2).reshape(case.pixels, -1)
    weight = problem.weight.reshape(case.growth, -1)
    total = torch.zeros(case.pixels, case.growth)
    for k in range(columns.shape[1]):
        total += columns[:, k, None] * weight[None, :, k]
    return total


def test_no_worse_than_a_naive_sum(runner: Path) -> None:
    problem = Problem(Case(FORWARD, (2, 9, 10), 128, 32))
    exact, (_, got, _) = problem.forward(), launch_forward(runner, problem)
    error, usual = ((x - exact).square().mean().sqrt() for x in (got, naive(problem)))
    assert 0 < error < 2 * usual


def test_tf32_rounds(runner: Path) -> None:
    """Products are off by the rounding of their inputs to ten bits; in full float32 they are not."""
    problem = Problem(Case(FORWARD, (2, 9, 10)))
    exact, rounded = problem.forward(), Problem(replace(problem.case, tf32=True))
    (_, ieee, _), (_, tf32, _) = launch_forward(runner, problem), launch_forward(runner, rounded)
    assert (ieee - exact).abs().max() < 2.0**-20 * exact.abs().max()
    assert 2.0**-16 < (tf32 - exact).abs().max() / exact.abs().max() < 2.0**-10


@both_types
@pytest.mark.parametrize("growth", [32, 24, 16, 8])
@all_kernels
def test_no_bank_conflicts(runner: Path, kernel: int, growth: int, tf32: bool) -> None:
    case = Case(kernel, SEVERAL_TILES, 128, growth, tf32=tf32, shared_bytes=ONE_BLOCK)
    counters = check(runner, case).result.counters
    assert counters["matrix_wavefronts"] == counters["matrices"]
    assert counters["narrow_wavefronts"] == counters["narrow_loads"]
    # wgrad's gradient: pixels of 16 columns lie so that products find no conflict, turning does; idle threads read too
    allowed = (1.25 if growth == 16 else 1.02) if kernel == WGRAD else 1
    assert counters["shared_load_wavefronts"] <= 4 * allowed * counters["shared_loads"]
    assert counters["shared_store_wavefronts"] <= 4 * allowed * counters["shared_stores"]
    assert (counters["mma"] > 0) == tf32


def test_bytes_moved(runner: Path) -> None:
    """Each pass writes its output once and reads its inputs with no more than the halo again."""
    case = Case(FORWARD, (2, 16, 32), 64, 32, shared_bytes=ONE_BLOCK, multiprocessors=1)
    z, piece = 4 * case.pixels * 64, 4 * case.pixels * 32
    forward, dgrad, wgrad = (check(runner, replace(case, kernel=k)).result for k in KERNELS)
    assert (forward.tile, dgrad.tile, wgrad.tile) == (0, 0, 0)
    weights = 4 * 9 * 64 * 32
    tiles = case.pixels // 256
    assert forward.counters["global_store_bytes"] == piece
    assert forward.counters["copy_bytes"] <= 1.57 * z + (tiles + 1) * weights
    assert dgrad.counters["global_store_bytes"] == dgrad.counters["global_load_bytes"] == z
    assert dgrad.counters["copy_bytes"] <= 2 * 1.57 * piece + (tiles + 1) * weights
    assert wgrad.counters["copy_bytes"] <= 1.57 * z + 2 * piece


@pytest.mark.parametrize("shared_bytes", [SM_80_SHARED, SM_86_SHARED, SM_90_SHARED])
@all_kernels
def test_shared_memory_of_devices(runner: Path, kernel: int, shared_bytes: int) -> None:
    check(runner, Case(kernel, (1, 8, 8), 512, 32, shared_bytes=shared_bytes))


def test_what_is_not_supported(runner: Path) -> None:
    for case, reason in (
        (Case(FORWARD, (1, 2, 2), growth=6), "multiples of 4"),
        (Case(FORWARD, (1, 2, 2), bottleneck=18), "multiples of 4"),
        (Case(FORWARD, (1, 2, 2), shared_bytes=48 * 1024), "shared memory"),
        (Case(FORWARD, (1, 2, 2), padding=2), "4 channels apart"),
        (Case(FORWARD, (1, 2, 2), float32_weight=False), "must be float32"),
    ):
        with pytest.raises(emulator.Failure, match=reason):
            run(runner, case)


# Exact buffers: nothing lies beside what the kernels may touch.
@both_types
@pytest.mark.parametrize("widths", [(40, 24), (64, 32), (28, 12)], ids=name)
@all_kernels
def test_address_sanitizer(build: Build, kernel: int, widths: tuple[int, int], tf32: bool) -> None:
    case = Case(kernel, (2, 7, 9), *widths, padding=0, guard=0, dropout=0.2, schedule=2, tf32=tf32)
    check(build("asan"), case)


@pytest.mark.parametrize("schedule", [0, 4])
@all_kernels
def test_thread_sanitizer(build: Build, kernel: int, schedule: int) -> None:
    case = Case(kernel, SEVERAL_TILES, 40, 24, schedule=schedule, tf32=schedule == 0)
    check(build("tsan"), case)
