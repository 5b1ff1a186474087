"""Statistics, split copies and sums over programs, against float64."""

from __future__ import annotations

import pytest
import torch

from csp_kernels.kernels import statistics

EPS = {torch.float64: 1e-15, torch.float32: 1e-7, torch.float16: 1e-7, torch.bfloat16: 1e-7}  # of the sums
DTYPES = list(EPS)


def close(stats: torch.Tensor, x: torch.Tensor) -> None:
    """Against x as stored; as precise as x's own spread allows."""
    x, eps = x.double(), EPS[x.dtype]
    std = x.std(0, correction=0)
    assert ((stats[0] - x.mean(0)).abs() <= 20 * eps * std).all()
    assert ((stats[1] / std**2 - 1).abs() <= 20 * eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pixels", "channels"), [(70, 5), (300, 17), (128, 48), (131, 320)])
def test_copy_split(buffers, dtype, pixels, channels):
    x = buffers.put((torch.randn(pixels, channels) * 3 + 2).to(dtype))
    out = buffers.empty(pixels, channels, dtype)
    stats = buffers.empty(2, channels, torch.float64)
    statistics.copy_split(x, out, stats)
    assert torch.equal(out, x)
    close(stats, x)


def test_one_of_the_two(buffers):
    """From a slice with numbers around it: none of them may come along."""
    x = torch.randn(152, 25)[1:-1, 3:20]
    out, stats = buffers.empty(150, 17, torch.float32), buffers.empty(2, 17, torch.float64)
    statistics.copy_split(x, out, None)
    statistics.copy_split(x, None, stats)
    assert torch.equal(out, x)
    close(stats, x)


@pytest.mark.parametrize(("mean", "std"), [(1000, 0.01), (100_000, 0.1)])
def test_large_mean(buffers, mean, std):
    x = buffers.put((mean + std * torch.randn(700, 24, dtype=torch.float64)).float())
    stats = buffers.empty(2, 24, torch.float64)
    statistics.copy_split(x, None, stats)
    std = x.double().std(0, correction=0)
    assert ((stats[0] - x.double().mean(0)).abs() <= 1e-5 * std).all()
    assert ((stats[1] / std**2 - 1).abs() <= 1e-5).all()


def test_outlier_in_a_tile(buffers):
    """The first pixels are far from the others: no value seen early is a good reference for all."""
    x = torch.randn(300, 16)
    x[0], x[128] = 1e4, -1e4
    x = buffers.put(x)
    stats = buffers.empty(2, 16, torch.float64)
    statistics.copy_split(x, None, stats)
    assert (stats[0] - x.double().mean(0)).abs().max() <= 1e-3
    assert (stats[1] / x.double().var(0, correction=0) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e17, 1e19, 1e25, 1e37])
def test_squares_beyond_float32(buffers, dtype, size):
    """As long as float32 holds the values and their deviations; a channel of ordinary values beside them."""
    x = torch.randn(300, 16) * size
    x[:, 3] = torch.randn(300)
    x = buffers.put(x.to(dtype))
    stats = buffers.empty(2, 16, torch.float64)
    statistics.copy_split(x, None, stats)
    close(stats, x)


def test_deviations_beyond_float32():
    """NaN: an infinite variance would make finite outputs of zeros."""
    stats, x = torch.empty(2, 16, dtype=torch.float64), torch.full((200, 16), 3e38)
    x[::8] *= -1
    statistics.copy_split(x, None, stats)
    assert stats[1].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    """The variance of a channel that has one is no number: not 0, as the larger of NaN and 0 would be."""
    stats, x = torch.empty(2, 16, dtype=torch.float64), torch.randn(200, 16)
    x[150, 3] = value
    statistics.copy_split(x, None, stats)
    assert stats[1, 3].isnan() and not stats[0, 3].isfinite()
    assert stats[:, :3].isfinite().all() and stats[:, 4:].isfinite().all()


def test_constant_channel():
    stats = torch.empty(2, 16, dtype=torch.float64)
    statistics.copy_split(torch.full((200, 16), 0.1), None, stats)
    assert (stats[1] >= 0).all() and (stats[1] <= 1e-16).all()


def test_many_tiles(buffers):
    """More tiles than one program merges at a time, a last one that is not full."""
    x = torch.randn(300 * 7 - 3, 5, dtype=torch.float64) + 50
    tiles = x.split(7)
    means, m2 = [t.mean(0) for t in tiles], [t.var(0, correction=0) * len(t) for t in tiles]
    partials = torch.stack([torch.stack(means), torch.stack(m2)])
    stats = buffers.empty(2, 5, torch.float64)
    statistics.merge(partials, len(x), 7, stats)
    close(stats, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("parts", "rows", "n"), [(1, 3, 5), (37, 2, 320), (300, 2, 17), (3, 12, 2500)])
def test_total(buffers, dtype, parts, rows, n):
    partials = torch.randn(parts, rows, n, dtype=dtype)
    out = buffers.empty(rows, n, dtype)
    statistics.total(partials, out)
    assert torch.allclose(out.double(), partials.double().sum(0), rtol=EPS[dtype] * 4, atol=EPS[dtype] * 4)


def test_refuses_other_layouts():
    x = torch.randn(4, 6, 8)
    with pytest.raises(ValueError, match="channel stride 1"):
        statistics.copy_split(x[0].t(), None, torch.empty(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="statistics"):
        statistics.copy_split(x[0], None, torch.empty(2, 8))
