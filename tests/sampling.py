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
# Part of folder/file::function -> cases of a function that are enough for each change; others are marked "verify".
# The first part that is there counts. Sanitizers are slow to compile for.
SAMPLES = {
    "ops/test_csp_stage.py::test_gradcheck": 3,
    "kernels/test_stage.py::test_in_float64": 7, "kernels/test_stage.py::test_in_float32": 3,
    "kernels/test_stage.py::test_inference": 5, "kernels/test_stage.py::test_random_graphs": 12,
    "kernels/test_stage.py::test_recompute": 0,
    "kernels/test_stage.py::test_frozen_norms": 2, "kernels/test_arguments.py::test_wrong_arguments": 2,
    "test_gpu_correctness.py::test_what_fails": 0, "test_gpu_correctness.py::test_stops": 0,
    "test_gpu_correctness.py::test_dry_run": 0, "test_gpu_tuning.py::test_a_worker": 0,
    "test_gpu_tuning.py::test_stops": 0, "test_gpu_tuning.py::test_dry_run": 0, "test_gpu_speed.py::test_dry_run": 0,
    "_sanitizer": 0, "fuzz/test_compare": 3, "kernels/test_cuda": 0,
    "kernels/test_conv3x3.py::test_strides_and_groups": 9, "kernels/test_conv3x3.py::test_stride_adds": 2,
    "kernels/test_conv3x3.py::test_programs": 2,
    "kernels/test_conv3x3.py::test_after": 5, "kernels/test_mix.py::test_stride": 4,
    "kernels/test_mix.py::test_residual": 3, "kernels/test_maximum.py::test_random_values": 8,
    "kernels/test_maximum.py": 5, "kernels/test_arguments.py::test_what_the": 3, "kernels/": 1,
    "cuda/": 2, "ops/test_schemas": 3,
    "::test_opcheck": 2, "::test_compiled": 2, "::test_onnx": 5, "::test_jit_trace": 10,
    "::test_any_size_and_channels": 3, "::test_csp_densenet_costs_less_traffic": 2, "::test_too_little_memory": 2,
    "::test_first_call_of_many_threads": 2, "models/test_models.py::test_native_equals_reference": 4,
    "models/test_models.py::test_trains_and_evaluates": 4, "ops/test_dense_block.py::test_recompute": 2,
}  # fmt: skip


def spread(count: int, enough: int) -> set[int]:
    """Indices of `enough` of `count` things, first and last and evenly between; all if they are not more."""
    if count <= enough:
        return set(range(count))
    return {round(i * (count - 1) / max(1, enough - 1)) for i in range(enough)}


def enough(place: str) -> int | None:
    """Cases of a function (folder/file::function) that are enough for each change; None: all."""
    return next((n for part, n in SAMPLES.items() if part in place), None)


def mark_the_many(items: Iterable[pytest.Item], tests: Path) -> None:
    """Mark what `make test` leaves out: of each function in SAMPLES all but a few cases."""
    functions: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for (path, function), cases in functions.items():
        place = f"{path.relative_to(tests)}::{function}" if tests in path.parents else ""
        few = enough(place)
        kept = spread(len(cases), len(cases) if few is None else few)
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
