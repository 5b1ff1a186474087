"""The 3x3 of a dense layer, forward and both gradients, against float64."""

from __future__ import annotations

from dataclasses import replace

import guard
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from csp_kernels.kernels import conv3x3
from csp_kernels.kernels.activate import Activation
from csp_kernels.kernels.conv3x3 import Dropout
from csp_kernels.kernels.elementwise import After, Term
from csp_kernels.kernels.launch import Correction, Geometry, Norm, sum_dtype

TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}  # of the largest value
# b, g, geometry
CASES = [
    (16, 12, Geometry(3, 1, 1)),
    (128, 32, Geometry(1, 1, 1)),
    (20, 48, Geometry(2, 7, 5)),
    (128, 32, Geometry(1, 7, 5)),
    (20, 12, Geometry(2, 14, 14)),  # more than one part of the weight gradient's pixels
    (16, 48, Geometry(1, 14, 14)),
    (128, 32, Geometry(1, 14, 14)),
]
cases = pytest.mark.parametrize(("b", "g", "geometry"), CASES, ids=[f"{b}-{g}-{s.n}x{s.h}x{s.w}" for b, g, s in CASES])
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
SEED = 0x1234_5678_9ABC_DEF1


def vector(n: int, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """Between NaN, in the type of sums."""
    return torch.full((n + 2,), float("nan"), dtype=sum_dtype(dtype))[1:-1].uniform_(low, high)


def norm_of(n: int, dtype: torch.dtype) -> Norm:
    scale = vector(n, dtype, 0.5, 1.5)
    scale[::3] *= -1
    return Norm(vector(n, dtype, -1, 1), scale, vector(n, dtype, 0.1, 0.5))  # a constant is not mapped to zero


def weight_of(g: int, b: int, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """Representable in dtype, which the product takes it in."""
    return (torch.randn(g, b // groups, 3, 3) / (b // groups) ** 0.5).to(dtype).to(sum_dtype(dtype))


def hashed(pixels: Tensor, channels: int, seed: int, layer: int) -> Tensor:
    """[pixels, channels]: the hash of csrc/cpu/tile/conv3x3.h in int64."""
    low = 0xFFFFFFFF
    seed &= (1 << 64) - 1
    key = (((seed ^ (seed >> 32)) & low) * 0x9E3779B9 + (layer & low) * 0x85EBCA6B) & low
    index = pixels[:, None] * 4096 + torch.arange(channels)

    def times(x: Tensor, factor: int) -> Tensor:  # of 32 bits each, without overflow
        return ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & low

    h = (index & low) ^ times(index >> 32, 0x27D4EB2F) ^ key
    h = times(h ^ (h >> 16), 0x7FEB352D)
    h = times(h ^ (h >> 15), 0x846CA68B)
    return h ^ (h >> 16)


def kept(pixels: Tensor, channels: int, seed: int, layer: int, rate: float) -> Tensor:
    return hashed(pixels, channels, seed, layer) >= int(rate * 4294967295.0)


def dropout_of(layer: int = 3, rate: float = 0.3) -> Dropout:
    return Dropout(rate, torch.tensor([SEED]), layer)


def mask_of(dropout: Dropout | None, pixels: int, channels: int) -> Tensor | float:
    if dropout is None:
        return 1.0
    mask = kept(torch.arange(pixels), channels, int(dropout.seed), dropout.layer, dropout.rate)
    return mask.double() / (1 - dropout.rate)


def images(x: Tensor, s: Geometry) -> Tensor:
    return x.unflatten(0, (s.n, s.h, s.w)).permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def normalised(z: Tensor, norm: Norm) -> Tensor:
    return (z.double() - norm.mean.double()) * norm.scale.double() + norm.shift.double()


def convolved(n: Tensor, weight: Tensor, s: Geometry) -> Tensor:
    """Of as many groups as the weight says."""
    x = images(torch.relu(n), s)
    groups = x.shape[1] // weight.shape[1]
    return pixels(torch.nn.functional.conv2d(x, weight, stride=s.stride, padding=1, groups=groups))


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    assert a.shape == b.shape and a.isfinite().all()
    error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], f"error {error:.2e} of the largest value"


@cases
@dtypes
def test_forward(buffers, b, g, geometry, dtype):
    forward(buffers, b, g, geometry, dtype)


def forward(buffers, b: int, g: int, geometry: Geometry, dtype: torch.dtype, groups: int = 1) -> None:
    z = buffers.put(torch.randn(geometry.pixels, b).to(dtype))
    norm, weight = norm_of(b, dtype), weight_of(g, b, dtype, groups)
    out = buffers.empty(geometry.outputs, g, dtype)
    statistics = torch.full((2, g + 2), float("nan"), dtype=torch.float64)
    conv3x3.forward(z, norm, weight, out, geometry, "ieee", statistics[:, 1:-1])
    close(out, convolved(normalised(z, norm), weight.double(), geometry), dtype)
    mean, var = statistics[:, 1:-1]
    torch.testing.assert_close(mean, out.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, out.double().var(0, correction=0), rtol=1e-5, atol=1e-12)
    assert statistics[:, [0, -1]].isnan().all()


def backward(
    buffers, b: int, g: int, geometry: Geometry, dtype: torch.dtype, dropout: Dropout | None = None, groups: int = 1
) -> None:  # fmt: skip
    """All outputs of backward against autograd in float64."""
    z = buffers.put(torch.randn(geometry.pixels, b).to(dtype))
    features, gradient = (buffers.put(torch.randn(geometry.outputs, g).to(dtype)) for _ in range(2))
    norm, weight = norm_of(b, dtype), weight_of(g, b, dtype, groups)
    correction = Correction(vector(g, dtype, -1, 1), vector(g, dtype, -0.5, 0.5), vector(g, dtype, 0.2, 0.5))
    out = buffers.empty(geometry.pixels, b, dtype)
    inputs = features, gradient, correction, weight, z, norm
    sums = conv3x3.dgrad(*inputs, out, geometry, "ieee", dropout)
    dweight = conv3x3.wgrad(*inputs, geometry, "ieee", dropout)
    assert sums.dtype == dweight.dtype == sum_dtype(dtype)

    n, w = normalised(z, norm).requires_grad_(), weight.double().requires_grad_()
    mean, slope, offset = (v.double() for v in (correction.mean, correction.slope, correction.offset))
    dy = gradient.double() - ((features.double() - mean) * slope + offset)
    convolved(n, w, geometry).backward(dy * mask_of(dropout, geometry.outputs, g))
    assert n.grad is not None and w.grad is not None
    close(out, n.grad * norm.scale.double(), dtype)
    close(dweight, w.grad, dtype)
    expected = n.grad.sum(0), (n.grad * (z.double() - norm.mean.double())).sum(0)
    for s, e in zip(sums, expected, strict=True):
        close(s, e, dtype)


@cases
@dtypes
def test_backward(buffers, b, g, geometry, dtype):
    backward(buffers, b, g, geometry, dtype)


# b, g, groups, geometry: parts of one group, of several, of all; odd maps, and those of a single row or pixel
OTHERS = [
    (20, 12, 1, Geometry(2, 7, 5, stride=2)),
    (66, 22, 11, Geometry(1, 6, 5)),
    (128, 96, 8, Geometry(1, 7, 6, stride=2)),
    (12, 12, 3, Geometry(2, 4, 1, stride=2)),
    (70, 70, 2, Geometry(1, 3, 3)),
    (36, 48, 1, Geometry(1, 18, 14, stride=2)),
    (16, 80, 1, Geometry(3, 1, 1, stride=2)),
    (24, 24, 24, Geometry(1, 5, 6)),
]


@pytest.mark.parametrize(("b", "g", "groups", "geometry"), OTHERS, ids=str)
@dtypes
def test_strides_and_groups(buffers, b, g, groups, geometry, dtype):
    forward(buffers, b, g, geometry, dtype, groups)
    backward(buffers, b, g, geometry, dtype, None, groups)


@pytest.mark.parametrize(("b", "g", "groups", "geometry"), OTHERS[:4], ids=str)
def test_programs_write_their_own(buffers, b, g, groups, geometry):
    """Nothing is stored twice: the interpreter runs programs one after the other, a GPU side by side."""
    stores: dict[tuple[str, str], list[np.ndarray]] = {}

    def observe(kind: str, argument: guard.Argument, elements: np.ndarray) -> None:
        if kind == "store" and argument.kernel.startswith("conv3x3"):
            stores.setdefault((argument.kernel, argument.name), []).append(elements.flatten())

    with guard.observed(observe):
        forward(buffers, b, g, geometry, torch.float32, groups)
        backward(buffers, b, g, geometry, torch.float32, None, groups)
    assert len(stores) == 5  # an output and partial statistics; a gradient and partial sums; those of the weight
    for where, elements in stores.items():
        _, counts = np.unique(np.concatenate(elements), return_counts=True)
        assert counts.max() == 1, where


@pytest.mark.parametrize("geometry", [Geometry(2, 7, 5, stride=2), Geometry(1, 4, 6, stride=2)], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_stride_adds_to_a_source(buffers, groups, geometry):
    """Without a norm; the source is what is written to. Weights lie as channels_last models have them."""
    b, g = 40, 12
    z, source = (buffers.put(torch.randn(geometry.pixels, b).double()) for _ in range(2))
    gradient = buffers.put(torch.randn(geometry.outputs, g).double())
    weight = weight_of(g, b, torch.float64, groups).to(memory_format=torch.channels_last)
    expected = source.clone()
    conv3x3.dgrad(gradient, gradient, None, weight, z, None, source, geometry, source=source)
    dweight = conv3x3.wgrad(gradient, gradient, None, weight, z, None, geometry)
    x, w = z.clone().requires_grad_(), weight.clone().requires_grad_()
    y = torch.nn.functional.conv2d(images(x, geometry), w, stride=2, padding=1, groups=groups)
    pixels(y).backward(gradient)
    assert x.grad is not None and w.grad is not None
    close(source, expected + x.grad, torch.float64)
    close(dweight, w.grad, torch.float64)


@pytest.mark.parametrize(("b", "g", "groups", "geometry"), [(20, 12, 1, Geometry(2, 7, 5)), *OTHERS[:3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("added", ["nothing", "as it is", "through a norm"])
def test_after(buffers, b, g, groups, geometry, dtype, added):
    """Norm, activation and residual in inference."""
    z, x = buffers.put(torch.randn(geometry.pixels, b).to(dtype)), torch.randn(geometry.outputs, g).to(dtype)
    norm, weight = norm_of(b, dtype), weight_of(g, b, dtype, groups)
    after = After(norm_of(g, dtype), Activation(2, 0.1), None if added == "nothing" else Term(buffers.put(x)))
    if added == "through a norm":
        after = replace(after, residual=Term(buffers.put(x), norm_of(g, dtype), Activation(1)))
    out = buffers.empty(geometry.outputs, g, dtype)
    conv3x3.forward(z, norm, weight, out, geometry, after=after)
    y = torch.nn.functional.leaky_relu(
        normalised(convolved(normalised(z, norm), weight.double(), geometry), after.norm), 0.1
    )
    if after.residual is not None:
        term = after.residual
        y = y + (x.double() if term.norm is None else torch.relu(normalised(x, term.norm)))
    close(out, y, dtype)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_a_norm(buffers, b, g, geometry, dtype):
    """z as it is, nothing owed: neither the features nor, for its own gradient, z are read. Added to a source."""
    z, gradient, source = (buffers.put(torch.randn(geometry.pixels, c).to(dtype)) for c in (b, g, b))
    weight, nan = weight_of(g, b, dtype), torch.full((geometry.pixels, max(b, g)), torch.nan, dtype=dtype)
    y, out = buffers.empty(geometry.pixels, g, dtype), buffers.empty(geometry.pixels, b, dtype)
    conv3x3.forward(z, None, weight, y, geometry)
    sums = conv3x3.dgrad(nan[:, :g], gradient, None, weight, nan[:, :b], None, out, geometry, source=source)
    dweight = conv3x3.wgrad(nan[:, :g], gradient, None, weight, z, None, geometry)
    x, w = (t.double().clone().requires_grad_() for t in (z, weight))
    expected = pixels(torch.nn.functional.conv2d(images(x, geometry), w, padding=1))
    expected.backward(gradient.double())
    assert sums is None and x.grad is not None and w.grad is not None
    close(y, expected.detach(), dtype)
    close(out, source.double() + x.grad, dtype)
    close(dweight, w.grad, dtype)


def test_sums_alone_are_added(buffers):
    b, g, geometry = 20, 12, Geometry(2, 7, 5)
    z, features, gradient = (buffers.put(torch.randn(70, c)) for c in (b, g, g))
    given = features, gradient, None, weight_of(g, b, torch.float32), z, norm_of(b, torch.float32)
    expected = conv3x3.dgrad(*given, torch.empty(70, b), geometry)
    sums = torch.ones(2, b + 2, dtype=torch.float64)
    got = conv3x3.dgrad(*given, None, geometry, sums=sums[:, 1:-1])
    torch.testing.assert_close(sums[:, 1:-1], expected.double() + 1)
    assert got.data_ptr() == sums[:, 1:].data_ptr() and (sums[:, [0, -1]] == 1).all()


def test_weights_in_channels_last_order(buffers):
    geometry, norm = Geometry(1, 4, 3), norm_of(20, torch.float32)
    weight = weight_of(12, 20, torch.float32).to(memory_format=torch.channels_last)
    z, out = buffers.put(torch.randn(12, 20)), buffers.empty(12, 12, torch.float32)
    conv3x3.forward(z, norm, weight, out, geometry)
    close(out, convolved(normalised(z, norm), weight.double(), geometry), torch.float32)


def test_large_mean_is_subtracted_before_it_costs_precision(buffers):
    geometry, weight = Geometry(2, 7, 5), weight_of(12, 16, torch.float32)
    z, out = buffers.put(1000 + 0.01 * torch.randn(70, 16)), buffers.empty(70, 12, torch.float32)
    norm = Norm(torch.full((16,), 1000.0), torch.full((16,), 100.0), torch.zeros(16))
    conv3x3.forward(z, norm, weight, out, geometry)
    close(out, convolved(normalised(z, norm), weight.double(), geometry), torch.float32)


def test_statistics_of_a_large_mean(buffers):
    geometry = Geometry(2, 14, 14)
    z, out = buffers.put(1000 + 0.01 * torch.randn(392, 16)), buffers.empty(392, 16, torch.float32)
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = torch.eye(16)
    statistics = torch.empty(2, 16, dtype=torch.float64)
    norm = Norm(torch.zeros(16), torch.ones(16), torch.zeros(16))
    conv3x3.forward(z, norm, weight, out, geometry, statistics=statistics)
    assert torch.equal(out, z)
    torch.testing.assert_close(statistics[0], z.double().mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(statistics[1], z.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_dropout(buffers):
    b, g, geometry = 20, 48, Geometry(2, 7, 5)
    z, norm, weight = buffers.put(torch.randn(70, b)), norm_of(b, torch.float32), weight_of(g, b, torch.float32)
    plain, dropped = buffers.empty(70, g, torch.float32), buffers.empty(70, g, torch.float32)
    dropout, statistics = dropout_of(), torch.empty(2, g, dtype=torch.float64)
    conv3x3.forward(z, norm, weight, plain, geometry)
    conv3x3.forward(z, norm, weight, dropped, geometry, statistics=statistics, dropout=dropout)
    mask = kept(torch.arange(70), g, SEED, dropout.layer, dropout.rate)
    assert torch.equal(dropped, torch.where(mask, plain * (1 / (1 - dropout.rate)), 0.0))
    torch.testing.assert_close(statistics[1], dropped.double().var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dropout_backward(buffers, dtype):
    backward(buffers, 20, 48, Geometry(2, 7, 5), dtype, dropout_of())


@triton.jit
def _ones(out, first, seed, layer, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    p, n = tl.arange(0, ROWS), tl.arange(0, N)
    x = conv3x3._drop(tl.full((ROWS, N), 1.0, tl.float32), p + tl.load(first), n, seed, layer, THRESHOLD, SCALE)
    tl.store(out + p[:, None] * N + n[None, :], x)


@pytest.mark.parametrize("first", [0, (1 << 20) - 7, (1 << 31) - 20])  # from 2^20 on the index has more than 32 bits
@pytest.mark.parametrize("seed", [0, 1, SEED, (1 << 63) - 1, -5])
@pytest.mark.parametrize(("layer", "rate"), [(0, 0.5), (1, 0.2), (57, 0.9), (16, 1.0)])
def test_dropout_mask_is_the_cpus(first, seed, layer, rate):
    out, dropout = torch.empty(16, 32), Dropout(rate, torch.tensor([seed]), layer)
    start = torch.tensor([first], dtype=torch.int32)  # as the kernels count pixels
    _ones[(1,)](out, start, dropout.seed, layer, THRESHOLD=dropout.threshold, SCALE=dropout.scale, ROWS=16, N=32)
    mask = kept(first + torch.arange(16), 32, seed, layer, rate)
    assert torch.equal(out, mask * torch.tensor(dropout.scale))
    assert rate == 1 or abs(mask.float().mean() - (1 - rate)) < 0.1


def test_dropout_keeps_what_equals_the_threshold():
    out, h = torch.empty(16, 32), hashed(torch.arange(16), 32, SEED, 3)
    seed, threshold = torch.tensor([SEED]), int(h[5, 7])
    _ones[(1,)](out, torch.tensor([0]), seed, 3, THRESHOLD=threshold, SCALE=2.0, ROWS=16, N=32)
    assert torch.equal(out, 2.0 * (h >= threshold)) and out[5, 7] == 2


def test_arguments_are_checked():
    geometry, norm = Geometry(1, 2, 2), norm_of(16, torch.float32)
    weight, z, out = torch.zeros(12, 16, 3, 3), torch.zeros(4, 16), torch.zeros(4, 12)
    with pytest.raises(ValueError, match="z"):
        conv3x3.forward(z[:3], norm, weight, out, geometry)
    with pytest.raises(ValueError, match="out"):
        conv3x3.forward(z, norm, weight, out.half(), geometry)
    with pytest.raises(ValueError, match="channel stride"):
        conv3x3.forward(torch.zeros(16, 4).T, norm, weight, out, geometry)
    with pytest.raises(ValueError, match="weight"):
        conv3x3.forward(z, norm, weight[..., :1], out, geometry)
    with pytest.raises(ValueError, match="weight"):
        conv3x3.forward(z, norm, torch.zeros(12, 5, 3, 3), out, geometry)
    with pytest.raises(ValueError, match="weight"):
        conv3x3.forward(z, norm, torch.zeros(10, 4, 3, 3), out[:, :10], geometry)
    with pytest.raises(ValueError, match="nothing follows"):
        statistics = torch.zeros(2, 12, dtype=torch.float64)
        conv3x3.forward(z, norm, weight, out, geometry, "ieee", statistics, after=After(norm_of(12, torch.float32)))
    with pytest.raises(ValueError, match="out"):
        conv3x3.forward(z, norm, weight, out, Geometry(1, 2, 2, stride=2))
    with pytest.raises(ValueError, match="pool"):
        conv3x3.forward(z, norm, weight, out, Geometry(1, 2, 2, pool=True))
