"""What every benchmark here needs: interleaved timing, the machine's ceiling, the environment, CSV rows."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import csp_kernels as csp

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """From samples; with fewer than two, the quartiles are the sample."""
        if len(milliseconds) < 2:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0])
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(median, low, high)


def once(work: Thunk) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def interleave(candidates: Mapping[str, Thunk], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Times all candidates once a round, so that a disturbance hits all; the order rotates with the round."""
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            spent = once(candidates[name])
            if index >= warmup:
                samples[name].append(spent)
    return {name: Timing.of(values) for name, values in samples.items()}


def mm_ceiling(dtype: torch.dtype, size: int = 2048, repeats: int = 7) -> float:
    """GFLOP/s of a large square torch.mm at its best: what this machine reaches now ('mm ceiling')."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = min(once(lambda: torch.mm(a, b)) for _ in range(repeats))
    return 2 * size**3 / best / 1e6


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the error over that of the exact values."""
    exact = exact.double()
    norm = float(torch.linalg.vector_norm(exact))
    error = float(torch.linalg.vector_norm(got.double() - exact))
    return error / norm if norm else error


def device_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_bytes() -> int | None:
    """Memory this machine can still give, None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def environment() -> dict[str, object]:
    """Columns that say where and when a row was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "isa": csp.native.isa(),
        "threads": torch.get_num_threads(),
        "csp_kernels": csp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Appends rows; writes the header first if the file is new. ValueError if the file has other columns."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path}: expected the columns {columns}, got {found}; name another file with --csv")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
