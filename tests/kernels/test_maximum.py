"""Maxima over windows, interpreted: against PyTorch, of equal values and of NaN too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csp_kernels.kernels import maximum
from csp_kernels.kernels.launch import Geometry

# channels, size, geometry: several programs and few pixels, windows that are larger than the map
CASES = [
    (21, 3, Geometry(2, 7, 5, stride=2)),
    (70, 5, Geometry(1, 9, 6)),
    (8, 1, Geometry(3, 4, 3, stride=2)),
    (3, 5, Geometry(2, 6, 7, stride=2)),
    (16, 9, Geometry(2, 3, 2)),
    (5, 7, Geometry(1, 1, 1, stride=2)),
    (16, 3, Geometry(1, 1, 8)),
    (35, 2, Geometry(2, 7, 6, stride=2)),
    (9, 2, Geometry(1, 4, 5, stride=2)),
]
cases = pytest.mark.parametrize(("channels", "size", "geometry"), CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def images(x: Tensor, s: Geometry) -> Tensor:
    return x.unflatten(0, (s.n, s.h, s.w)).permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def largest(x: Tensor, size: int, s: Geometry) -> Tensor:
    return pixels(F.max_pool2d(images(x, s), size, s.stride, (size - 1) // 2, ceil_mode=size == 2))


def compare(x: Tensor, size: int, geometry: Geometry, buffers: Any) -> None:
    """Forward, statistics and backward; x, a view: what is not finite is where it is in PyTorch."""
    channels, dtype = x.shape[1], x.dtype
    out, dx = buffers.empty(geometry.outputs, channels, dtype), buffers.empty(geometry.pixels, channels, dtype)
    statistics = torch.full((2, channels + 2), torch.nan, dtype=torch.float64)
    maximum.forward(x, out, geometry, size, statistics[:, 1:-1])
    leaf = x.double().clone().requires_grad_()
    expected = largest(leaf, size, geometry)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=0, atol=0, equal_nan=True)
    if out.isfinite().all():
        moments = torch.stack([out.double().mean(0), out.double().var(0, correction=0)])
        torch.testing.assert_close(statistics[:, 1:-1], moments, rtol=1e-5, atol=1e-6)
    assert statistics[:, [0, -1]].isnan().all()
    d = buffers.put(torch.randint(-8, 9, (geometry.outputs, channels)).to(dtype))  # sums are exact
    maximum.backward(d, maximum.positions_of(x, geometry, size), dx, geometry, size)
    expected.backward(d.double())
    assert leaf.grad is not None and torch.equal(dx.double(), leaf.grad)


@cases
@dtypes
def test_random_values(channels: int, size: int, geometry: Geometry, dtype: torch.dtype, buffers: Any) -> None:
    compare(buffers.put(torch.randn(geometry.pixels, channels).to(dtype)), size, geometry, buffers)


@cases
def test_equal_values(channels: int, size: int, geometry: Geometry, buffers: Any) -> None:
    """The first is the maximum, row by row."""
    compare(buffers.put(torch.randint(0, 2, (geometry.pixels, channels)).float()), size, geometry, buffers)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite(channels: int, size: int, geometry: Geometry, dtype: torch.dtype, buffers: Any) -> None:
    """NaN is larger than all, the last of several is taken; of nothing but minus infinity the first."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf, 1.0, 2.0])
    x = special[torch.randint(0, 6, (geometry.pixels, channels))]
    x[:, ::4] = -torch.inf
    compare(buffers.put(x.to(dtype)), size, geometry, buffers)


def test_windows_of_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions beyond 16 bits have 32."""
    geometry, x = Geometry(1, 2, 3), torch.randn(6, 4)
    monkeypatch.setattr(maximum, "_run", lambda *_: None)
    assert maximum.positions_of(x, geometry, 1).dtype == torch.int16
    assert maximum.positions_of(x, geometry, 183).dtype == torch.int32


def test_refuses_wrong_arguments() -> None:
    x, geometry = torch.zeros(6, 3), Geometry(1, 2, 3, stride=2)
    with pytest.raises(ValueError, match=r"out: expected \(2, 3\), got \(6, 3\)"):
        maximum.forward(x, torch.zeros(6, 3), geometry, 3)
    with pytest.raises(ValueError, match=r"x: expected \(6, 3\), got \(5, 3\)"):
        maximum.positions_of(x[:5], geometry, 3)
    with pytest.raises(ValueError, match="statistics"):
        maximum.forward(x, torch.zeros(2, 3), geometry, 3, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="positions"):
        maximum.backward(torch.zeros(2, 3), torch.zeros(6, 3, dtype=torch.int16), x, geometry, 3)
