"""The 3x3 kernels of csrc/cuda on the host, against float64: shapes, widths, slices, schedules, sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import emulator
import pytest
import torch
from conv3x3_case import DGRAD, FORWARD, SM_90_SHARED, WGRAD, Case, Outcome, run

HALF, BFLOAT16 = torch.float16, torch.bfloat16
KERNELS = (FORWARD, DGRAD, WGRAD)
SCHEDULES = range(5)
SM_80_SHARED = 163 * 1024
SEVERAL_TILES = (3, 13, 9)  # at least three of every kernel's


def check(binary: Path, case: Case) -> Outcome:
    outcome = run(binary, case)
    assert outcome.error <= 1, f"output: {outcome.error:.2f} of what rounding allows"
    assert outcome.sums_error < 2e-6, f"sums: {outcome.sums_error:.1e}"
    return outcome


def name(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=name)
@pytest.mark.parametrize("images", [(3, 7, 7), (2, 13, 9), (2, 1, 1), (2, 3, 17), (1, 28, 28), (1, 2, 70)], ids=name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes(runner: Path, kernel: int, images: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(runner, Case(kernel, images, 64, 32, dtype))


@pytest.mark.parametrize("widths", [(128, 32), (64, 16), (192, 48), (96, 24), (24, 8), (40, 40), (8, 64)], ids=name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_widths(runner: Path, kernel: int, widths: tuple[int, int]) -> None:
    check(runner, Case(kernel, (2, 9, 10), *widths, dtype=BFLOAT16 if widths[1] % 16 else HALF))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_schedules(runner: Path, kernel: int, schedule: int) -> None:
    check(runner, Case(kernel, SEVERAL_TILES, 64, 32, schedule=schedule))


# in the order of the lists in dense_block.cu: columns and rows of a warp; low images leave tall tiles empty
FORWARD_TILES = [(g, h) for g in (32, 24, 16, 8) for h in (7, 4, 2)]


@pytest.mark.parametrize("tile", range(12))
def test_every_forward_tile(runner: Path, tile: int) -> None:
    growth, height = FORWARD_TILES[tile]
    case = Case(FORWARD, (8, height, 11), 40, growth, schedule=tile % 5)
    assert check(runner, case).result.tile == tile


@pytest.mark.parametrize("tile", range(8))
def test_every_dgrad_tile(runner: Path, tile: int) -> None:
    case = Case(DGRAD, SEVERAL_TILES, (128, 96, 64, 32)[tile % 4], (24, 40)[tile // 4], schedule=tile % 5)
    assert check(runner, case).result.tile == tile


@pytest.mark.parametrize("tile", range(4))
def test_every_wgrad_tile(runner: Path, tile: int) -> None:
    case = Case(WGRAD, SEVERAL_TILES, 72, (32, 24, 16, 8)[tile], schedule=tile)
    assert check(runner, case).result.tile == tile


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout(runner: Path, kernel: int) -> None:
    check(runner, Case(kernel, (2, 9, 7), 64, 48, dropout=0.3))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("float32, channels_last", [(True, False), (True, True), (False, True)])
def test_weights(runner: Path, kernel: int, float32: bool, channels_last: bool) -> None:
    check(runner, Case(kernel, (1, 5, 6), float32_weight=float32, channels_last_weight=channels_last))


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_mean(runner: Path, kernel: int) -> None:
    check(runner, Case(kernel, (2, 13, 9), mean=100.0))


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_apart(runner: Path, kernel: int) -> None:
    """Offsets beyond 32 bits."""
    check(runner, Case(kernel, (1, 3, 3), 32, 16, padding=0, guard=0, pitch=1 << 28))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_not_finite(runner: Path, kernel: int, dtype: torch.dtype) -> None:
    """NaN and infinity go where the convolution takes them; ReLU's masks are PyTorch's."""
    check(runner, Case(kernel, SEVERAL_TILES, 64, 32, dtype, not_finite=True))


def test_without_statistics(runner: Path) -> None:
    check(runner, Case(FORWARD, (2, 13, 9), statistics=False))


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_blocks(runner: Path, kernel: int) -> None:
    check(runner, Case(kernel, (3, 13, 9), 64, 32, multiprocessors=7))


def test_little_shared_memory(runner: Path) -> None:
    """Weights that do not fit are multiplied by blocks of columns."""
    case = Case(FORWARD, (1, 8, 8), 256, 32, shared_bytes=SM_80_SHARED)
    wide = replace(case, shared_bytes=SM_90_SHARED)
    assert check(runner, case).result.tile != check(runner, wide).result.tile


@pytest.mark.parametrize("kernel", KERNELS)
def test_repeatable(runner: Path, kernel: int) -> None:
    """What is counted, and the sums, are the same whatever the order of threads."""
    first, second = (check(runner, Case(kernel, (2, 7, 7), schedule=s)) for s in (0, 4))
    assert first == second


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("growth", [32, 24, 16, 8])
def test_no_bank_conflicts(runner: Path, kernel: int, growth: int) -> None:
    counters = check(runner, Case(kernel, SEVERAL_TILES, 128, growth)).result.counters
    assert counters["matrix_wavefronts"] == counters["matrices"] > 0
    # idle threads of a ragged stage read too
    assert counters["shared_load_wavefronts"] <= 4.05 * counters["shared_loads"]
    assert counters["shared_store_wavefronts"] <= 4 * counters["shared_stores"]


def test_bytes_moved(runner: Path) -> None:
    """Each pass writes its output once and reads its inputs with no more than the halo again."""
    case = Case(FORWARD, (2, 16, 32), 64, 32)
    elements = {"z": 2 * case.pixels * 64, "slice": 2 * case.pixels * 32}
    forward, dgrad, wgrad = (check(runner, replace(case, kernel=k)).result.counters for k in KERNELS)
    assert forward["global_store_bytes"] == elements["slice"]
    assert elements["z"] <= forward["global_load_bytes"] < 1.57 * elements["z"]
    assert dgrad["global_store_bytes"] == elements["z"]
    assert dgrad["global_load_bytes"] < elements["z"] + 2 * 1.57 * elements["slice"]
    assert wgrad["copy_bytes"] < 1.57 * elements["z"] + 2 * elements["slice"] + 1


def test_what_is_not_supported(runner: Path) -> None:
    for case, reason in (
        (Case(FORWARD, (1, 2, 2), growth=12), "multiples of 8"),
        (Case(FORWARD, (1, 2, 2), shared_bytes=48 * 1024), "shared memory"),
        (Case(FORWARD, (1, 2, 2), bottleneck=20), "multiples of 8"),
    ):
        with pytest.raises(emulator.Failure, match=reason):
            run(runner, case)


# Exact buffers: nothing lies beside what the kernels may touch.
@pytest.mark.parametrize("widths", [(40, 24), (64, 32), (24, 8)], ids=name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_address_sanitizer(build: Callable[[str], Path], kernel: int, widths: tuple[int, int]) -> None:
    check(build("asan"), Case(kernel, (2, 7, 9), *widths, padding=0, guard=0, dropout=0.2, schedule=2))


@pytest.mark.parametrize("schedule", [0, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_thread_sanitizer(build: Callable[[str], Path], kernel: int, schedule: int) -> None:
    check(build("tsan"), Case(kernel, SEVERAL_TILES, 40, 16, schedule=schedule))
