"""The dense layer in one kernel (csrc/cuda/dense_layer.cu) on the host, against float64; and as nvcc builds it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cubins
import emulator
import pytest
import torch
from dense_layer_case import Case, Outcome, run

HALF, BFLOAT16 = torch.float16, torch.bfloat16
SM_80_SHARED = 163 * 1024
PROGRAM = "runner_dense_layer.cpp"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("dense_layer")
    return cache(lambda kind: emulator.build(directory, kind, program=PROGRAM))


@pytest.fixture(scope="module")
def runner(build: Callable[[str], Path]) -> Path:
    return build("plain")


def check(binary: Path, case: Case) -> Outcome:
    outcome = run(binary, case)
    assert outcome.error <= 1, f"{outcome.error:.2f} of what rounding allows"
    return outcome


def name(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


IMAGES = [(3, 7, 7), (2, 13, 9), (2, 1, 1), (2, 3, 17), (1, 28, 28), (1, 2, 70), (5, 14, 14), (1, 29, 5), (9, 2, 2)]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=name)
@pytest.mark.parametrize("images", IMAGES, ids=name)
def test_shapes(runner: Path, images: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(runner, Case(images, dtype=dtype))


WIDTHS = [(64, 128, 32), (256, 128, 32), (72, 48, 24), (1000, 192, 48), (8, 8, 8), (40, 64, 16), (72, 256, 64)]


@pytest.mark.parametrize("widths", [*WIDTHS, (136, 96, 40), (40, 72, 56)], ids=name)
def test_widths(runner: Path, widths: tuple[int, int, int]) -> None:
    check(runner, Case((2, 9, 10), *widths, dtype=BFLOAT16 if widths[1] % 64 else HALF))


# Three tiles a block or more. One step of the 1x1 and of the 3x3 each, or several.
@pytest.mark.parametrize("widths", [(64, 64, 32), (24, 32, 48)], ids=name)
@pytest.mark.parametrize("schedule", range(5))
def test_schedules(runner: Path, schedule: int, widths: tuple[int, int, int]) -> None:
    outcome = check(runner, Case((4, 13, 9), *widths, schedule=schedule))
    assert outcome.plan.down == outcome.plan.across == outcome.plan.blocks == 1


@pytest.mark.parametrize("tile", range(10))
def test_every_tile(runner: Path, tile: int) -> None:
    """In the order of the list: by growth, then by rows; four tiles a block."""
    growth, images = (32, 24, 16, 48, 64)[tile // 2], ((4, 13, 9), (4, 8, 11))[tile % 2]
    outcome = check(runner, Case(images, 40, 40, growth, schedule=tile % 5))
    assert outcome.plan.tile == tile and outcome.plan.down == outcome.plan.across == 1


@pytest.mark.parametrize(
    "images, plan",
    [
        ((2, 14, 14), (14, 14, 1, 1)),
        ((4, 7, 7), (7, 7, 2, 2)),
        ((1, 56, 56), (14, 14, 1, 1)),
        ((2, 40, 6), (14, 6, 1, 2)),
        ((9, 3, 12), (3, 12, 4, 1)),
    ],
    ids=name,
)
def test_cuts(runner: Path, images: tuple[int, int, int], plan: tuple[int, int, int, int]) -> None:
    """Cells of a height and width, so many down and across a tile."""
    got = check(runner, Case(images, 16, 32, 32)).plan
    assert (got.height, got.width, got.down, got.across) == plan


def test_dropout(runner: Path) -> None:
    check(runner, Case((2, 9, 7), growth=48, dropout=0.3))


@pytest.mark.parametrize("float32, transposed", [(True, False), (True, True), (False, True)])
def test_weights(runner: Path, float32: bool, transposed: bool) -> None:
    check(runner, Case((1, 5, 6), 40, 72, 24, float32_weight=float32, transposed_weight=transposed))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=name)
def test_large_mean(runner: Path, dtype: torch.dtype) -> None:
    check(runner, Case((2, 13, 9), mean=100.0, dtype=dtype))


def test_far_apart(runner: Path) -> None:
    """Offsets beyond 32 bits."""
    check(runner, Case((1, 3, 3), 32, 32, 16, exact=True, pitch=1 << 28))


def test_many_blocks(runner: Path) -> None:
    assert check(runner, Case((3, 20, 20), multiprocessors=7)).plan.blocks == 7


@pytest.mark.parametrize("widths", [(256, 128, 32), (1000, 128, 32), (256, 192, 48)], ids=name)
def test_sm_80(runner: Path, widths: tuple[int, int, int]) -> None:
    check(runner, Case((1, 14, 14), *widths, shared_bytes=SM_80_SHARED))


def test_repeatable(runner: Path) -> None:
    """What is counted is the same whatever the order of threads."""
    first, second = (check(runner, Case((2, 9, 9), schedule=s)) for s in (0, 4))
    assert first == second


@pytest.mark.parametrize("images", [(1, 28, 28), (4, 7, 7)], ids=name)
@pytest.mark.parametrize("widths", [(64, 128, 32), (64, 64, 24), (64, 192, 16), (64, 64, 48)], ids=name)
def test_no_bank_conflicts(runner: Path, images: tuple[int, int, int], widths: tuple[int, int, int]) -> None:
    counters = check(runner, Case(images, *widths)).result.counters
    assert counters["matrix_wavefronts"] == counters["matrices"] > 0
    assert counters["shared_load_wavefronts"] <= 4 * counters["shared_loads"]
    assert counters["shared_store_wavefronts"] <= 4 * counters["shared_stores"]


@pytest.mark.parametrize("images, halo", [((1, 56, 56), 62**2 / 56**2), ((4, 14, 14), 1), ((8, 7, 7), 1)], ids=name)
def test_bytes_moved(runner: Path, images: tuple[int, int, int], halo: float) -> None:
    """Features once and the halo again, the slice once, weights once a tile; the bottleneck does not move."""
    case = Case(images, 64, 128, 32)
    outcome = check(runner, case)
    counters, plan = outcome.result.counters, outcome.plan
    tiles = case.pixels // (plan.height * plan.width * plan.down * plan.across)
    assert counters["global_load_bytes"] == round(halo * case.pixels) * 2 * 64
    assert counters["global_store_bytes"] == case.pixels * 2 * 32
    assert counters["copy_bytes"] == tiles * 2 * 128 * (64 + 9 * 32)


def test_what_is_not_supported(runner: Path) -> None:
    for case, reason in (
        (Case((1, 2, 2), growth=12), "multiples of 8"),
        (Case((1, 2, 2), entering=20), "multiples of 8"),
        (Case((1, 2, 2), bottleneck=264), "too many channels"),
        (Case((1, 2, 2), growth=72), "too many channels"),
        (Case((1, 2, 2), shared_bytes=32 * 1024), "shared memory"),
    ):
        with pytest.raises(emulator.Failure, match=reason):
            run(runner, case)


def test_where_it_wins(runner: Path) -> None:
    lines = [
        "64 56 56 128 128 32",
        "64 14 14 512 128 32",
        "64 7 7 512 128 32",
        "64 56 56 320 128 32",
        "64 56 56 64 264 32",
    ]
    for capability, expected in ((90, "11010"), (100, "11010"), (80, "10000"), (75, "00000")):
        command = [str(runner), "wins", str(capability)]
        done = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True, check=True)
        assert "".join(line.split()[0] for line in done.stdout.splitlines()) == expected, capability


# Exact buffers: nothing lies beside what the kernel may touch.
@pytest.mark.parametrize("widths", [(40, 72, 24), (64, 64, 48), (24, 8, 8)], ids=name)
def test_address_sanitizer(build: Callable[[str], Path], widths: tuple[int, int, int]) -> None:
    check(build("asan"), Case((3, 7, 9), *widths, exact=True, dropout=0.2, schedule=2))


@pytest.mark.parametrize("widths", [(40, 40, 16), (24, 24, 48)], ids=name)
@pytest.mark.parametrize("schedule", [0, 4])
def test_thread_sanitizer(build: Callable[[str], Path], schedule: int, widths: tuple[int, int, int]) -> None:
    check(build("tsan"), Case((4, 13, 9), *widths, schedule=schedule))


EXPECTED = (*cubins.PRODUCT, "LDSM.16.M88.4", r"LDG\.E[.\w]*\.128", r"LDGSTS[.\w]*\.128", r"STG\.E[.\w]*\.128")
WIDEST = """
#include "device/dense_layer.cuh"
namespace csp::cuda {
template __global__ void dense_layer_kernel<Half, DenseTile<4, 1, 4>>(const DenseLayerArguments);
template __global__ void dense_layer_kernel<BFloat16, DenseTile<4, 2, 4>>(const DenseLayerArguments);
}
"""


@pytest.mark.verify
@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
def test_widest_kernels(tmp_path: Path, architecture: str) -> None:
    """No spills, and the instructions that it is written for. All of them: python tests/cuda/test_dense_layer.py"""
    compiler, tool = cubins.nvcc(), cubins.disassembler()
    if compiler is None:
        pytest.skip("nvcc is missing: the kernel was run on the host only, not built for a GPU")
    source = tmp_path / "widest.cu"
    source.write_text(WIDEST)
    assert tool is not None, "cuobjdump is neither in the toolkit nor beside triton"
    assert looked_at(compiler, tool, source, architecture, tmp_path / "widest.cubin") == 2


def looked_at(compiler: str, tool: str, source: Path, architecture: str, cubin: Path) -> int:
    """Builds and looks at all kernels of the layer; how many there are."""
    built = [k for k in cubins.build(compiler, source, architecture, cubin) if "dense_layer_kernel<" in k.name]
    built = [k for k in built if not k.name.startswith("pack")]
    print(*built, sep="\n")
    assert all(kernel.spilled_bytes == 0 and 128 < kernel.registers <= 255 for kernel in built)
    for function, code in cubins.functions(cubin, tool).items():
        if not function.startswith("dense_layer_kernel"):
            continue
        stores_narrow = "4>" not in function.replace("(int)", "")  # a thread's channels of 24 or 16 are 12 or 8 bytes
        missing = [e for e in EXPECTED if not re.search(e, code) and not (stores_narrow and e.startswith("STG"))]
        assert not missing, (function, missing)
        assert not re.search(cubins.LOCAL_MEMORY, code), function
    return len(built)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        for target in cubins.ARCHITECTURES:
            compiler, tool = cubins.nvcc(), cubins.disassembler()
            assert compiler and tool
            looked_at(compiler, tool, emulator.SOURCE / "dense_layer.cu", target, Path(directory, "all.cubin"))
