"""One launch of a 3x3 kernel under the emulation, against float64 on the operands as the tensor cores see them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import emulator
import torch
import torch.nn.functional as F
from emulator import Result, Spread
from torch import Tensor
from torch.nn.grad import conv2d_weight

FORWARD, DGRAD, WGRAD = 0, 1, 2
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CANARY = 0x7E55  # NaN in float16
SM_90_SHARED = 227 * 1024


@dataclass(frozen=True)
class Case:
    kernel: int
    images: tuple[int, int, int]
    bottleneck: int = 32
    growth: int = 32
    dtype: torch.dtype = torch.float16
    schedule: int = 0
    multiprocessors: int = 1  # blocks at most: few, so that each has several tiles
    shared_bytes: int = SM_90_SHARED
    padding: int = 16  # channels beside each slice
    guard: int = 3  # pixels before and after each view
    pitch: int = 0  # of each view, if it has nothing beside it and much between its pixels
    dropout: float = 0.0
    float32_weight: bool = False
    channels_last_weight: bool = False
    statistics: bool = True
    mean: float = 0.0  # of z
    not_finite: bool = False  # NaN and infinity among z, its gradient and the features
    factor: float = 1.0  # of z

    @property
    def pixels(self) -> int:
        n, h, w = self.images
        return n * h * w

    def __str__(self) -> str:
        name = ("forward", "dgrad", "wgrad")[self.kernel]
        kind = str(self.dtype).removeprefix("torch.")
        return f"{name}-{'x'.join(map(str, self.images))}-b{self.bottleneck}-g{self.growth}-{kind}-s{self.schedule}"


class Slice:
    """[P, channels] in the middle of a buffer of something else: NaN where it is read, canaries where it is written."""

    def __init__(self, case: Case, channels: int, values: Tensor | None):
        self.pitch, self.guard, self.offset = channels + case.padding, case.guard, case.padding // 16 * 8
        self.channels, self.rows, self.far = channels, case.pixels, case.pitch
        self.buffer = torch.full((self.rows + 2 * self.guard, self.pitch), CANARY, dtype=torch.int16)
        if values is not None:
            whole = torch.full(self.buffer.shape, torch.nan, dtype=values.dtype)
            self.buffer = whole.view(torch.int16)
            self.of(self.buffer).copy_(values.view(torch.int16))

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.guard : self.guard + self.rows, self.offset : self.offset + self.channels]

    def numbers(self, index: int) -> list[int]:
        return [index, self.guard * self.pitch + self.offset, self.far or self.pitch]

    def given(self) -> Tensor | Spread:
        return Spread(self.buffer, 2 * self.far) if self.far else self.buffer

    def read(self, dtype: torch.dtype) -> Tensor:
        """The values, once nothing beside them has changed."""
        outside = self.buffer.clone()
        self.of(outside).fill_(CANARY)
        assert (outside == CANARY).all(), "written outside the slice"
        return self.of(self.buffer).contiguous().view(dtype).double()


class Problem:
    """Inputs, and what the passes should give."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(hash((case.images, case.bottleneck, case.growth)) % 1000)

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=generator) * scale + mean

        self.case, p, b, g = case, case.pixels, case.bottleneck, case.growth
        self.z = normal(p, b, mean=case.mean).to(case.dtype)
        self.features, self.gradient = normal(p, g).to(case.dtype), normal(p, g).to(case.dtype)
        self.norm = (normal(b, scale=0.2, mean=case.mean), normal(b, scale=0.3, mean=1), normal(b, scale=0.5))
        self.correction = (normal(g, scale=0.2), normal(g, scale=0.1), normal(g, scale=0.1))
        weight = normal(g, b, 3, 3, scale=0.05)
        self.weight = weight if case.float32_weight else weight.to(case.dtype)
        self.seed = torch.randint(1 << 62, (1,), generator=generator)
        self.z *= case.factor
        if case.not_finite:
            self.plant()

    def plant(self) -> None:
        """In z: an image and a channel each. In the gradient: also where a ReLU is not active. In features that
        owe nothing. In 16 bits those are seen, and minus infinity is not in the sums: selects would spill."""
        n, h, w = self.case.images
        values = (math.nan, math.inf, -math.inf) if self.case.dtype == torch.float32 else (math.nan, math.inf)
        for channel, value in enumerate(values):
            self.z[(channel % n * h + h // 2) * w + w // 2, channel] = value
            if self.case.dtype == torch.float32:
                self.features[channel, 0] = value
        self.correction[1][0] = 0.0
        self.norm[2][4] = -100.0
        self.gradient[w + 1, -1] = math.nan

    def image(self, x: Tensor) -> Tensor:
        n, h, w = self.case.images
        return x.reshape(n, h, w, -1).permute(0, 3, 1, 2)

    def rows(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(self.case.pixels, -1)

    def pre_activation(self) -> Tensor:
        """[P, b] as the kernels' multiply-add gives it."""
        mean, scale, shift = (v.double() for v in self.norm)
        return (self.z.double() * scale + (shift - mean * scale).float().double()).float()

    def h(self) -> Tensor:
        return self.pre_activation().relu().to(self.case.dtype).double()

    def dropped(self, x: Tensor) -> Tensor:
        case = self.case
        if not case.dropout:
            return x
        keep = dropout_bits(int(self.seed.item()), LAYER, case.pixels, case.growth) >= int(case.dropout * 4294967295.0)
        return torch.where(keep, x / (1 - case.dropout), 0.0)

    def dy(self) -> Tensor:
        mean, slope, offset = (v.double() for v in self.correction)
        constant = (offset - mean * slope).float().double()
        owed = torch.where(slope == 0, 0.0, self.features.double() * slope)
        exact = (self.gradient.double() - constant).float().double() - owed
        return self.dropped(exact.float().double()).to(self.case.dtype).double()

    def weight_as_multiplied(self) -> Tensor:
        return self.weight.to(self.case.dtype).double()

    def forward(self) -> Tensor:
        return self.dropped(self.rows(F.conv2d(self.image(self.h()), self.weight_as_multiplied(), padding=1)))

    def dn(self) -> Tensor:
        dh = self.rows(F.conv_transpose2d(self.image(self.dy()), self.weight_as_multiplied(), padding=1))
        return torch.where(self.pre_activation() <= 0, 0.0, dh)

    def dweight(self, absolute: bool = False) -> Tensor:
        h, dy = self.h(), self.dy()
        if absolute:
            h, dy = h.abs(), dy.abs()
        return conv2d_weight(self.image(h), list(self.weight.shape), self.image(dy), padding=1)


LAYER = 3


def dropout_bits(seed: int, layer: int, pixels: int, channels: int) -> Tensor:
    """[pixels, channels] of the hash in csrc/cpu/tile/conv3x3.h."""
    mask = 0xFFFFFFFF
    key = (((seed ^ seed >> 32) & mask) * 0x9E3779B9 + layer * 0x85EBCA6B) & mask
    index = torch.arange(pixels)[:, None] * 4096 + torch.arange(channels)
    h = (index & mask) ^ ((index >> 32) * 0x27D4EB2F & mask) ^ key
    h = (h ^ h >> 16) * 0x7FEB352D & mask
    h = (h ^ h >> 15) * 0x846CA68B & mask
    return h ^ h >> 16


@dataclass
class Outcome:
    result: Result
    error: float  # of the output, as a share of what rounding allows
    sums_error: float


def run(binary: Path, case: Case) -> Outcome:
    problem = Problem(case)
    return (forward, dgrad, wgrad)[case.kernel](binary, problem)


def head(case: Case, z: Slice) -> list[int]:
    """Numbers up to the norm: z is buffer 0, its norm's vectors 1 to 3, the seed 4."""
    dtype = 0 if case.dtype == torch.float16 else 1
    start = [case.kernel, case.schedule, dtype, *case.images, case.bottleneck, case.growth, case.multiprocessors]
    scale = struct.unpack("<i", struct.pack("<f", 1 / (1 - case.dropout)))[0]
    dropout = [4 if case.dropout else -1, LAYER, int(case.dropout * 4294967295.0), scale]
    return [*start, case.shared_bytes, *z.numbers(0), 1, 2, 3, *dropout]


def weight_strides(case: Case) -> list[int]:
    b = case.bottleneck
    return [9 * b, 1, b] if case.channels_last_weight else [9 * b, 9, 1]


def weight_numbers(problem: Problem, index: int) -> list[int]:
    return [index, int(problem.case.float32_weight), *weight_strides(problem.case)]


def laid_out(problem: Problem) -> Tensor:
    weight = problem.weight
    return (weight.permute(0, 2, 3, 1) if problem.case.channels_last_weight else weight).contiguous()


def rounding_error(got: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """At most 1: half a unit of the last place, and a tenth of one of the largest value for the float32 sums."""
    got, exact = finite_alike(got, exact)
    allowed = EPSILON[dtype] * (exact.abs() + 0.1 * exact.abs().max())
    return nan_is_infinite((got - exact).abs() / allowed.clamp_min(1e-30))


def finite_alike(got: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """What is NaN or infinite in both, as zeros; a NaN that only one has stays."""
    both = ~got.isfinite() & ~exact.isfinite()
    return torch.where(both, 0.0, got), torch.where(both, 0.0, exact)


def nan_is_infinite(ratio: Tensor) -> float:
    return ratio.nan_to_num(nan=torch.inf).max().item()


def forward(binary: Path, problem: Problem) -> Outcome:
    case = problem.case
    z, out = Slice(case, case.bottleneck, problem.z), Slice(case, case.growth, None)
    statistics = torch.full((2, case.growth), torch.nan, dtype=torch.float64)
    numbers = [*head(case, z), *weight_numbers(problem, 5), *out.numbers(6), 7 if case.statistics else -1]
    buffers = [z.given(), *problem.norm, problem.seed, laid_out(problem), out.given(), statistics]
    result = emulator.run(binary, numbers, buffers)
    got = out.read(case.dtype)
    if not case.statistics:
        assert statistics.isnan().all()
        return Outcome(result, rounding_error(got, problem.forward(), case.dtype), 0)
    (mean, m), (var, v) = map(finite_alike, (got.mean(0), got.var(0, correction=0)), statistics)
    error = torch.cat([(m - mean).abs() / got[got.isfinite()].abs().max(), (v - var).abs() / var.clamp_min(1e-9)])
    return Outcome(result, rounding_error(got, problem.forward(), case.dtype), nan_is_infinite(error))


def slice_gradient(problem: Problem) -> tuple[Slice, Slice]:
    case = problem.case
    return Slice(case, case.growth, problem.features), Slice(case, case.growth, problem.gradient)


def dgrad(binary: Path, problem: Problem) -> Outcome:
    case = problem.case
    z, out = Slice(case, case.bottleneck, problem.z), Slice(case, case.bottleneck, None)
    features, gradient = slice_gradient(problem)
    sums = torch.full((2, case.bottleneck), torch.nan)
    numbers = [*head(case, z), *features.numbers(5), *gradient.numbers(6), 7, 8, 9]
    numbers += [*weight_numbers(problem, 10), *out.numbers(11), 12]
    buffers = [z.given(), *problem.norm, problem.seed, features.given(), gradient.given(), *problem.correction]
    result = emulator.run(binary, numbers, [*buffers, laid_out(problem), out.given(), sums])
    dn, centred = problem.dn(), problem.z.double() - problem.norm[0]
    error = rounding_error(out.read(case.dtype), dn * problem.norm[1], case.dtype)
    parts = torch.stack([dn, dn * centred])
    (got, expected), size = finite_alike(sums, parts.sum(1)), parts.abs().sum(1)
    sums_error = (got - expected).abs() / torch.where(size.isfinite(), size, 1.0).clamp_min(1e-9)
    return Outcome(result, error, nan_is_infinite(sums_error))


def wgrad(binary: Path, problem: Problem) -> Outcome:
    case = problem.case
    z = Slice(case, case.bottleneck, problem.z)
    features, gradient = slice_gradient(problem)
    shape = (case.growth, 3, 3, case.bottleneck) if case.channels_last_weight else problem.weight.shape
    dweight = torch.full(shape, torch.nan)
    numbers = [*head(case, z), *features.numbers(5), *gradient.numbers(6), 7, 8, 9, 10, *weight_strides(case)]
    buffers = [z.given(), *problem.norm, problem.seed, features.given(), gradient.given(), *problem.correction, dweight]
    result = emulator.run(binary, numbers, buffers)
    got = dweight.permute(0, 3, 1, 2) if case.channels_last_weight else dweight
    got, exact = finite_alike(got, problem.dweight())
    size = problem.dweight(absolute=True)
    error = (got - exact).abs() / torch.where(size.isfinite(), size, 1.0).clamp_min(1e-9)
    return Outcome(result, nan_is_infinite(error) / 2e-6, 0)
