"""Times, bandwidth and memory of a device: a GPU by CUDA events, or, to try the benchmark out, the CPU by its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import Timing, device_name

Sample = Callable[[], float]  # milliseconds of one call
CACHE = 1 << 28  # bytes that are overwritten before each call: more than any level-2 cache


@dataclass(frozen=True)
class Work:
    """What is timed: work(prepare())."""

    prepare: Callable[[], Any]
    work: Callable[[Any], object]


class Device:
    """The CPU."""

    kind = "cpu"
    copy_bytes = 1 << 26
    matmul_size = 512

    @property
    def name(self) -> str:
        return device_name()

    def time(self, work: Work) -> float:
        """Milliseconds of one call."""
        state = work.prepare()
        start = time.perf_counter()
        work.work(state)
        return 1e3 * (time.perf_counter() - start)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Most memory that work() needs beside what is allocated before; 0 where nobody counts."""
        work()
        return 0

    def copy_bandwidth(self) -> float:
        """GB/s, read and written, of a large copy: what there is to share."""
        source = torch.ones(self.copy_bytes, dtype=torch.uint8, device=self.kind)
        target = torch.empty_like(source)
        copy = Work(lambda: None, lambda _: target.copy_(source))
        spent = interleave({"copy": lambda: self.time(copy)}, 11)["copy"].median
        return 2 * self.copy_bytes / spent / 1e6

    def matmul(self, dtype: torch.dtype) -> float:
        """Milliseconds of a product of two matrices of matmul_size rows and columns, 2 * matmul_size ** 3 FLOPs."""
        a, b = (torch.randn(self.matmul_size, self.matmul_size, device=self.kind).to(dtype) for _ in range(2))
        product = Work(lambda: None, lambda _: torch.mm(a, b))
        return interleave({"mm": lambda: self.time(product)}, 11)["mm"].median


class Gpu(Device):
    """The current CUDA device and stream."""

    kind = "cuda"
    copy_bytes = 1 << 30
    matmul_size = 8192

    def __init__(self) -> None:
        self._cache = torch.empty(CACHE, dtype=torch.uint8, device="cuda")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    def time(self, work: Work) -> float:
        torch.compiler.cudagraph_mark_step_begin()
        state = work.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        start.record()
        work.work(state)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def peak_bytes(self, work: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


def interleave(samples: Mapping[str, Sample], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Takes a sample of each in turn, so that a disturbance hits all; the order rotates with the round."""
    names = list(samples)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            value = samples[name]()
            if index >= warmup:
                spent[name].append(value)
    return {name: Timing.of(values) for name, values in spent.items()}
