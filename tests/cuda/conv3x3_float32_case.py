"""One launch of a float32 3x3 kernel under the emulation, against float64 on the operands as they are multiplied."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import conv3x3_case
import emulator
import torch
import torch.nn.functional as F
from conv3x3_case import LAYER, Outcome, dropout_bits, finite_alike, laid_out, nan_is_infinite, weight_strides
from emulator import Result, Spread
from torch import Tensor
from torch.nn.grad import conv2d_weight

CANARY = 0x7FC0BEEF  # NaN
UNIT = 2.0**-24
SM_80_SHARED, SM_86_SHARED = 163 * 1024, 99 * 1024
ONE_BLOCK = 90 * 1024  # of shared memory: no second block of a wide tile beside the first


@dataclass(frozen=True)
class Case(conv3x3_case.Case):
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    padding: int = 8
    float32_weight: bool = True

    def __str__(self) -> str:
        return super().__str__() + ("-tf32" if self.tf32 else "")


class Slice:
    """[P, channels] in the middle of a buffer of something else: NaN where it is read, canaries where it is written."""

    def __init__(self, case: Case, channels: int, values: Tensor | None):
        self.pitch, self.guard, self.offset = channels + case.padding, case.guard, case.padding // 8 * 4
        self.channels, self.rows, self.far = channels, case.pixels, case.pitch
        self.buffer = torch.full((self.rows + 2 * self.guard, self.pitch), CANARY, dtype=torch.int32)
        if values is not None:
            self.of(self.buffer).copy_(values.view(torch.int32))

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.guard : self.guard + self.rows, self.offset : self.offset + self.channels]

    def numbers(self, index: int) -> list[int]:
        """Offsets count 16 bits."""
        return [index, 2 * (self.guard * self.pitch + self.offset), self.far or self.pitch]

    def given(self) -> Tensor | Spread:
        return Spread(self.buffer, 4 * self.far) if self.far else self.buffer

    def read(self) -> Tensor:
        """The values, once nothing beside them has changed."""
        outside = self.buffer.clone()
        self.of(outside).fill_(CANARY)
        assert (outside == CANARY).all(), "written outside the slice"
        return self.of(self.buffer).contiguous().view(torch.float32).double()


def to_tf32(x: Tensor) -> Tensor:
    """Half away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.double() * b.double() + c.double()).float()


class Problem(conv3x3_case.Problem):
    case: Case

    def multiplied(self, x: Tensor) -> Tensor:
        """As a product sees it."""
        return (to_tf32(x) if self.case.tf32 else x).double()

    def pre_activation(self) -> Tensor:
        mean, scale, shift = self.norm
        return fma(self.z - mean, scale, shift)

    def h(self) -> Tensor:
        return self.multiplied(self.pre_activation().relu())

    def dropped(self, x: Tensor) -> Tensor:
        case = self.case
        if not case.dropout:
            return x
        keep = dropout_bits(int(self.seed.item()), LAYER, case.pixels, case.growth) >= int(case.dropout * 4294967295.0)
        return torch.where(keep, x * torch.tensor(1 / (1 - case.dropout)), 0.0)

    def dy(self) -> Tensor:
        mean, slope, offset = self.correction
        owed = torch.where(slope == 0, offset, fma(self.features - mean, slope, offset))
        return self.multiplied(self.dropped(self.gradient - owed))

    def weight_as_multiplied(self) -> Tensor:
        return self.multiplied(self.weight)

    def forward(self, absolute: bool = False) -> Tensor:
        h, weight = absolute_if(absolute, self.h(), self.weight_as_multiplied())
        return self.dropped(self.rows(F.conv2d(self.image(h), weight, padding=1)))

    def dn(self, absolute: bool = False) -> Tensor:
        dy, weight = absolute_if(absolute, self.dy(), self.weight_as_multiplied())
        dh = self.rows(F.conv_transpose2d(self.image(dy), weight, padding=1))
        return torch.where(self.pre_activation() <= 0, 0.0, dh)

    def dweight(self, absolute: bool = False) -> Tensor:
        h, dy = absolute_if(absolute, self.h(), self.dy())
        return conv2d_weight(self.image(h), list(self.weight.shape), self.image(dy), padding=1)


def absolute_if(absolute: bool, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (a.abs(), b.abs()) if absolute else (a, b)


def rounding_error(got: Tensor, exact: Tensor, absolute: Tensor, terms: int) -> float:
    """At most 1: what float32 may lose in a sum of so many terms, whose absolute values have that sum."""
    got, exact = finite_alike(got, exact)
    allowed = UNIT * (2 * exact.abs() + (8 + terms**0.5 / 16) * torch.where(absolute.isfinite(), absolute, 1.0))
    return nan_is_infinite((got - exact).abs() / allowed.clamp_min(1e-30))


def run(binary: Path, case: Case) -> Outcome:
    return (forward, dgrad, wgrad)[case.kernel](binary, Problem(case))


def head(case: Case, z: Slice) -> list[int]:
    """Numbers up to the norm: z is buffer 0, its norm's vectors 1 to 3, the seed 4."""
    start = [
        case.kernel,
        case.schedule,
        2 + case.tf32,
        *case.images,
        case.bottleneck,
        case.growth,
        case.multiprocessors,
    ]
    scale = struct.unpack("<i", struct.pack("<f", 1 / (1 - case.dropout)))[0]
    dropout = [4 if case.dropout else -1, LAYER, int(case.dropout * 4294967295.0), scale]
    return [*start, case.shared_bytes, *z.numbers(0), 1, 2, 3, *dropout]


def weight_numbers(case: Case, index: int) -> list[int]:
    return [index, int(case.float32_weight), *weight_strides(case)]


def launch_forward(binary: Path, problem: Problem) -> tuple[Result, Tensor, Tensor]:
    """Also the output and its statistics."""
    case = problem.case
    z, out = Slice(case, case.bottleneck, problem.z), Slice(case, case.growth, None)
    statistics = torch.full((2, case.growth), torch.nan, dtype=torch.float64)
    numbers = [*head(case, z), *weight_numbers(case, 5), *out.numbers(6), 7 if case.statistics else -1]
    buffers = [z.given(), *problem.norm, problem.seed, laid_out(problem), out.given(), statistics]
    return emulator.run(binary, numbers, buffers), out.read(), statistics


def forward(binary: Path, problem: Problem) -> Outcome:
    case = problem.case
    result, got, statistics = launch_forward(binary, problem)
    error = rounding_error(got, problem.forward(), problem.forward(absolute=True), 9 * case.bottleneck)
    if not case.statistics:
        assert statistics.isnan().all()
        return Outcome(result, error, 0)
    (mean, m), (var, v) = map(finite_alike, (got.mean(0), got.var(0, correction=0)), statistics)
    lost = [(m - mean).abs() / got[got.isfinite()].abs().max(), (v - var).abs() / var.clamp_min(1e-9)]
    return Outcome(result, error, nan_is_infinite(torch.cat(lost)))


def slice_gradient(problem: Problem) -> tuple[Slice, Slice]:
    case = problem.case
    return Slice(case, case.growth, problem.features), Slice(case, case.growth, problem.gradient)


def dgrad(binary: Path, problem: Problem) -> Outcome:
    case = problem.case
    z, out = Slice(case, case.bottleneck, problem.z), Slice(case, case.bottleneck, None)
    features, gradient = slice_gradient(problem)
    sums = torch.full((2, case.bottleneck), torch.nan)
    numbers = [*head(case, z), *features.numbers(5), *gradient.numbers(6), 7, 8, 9]
    numbers += [*weight_numbers(case, 10), *out.numbers(11), 12]
    buffers = [z.given(), *problem.norm, problem.seed, features.given(), gradient.given(), *problem.correction]
    result = emulator.run(binary, numbers, [*buffers, laid_out(problem), out.given(), sums])
    mean, scale = problem.norm[:2]
    dn, absolute, centred = problem.dn(), problem.dn(absolute=True), problem.z.double() - mean
    error = rounding_error(out.read(), dn * scale, absolute * scale.abs(), 9 * case.growth)
    got, exact = finite_alike(sums, torch.stack([dn, dn * centred]).sum(1))
    terms = torch.stack([absolute, absolute * centred.abs()]).sum(1)
    sums_error = (got - exact).abs() / torch.where(terms.isfinite(), terms, 1.0).clamp_min(1e-9)
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
    error = rounding_error(got.double(), problem.dweight(), problem.dweight(absolute=True), case.pixels)
    return Outcome(result, error, 0)
