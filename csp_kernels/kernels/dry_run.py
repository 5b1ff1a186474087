"""Kernels compiled for a GPU that need not be there, instead of launched:

    with dry_run("sm_90") as launches:
        stage.forward([torch.empty(8, 64, 56, 56)], ...)

Tensors are on the CPU, as torch.empty gives them: nothing computes, but their addresses decide, as on a GPU, which
accesses are aligned. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from csp_kernels.kernels import launch, tune

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass
class Launch:
    """Equal launches of a kernel: one compilation. constants: its constexpr arguments. types: of the others, None for
    one that is absent."""

    kernel: str
    constants: dict[str, Any]
    types: dict[str, str | None]
    warps: int
    shared: int  # bytes a program
    asm: dict[str, Any]  # "ptx" and "cubin", or "amdgcn"
    times: int = 1


def parse(target: str) -> GPUTarget:
    """sm_<capability> or gfx<name>."""
    if match := re.fullmatch(r"sm_(\d+)", target):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx\w+", target):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise ValueError(f"target: expected sm_<number> or gfx<name>, got {target!r}")


class _Driver:
    """Of a device that is not there. Triton keeps what it compiled by device: each target is another."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, -2 - hash(target) % (1 << 30)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def dry_run(target: str, candidates: bool = False, share: tuple[int, int] = (0, 1)) -> Iterator[list[Launch]]:
    """What is launched inside, once each; candidates: with every configuration, not only the first.

    share (i, n): only the i-th of n shares of the launches is compiled and found, the same one wherever they are
    launched, so that n processes that do the same inside leave everything in Triton's cache on disk.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("a dry run needs Triton without TRITON_INTERPRET=1")
    gpu, found, run = parse(target), dict[int, Launch](), JITFunction.run
    launches: list[Launch] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled is None:  # of another share
            return None
        if id(compiled) in found:
            found[id(compiled)].times += 1
        else:
            found[id(compiled)] = _record(self, args, options, compiled)
            launches.append(found[id(compiled)])
        return compiled

    def every(_: str, __: Any, tiles: Sequence[Any], work: Callable[[Any], None], *___: Any, **____: Any) -> Any:
        for tile in tiles[1:]:
            work(tile)
        return tiles[0]

    def skipped(*, key: Any, fn: Any, **_: Any) -> bool:
        return zlib.crc32(f"{fn.module}.{fn.name} {key}".encode()) % share[1] != share[0]

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver(gpu))
    try:
        with (
            patch.object(knobs.runtime, "jit_cache_hook", skipped),
            patch.object(JITFunction, "run", compile_only),
            patch.object(launch, "architecture", lambda _: gpu.arch),
            patch.object(tune, "choose", every if candidates else tune.choose),
        ):
            yield launches
    finally:
        driver.set_active(before)


def _record(kernel: Any, args: Sequence[Any], options: dict[str, Any], compiled: Any) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: options[k] for k in kernel.arg_names if k in options}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr and p.name in values}
    types = {name: _type(value) for name, value in values.items() if name not in constants}
    made, name = compiled.metadata, f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
    return Launch(name, constants, types, made.num_warps, made.shared, compiled.asm)


def _type(value: Any) -> str | None:
    if value is None:
        return None
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__
