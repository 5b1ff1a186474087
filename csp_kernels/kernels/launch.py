"""What the launchers share: arguments of kernels, shapes of images, sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass
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
    """n images of h x w pixels; pool: the product reads their 2x2 averages."""

    n: int
    h: int
    w: int
    pool: bool = False

    @property
    def pixels(self) -> int:
        """P: rows of the input."""
        return self.n * self.h * self.w

    @property
    def outputs(self) -> int:
        """P': rows of the output."""
        return self.n * (self.h // 2) * (self.w // 2) if self.pool else self.pixels


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


# float32 without TF32 has no tensor cores: its operands are in registers. Averages read four tiles: shared memory.
def forward_tile(dtype: torch.dtype, precision: str, geometry: Geometry, outputs: int) -> Tile:
    small = few(geometry.outputs)
    if dtype == torch.float64:
        return Tile(32, power(outputs, 16, 32), 16, 4, 2)
    if dtype == torch.float32:
        if precision == "ieee":
            return Tile(64, power(outputs, 16, 128), 16, 8, 2)
        return Tile(64 if small else 128, power(outputs, 16, 128), 16 if geometry.pool else 32, 8, 2)
    return Tile(64 if small else 128, power(outputs, 16, 128), 32 if geometry.pool else 64, 8, 3)


def dgrad_tile(dtype: torch.dtype, precision: str, pixels: int, channels: int) -> Tile:
    """outputs: channels of the input, depth: of the gradient."""
    if dtype == torch.float64:
        return Tile(32, power(channels, 16, 32), 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, power(channels, 16, 64), 32, 4 if precision == "tf32" else 8, 2)
    return Tile(64 if few(pixels) else 128, power(channels, 16, 64), 64, 8, 2)


def wgrad_tile(dtype: torch.dtype, pool: bool, channels: int, outputs: int) -> tuple[Tile, int]:
    """depth: pixels at a time; pixels unused. And the channels of the input of one program."""
    if dtype == torch.float64:
        return Tile(0, power(outputs, 16, 32), 16, 4, 2), power(channels, 16, 32)
    if dtype == torch.float32:
        return Tile(0, power(outputs, 16, 64), 16 if pool else 32, 8, 2), power(channels, 16, 128)
    return Tile(0, power(outputs, 16, 128), 32 if pool else 64, 8, 2), power(channels, 16, 128)


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
    return "tf32" if winograd == 4 and like.dtype == torch.float32 else "ieee"
