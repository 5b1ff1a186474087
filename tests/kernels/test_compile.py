"""Every launch compiled for a GPU that is not here, the products in every configuration: no spills, shared memory that
the device has, tensor cores and 16-byte loads where they are expected. For sm_90; a target takes minutes of a core.
CSP_KERNELS_TARGETS=sm_80,sm_90,sm_100,sm_120,gfx942 tests others: docs/gpu.md has their figures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import resources
from resources import SHARED, TESTED, Row

if importlib.util.find_spec("triton") is None and sys.platform != "linux":
    pytest.skip("triton has wheels for Linux only", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.verify,
    pytest.mark.parametrize("operator", resources.CASES),
    pytest.mark.parametrize("target", TESTED),
]

# Products, and which constant is the number of rows of their accumulator.
ROWS = {
    "mix._forward": "BN", "mix._dgrad": "BK", "mix._wgrad": "BN", "mix._one_pass": "BK",
    "conv3x3._forward": "BP", "conv3x3._dgrad": "BK", "conv3x3._wgrad": "BK",
}  # fmt: skip
CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "sm_120": "HMMA", "gfx942": "MFMA"}
# What reads images; others read vectors, sums and statistics.
MOVERS = "statistics._copy_split", "norm._pay_kernel", "maximum._largest", "maximum._backward"
READERS = {
    *ROWS,
    *MOVERS,
    *(f"{module}.{way}" for module in ("activate", "elementwise") for way in ("_forward", "_backward")),
}


def cores(row: Row) -> set[str]:
    """The tensor-core instructions that a row may have, of which it must have one; none: it must have none."""
    if row.kernel not in ROWS:
        return set()
    if row.dtype == "float32" and row.precision == "ieee":
        return {"MFMA"} if row.target == "gfx942" else set()  # AMD's multiply float32 exactly
    if row.narrow and row.target in ("sm_90", "sm_100") and row.constants[ROWS[row.kernel]] < 64:
        return {"HMMA"}  # too few rows for a warp group
    return {CORES[row.target]}


def reads_wide(row: Row) -> bool:
    """Whether a thread's part of an image's tile is 16 bytes of one pixel or more."""
    width = max(row.constants.get(name, 0) for name in ("BN", "BK"))
    size = row.constants.get("BP", 0) * width * (4 if row.dtype == "float32" else 2)
    threads = row.warps * (64 if row.target == "gfx942" else 32)
    return row.kernel in READERS and row.aligned and size >= 16 * threads


@pytest.fixture(scope="session")
def compiling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Target -> what comes of it, for the targets of the selected tests."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [target for target in TESTED if any(target in params.values() for params in selected)]
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(resources.WORKERS) as pool:
        yield {target: pool.submit(resources.compile_apart, folder, target) for target in wanted}


@pytest.fixture
def found(compiling: dict[str, Future[list[dict[str, Any]]]], target: str, operator: str) -> list[dict[str, Any]]:
    return [one for one in compiling[target].result() if one["operator"] == operator]


def check(found: list[dict[str, Any]], bad: Callable[[Row], str]) -> None:
    """bad: what is wrong with a row, if anything."""
    rows, _ = resources.split(found)
    assert rows
    wrong = {f"{r.kernel} {r.tile} w{r.warps} {r.dtype} {r.precision} ({r.case}): {bad(r)}" for r in rows if bad(r)}
    assert not wrong, "\n".join(sorted(wrong))


def test_builds(found: list[dict[str, Any]]) -> None:
    _, errors = resources.split(found)
    assert not errors, "\n".join(errors)


def test_no_spills(found: list[dict[str, Any]]) -> None:
    check(found, lambda row: f"spills {row.spills}, {row.registers} registers" if row.spills else "")


def test_shared_memory(found: list[dict[str, Any]]) -> None:
    check(found, lambda row: f"{row.shared} bytes" if row.shared > SHARED[row.target] else "")


def test_tensor_cores(found: list[dict[str, Any]]) -> None:
    def bad(row: Row) -> str:
        fits = row.tensor.keys() <= cores(row) and bool(row.tensor) == bool(cores(row))
        return "" if fits else f"{row.tensor}, expected {cores(row) or 'none'}"

    check(found, bad)


def test_wide_loads(found: list[dict[str, Any]]) -> None:
    check(found, lambda row: "none" if reads_wide(row) and not row.wide_loads else "")
