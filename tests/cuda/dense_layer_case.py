"""One launch of the dense layer in one kernel under the emulation, against float64 that rounds where it does."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import emulator
import torch
import torch.nn.functional as F
from conv3x3_case import CANARY, LAYER, SM_90_SHARED, dropout_bits, rounding_error
from emulator import Result, Spread
from torch import Tensor

GUARD = 3  # pixels before and after the features
BESIDE = 8  # channels on either side


@dataclass(frozen=True)
class Case:
    images: tuple[int, int, int]
    entering: int = 64
    bottleneck: int = 64
    growth: int = 32
    dtype: torch.dtype = torch.float16
    schedule: int = 0
    multiprocessors: int = 1  # blocks at most: few, so that each has several tiles
    shared_bytes: int = SM_90_SHARED
    dropout: float = 0.0
    float32_weight: bool = False
    transposed_weight: bool = False  # the 1x1's; the 3x3's is channels_last then
    mean: float = 0.0  # of the features
    exact: bool = False  # buffers end where the slices do
    pitch: int = 0  # of the features, if they are far apart

    @property
    def pixels(self) -> int:
        n, h, w = self.images
        return n * h * w


class Features:
    """[P, K + g] and something beside it: NaN where nothing may be read, canaries where nothing may be written."""

    def __init__(self, case: Case, values: Tensor):
        self.case, self.rows = case, case.pixels
        self.guard, self.offset = (0, 0) if case.exact else (GUARD, BESIDE)
        width = case.entering + case.growth + 2 * self.offset
        nan = CANARY if case.dtype == torch.float16 else 0x7FE5
        self.buffer = torch.full((self.rows + 2 * self.guard, width), nan, dtype=torch.int16)
        self.part(self.buffer, 0, case.entering).copy_(values.view(torch.int16))
        self.before = self.buffer.clone()

    def part(self, buffer: Tensor, first: int, channels: int) -> Tensor:
        start = self.offset + first
        return buffer[self.guard : self.guard + self.rows, start : start + channels]

    def numbers(self, index: int, channel: int) -> list[int]:
        pitch = self.case.pitch or self.buffer.shape[1]
        return [index, self.guard * pitch + self.offset + channel, pitch]

    def given(self) -> Tensor | Spread:
        return Spread(self.buffer, 2 * self.case.pitch) if self.case.pitch else self.buffer

    def read(self) -> Tensor:
        """The new channels, once nothing else has changed."""
        after, case = self.buffer.clone(), self.case
        for buffer in (after, self.before):
            self.part(buffer, case.entering, case.growth).fill_(0)
        assert torch.equal(after, self.before), "written outside the slice"
        return self.part(self.buffer, case.entering, case.growth).contiguous().view(case.dtype).double()


class Problem:
    def __init__(self, case: Case):
        seed = hash((case.images, case.entering, case.bottleneck, case.growth)) % 1000
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=generator) * scale + mean

        self.case, k, b, g = case, case.entering, case.bottleneck, case.growth
        self.features = normal(case.pixels, k, mean=case.mean).to(case.dtype)
        self.norm1 = (normal(k, scale=0.2, mean=case.mean), normal(k, scale=0.3, mean=1), normal(k, scale=0.5))
        self.norm2 = (normal(b, scale=0.3), normal(b, scale=0.3, mean=1), normal(b, scale=0.5))
        self.weight1, self.weight2 = normal(b, k, scale=k**-0.5), normal(g, b, 3, 3, scale=0.05)
        if not case.float32_weight:
            self.weight1, self.weight2 = self.weight1.to(case.dtype), self.weight2.to(case.dtype)
        self.seed = torch.randint(1 << 62, (1,), generator=generator)

    def activated(self, x: Tensor, norm: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        mean, scale, shift = (v.double() for v in norm)
        folded = (shift - mean * scale).float().double()
        return (x * scale + folded).float().relu().to(self.case.dtype).double()

    def multiplied(self, weight: Tensor) -> Tensor:
        return weight.to(self.case.dtype).double()

    def z(self) -> Tensor:
        """[P, b] before it is rounded."""
        return self.activated(self.features.double(), self.norm1) @ self.multiplied(self.weight1).T

    def out(self) -> Tensor:
        case = self.case
        n, h, w = case.images
        activated = self.activated(self.z().float().to(case.dtype).double(), self.norm2)
        image = activated.reshape(n, h, w, -1).permute(0, 3, 1, 2)
        y = F.conv2d(image, self.multiplied(self.weight2), padding=1).permute(0, 2, 3, 1).reshape(case.pixels, -1)
        if not case.dropout:
            return y
        keep = dropout_bits(int(self.seed.item()), LAYER, case.pixels, case.growth) >= int(case.dropout * 4294967295.0)
        return torch.where(keep, y / (1 - case.dropout), 0.0)


@dataclass(frozen=True)
class Plan:
    tile: int
    blocks: int
    height: int
    width: int
    down: int
    across: int


@dataclass
class Outcome:
    result: Result
    error: float  # as a share of what rounding allows

    @property
    def plan(self) -> Plan:
        return Plan(*self.result.tile.to_bytes(6, "little"))


def weight_numbers(case: Case, index: int) -> list[int]:
    k, b = case.entering, case.bottleneck
    strides = [1, b, 0] if case.transposed_weight else [k, 1, 0]
    if index == 8:
        strides = [9 * b, 1, b] if case.transposed_weight else [9 * b, 9, 1]
    return [index, int(case.float32_weight), *strides]


def run(binary: Path, case: Case) -> Outcome:
    problem = Problem(case)
    features = Features(case, problem.features)
    k, b, g = case.entering, case.bottleneck, case.growth
    head = [case.schedule, 0 if case.dtype == torch.float16 else 1, *case.images, k, b, g]
    scale = struct.unpack("<i", struct.pack("<f", 1 / (1 - case.dropout)))[0]
    dropout = [9 if case.dropout else -1, LAYER, int(case.dropout * 4294967295.0), scale]
    numbers = [*head, case.multiprocessors, case.shared_bytes, *features.numbers(0, 0), 1, 2, 3]
    numbers += [*weight_numbers(case, 4), 5, 6, 7, *weight_numbers(case, 8), *dropout, *features.numbers(0, k)]
    weight1, weight2 = problem.weight1, problem.weight2
    if case.transposed_weight:
        weight1, weight2 = weight1.T.contiguous(), weight2.permute(0, 2, 3, 1).contiguous()
    buffers = [features.given(), *problem.norm1, weight1, *problem.norm2, weight2, problem.seed]
    result = emulator.run(binary, numbers, buffers)
    return Outcome(result, rounding_error(features.read(), problem.out(), case.dtype))
