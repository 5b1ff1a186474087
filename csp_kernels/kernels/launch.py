"""What the launchers share: arguments of kernels, shapes of images, sizes of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.ops._node import in_place


@dataclass(frozen=True)
class Norm:
    """relu((x - mean) * scale + shift) on load; each [K] in the type of the sums, unit stride."""

    mean: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Correction:
    """dz = d + (z - mean) * slope + offset on load; each [K] in the type of the sums, unit stride."""

    mean: Tensor
    slope: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Geometry:
    """n images of h x w pixels; pool: the product reads their 2x2 averages; stride 2: each second pixel of each second
    row, a 3x3 what is around it."""

    n: int
    h: int
    w: int
    pool: bool = False
    stride: int = 1

    @property
    def pixels(self) -> int:
        """P: rows of the input."""
        return self.n * self.h * self.w

    @property
    def outputs(self) -> int:
        """P': rows of the output."""
        if self.pool:
            return self.n * (self.h // 2) * (self.w // 2)
        return self.n * blocks(self.h, self.stride) * blocks(self.w, self.stride)


@dataclass(frozen=True)
class Tile:
    """One program's share: pixels x outputs, depth channels of the reduction at a time."""

    pixels: int
    outputs: int
    depth: int
    warps: int
    stages: int


def power(n: int, low: int, high: int) -> int:
    """The next power of two, within limits."""
    return max(low, min(high, triton.next_power_of_2(n)))


def few(pixels: int) -> bool:
    """More programs rather than larger ones."""
    return pixels < 1 << 14


@dataclass(frozen=True)
class Case:
    """What the choice of tiles depends on beside the channels."""

    dtype: torch.dtype
    precision: str  # of float32: without TF32 there are no tensor cores, operands are in registers
    target: int | str
    pool: bool = False  # averages read four tiles: shared memory
    few: bool = False
    activated: bool = False  # the gradient comes through an activation: registers
    unit: int = 8  # of the sizes: short vectors need more addresses
    stride: int = 1

    @staticmethod
    def of(x: Tensor, precision: str, geometry: Geometry, activated: bool = False, unit: int = 8) -> Case:
        target, small = architecture(x.device), few(geometry.outputs)
        return Case(x.dtype, precision, target, geometry.pool, small, activated, unit, geometry.stride)

    @property
    def amd(self) -> bool:
        return isinstance(self.target, str)

    @property
    def tf32(self) -> bool:
        return self.precision == "tf32"


# Candidates, the default first. None spills on the targets of docs/gpu.md.
def forward_tiles(case: Case, outputs: int) -> list[Tile]:
    o = power(outputs, 16, 128)
    if case.dtype == torch.float64:
        return [Tile(32, min(o, 32), 16, 4, 2)]
    if case.dtype == torch.float32:
        if not case.tf32:
            small = Tile(64, min(o, 64), 16, 4, 2) if case.amd else Tile(64, min(o, 64), 16, 8, 3)
            return [Tile(64, o, 16, 8, 2), small]
        depth = 16 if case.pool else 32
        tight = case.target in (80, 86, 89, 100, 103, 120, 121)
        wide, narrow = Tile(128, o, depth, 8, 2), Tile(64, o, 16 if tight else depth, 8, 2)
        return [narrow, wide] if case.few else [wide, narrow]
    wide, narrow = Tile(128, o, 64, 8, 3), Tile(64, o, 64, 8, 3)
    if case.pool:
        wide, narrow = Tile(128, o, 32, 8, 3), Tile(64, o, 32, 8, 3)
        if case.amd:  # 64 KB of shared memory
            return [Tile(64, o, 32, 8, 2)]
        if case.target in (120, 121):
            return [narrow]
    elif case.amd:
        wide, narrow = Tile(128, o, 32, 8, 2), Tile(64, o, 32, 8, 2)
    elif case.target in (80, 86, 89, 120, 121):
        return [narrow]
    elif case.target in (100, 103):
        narrow = Tile(64, min(o, 64), 32, 8, 3)
    return [narrow, wide] if case.few else [wide, narrow]


def dgrad_tiles(case: Case, channels: int) -> list[Tile]:
    """outputs: channels of the input, depth: of the gradient."""
    k, tight = power(channels, 16, 64), case.activated and case.unit < 8
    if case.dtype == torch.float64:
        return [Tile(32, min(k, 32), 16, 4, 2)]
    if case.dtype == torch.float32:
        return [Tile(32 if tight else 64, k, 32, 4 if case.tf32 and not case.activated else 8, 2)]
    wide, narrow = Tile(128, k, 64, 8, 2), Tile(64, k, 64, 8, 2)
    if case.pool or tight:
        return [narrow]
    return [narrow, wide] if case.few else [wide, narrow]


def wgrad_tiles(case: Case, channels: int, outputs: int) -> list[Tile]:
    """depth: channels of the input."""
    k, o = power(channels, 16, 128), power(outputs, 16, 128)
    tight = case.activated and case.target in (120, 121)
    if case.dtype == torch.float64:
        return [Tile(16, min(o, 32), min(k, 32), 4, 2)]
    if case.dtype == torch.float32:
        pixels = 16 if case.pool or (not case.tf32 and (tight or case.stride > 1)) else 32
        return [Tile(pixels, min(o, 64), k if case.tf32 and not case.pool else min(k, 64), 8, 2)]
    stages = 3 if case.target in (100, 103) else 2
    wide, narrow = Tile(64, o, k, 8, stages), Tile(32, min(o, 64) if case.target in (80, 86, 89) else o, k, 8, stages)
    if case.pool or tight:
        return [narrow]
    return [wide] if case.target in (80, 86, 89) else [wide, narrow]


def one_pass_tiles(case: Case, channels: int, outputs: int) -> list[Tile | None]:
    """Of both gradients at once; outputs: all of them, depth: channels of the input. None: two passes."""
    if case.dtype.itemsize != 2 or outputs > 128 or case.pool or case.stride > 1:
        return [None]
    k, o = power(channels, 16, 128), power(outputs, 16, 128)
    if case.target in (80, 86, 89, 120, 121):
        return [None, Tile(16, o, k, 8, 2)]
    if case.target == 90:
        return [Tile(32, o, k, 8, 2), None]
    if case.target in (0, 100, 103):
        return [Tile(32, o, k, 8, 3), Tile(64, o, min(k, 64), 8, 2), Tile(32, o, min(k, 64), 8, 2), None]
    return [Tile(32, o, 64, 8, 1), None] if case.target == "gfx942" and k >= 64 else [None]


@cache
def architecture(device: torch.device) -> int | str:
    """Compute capability without its point, or AMD's name; 0: the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def chunk(pixels: int, tile: int, programs: int) -> int:
    """Pixels of a split, a multiple of the tile's: enough programs for any device, so that the order of sums depends
    on shapes alone."""
    return max(4, blocks(blocks(pixels, tile), blocks(256, programs))) * tile


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def unit(*sizes: int) -> int:
    """The power of two, at most 8, that divides all. Kernels take sizes divided by it and multiply: then the compiler
    knows what they are multiples of, and loads whole vectors."""
    return next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in sizes))


def blocks(n: int, size: int) -> int:
    return -(-n // size)


Argument = tuple[str, Tensor, tuple[int, ...], torch.dtype]  # name, what came, shape and dtype expected


def check(like: Tensor, arguments: Iterable[Argument]) -> None:
    """For operators called directly (csp.ops has checks of its own): what a kernel would take for something else, or
    read where nothing is, which ends the process' use of the device. All must be where `like` is."""
    for name, x, shape, dtype in arguments:
        if x.dtype != dtype:
            raise TypeError(f"{name}: got {x.dtype}, expected {dtype} for an input of {like.dtype}")
        if x.shape != shape:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected {list(shape)}")
        if x.device != like.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {like.device}, where the input is")
        if x.numel() and not x.untyped_storage().nbytes():
            raise ValueError(f"{name}: its memory was freed")


def check_params(like: Tensor, params: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Of an operator whose input is `like`."""
    check_count("params", params, len(shapes))
    wide = sum_dtype(like.dtype)
    check(like, [("input", like, tuple(like.shape), like.dtype)])
    check(like, [(f"params[{i}]", p, s, wide) for i, (p, s) in enumerate(zip(params, shapes, strict=True))])


def check_count(name: str, items: Sequence[object], expected: int) -> None:
    if len(items) != expected:
        raise ValueError(f"{name}: got {len(items)} items, expected {expected}")


def check_view(x: Tensor, name: str) -> None:
    """A [rows, channels] view with unit channel stride."""
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"{name}: expected [pixels, channels], channel stride 1; got {tuple(x.shape)}, {x.stride()}")


def pixels_of(x: Tensor) -> Tensor:
    """[P, channels] view of an image in channels_last order, or of a channel slice of one (of a copy of any other)."""
    x = in_place(x)
    n, c, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    return x.as_strided((n * h * w, c), (pitch, 1))


def laid_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """As its parameter lies."""
    if parameter.is_contiguous():
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)


def precision_of(like: Tensor, winograd: int) -> str:
    """Of products: 4 says that less precision than float32's was asked for, see csp_kernels.ops._node.winograd."""
    return "tf32" if winograd & 4 and like.dtype == torch.float32 else "ieee"
