"""Norm, activation and average behind a product, interpreted: against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import error
from torch import Tensor

from csp_kernels.kernels import activate
from csp_kernels.kernels.activate import IDENTITY, RELU, Activation
from csp_kernels.kernels.launch import Geometry, Norm

ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "identity": (IDENTITY, lambda x: x),
    "relu": (RELU, F.relu),
    "leaky_relu": (Activation(2, 0.1), lambda x: F.leaky_relu(x, 0.1)),
    "silu": (Activation(3), F.silu),
    "mish": (Activation(4), F.mish),
    "hardswish": (Activation(5), F.hardswish),
    "relu6": (Activation(6), F.relu6),
    "gelu": (Activation(7), F.gelu),
    "gelu_tanh": (Activation(8), partial(F.gelu, approximate="tanh")),
}
CLOSE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@dataclass(frozen=True)
class Case:
    channels: int = 12
    size: tuple[int, int, int] = (2, 5, 7)  # N, H, W
    pool: bool = False
    act: str = "relu"
    dtype: torch.dtype = torch.float32
    norm: bool = True
    mean: float = 0.0
    std: float = 1.0

    @property
    def geometry(self) -> Geometry:
        return Geometry(*self.size, self.pool)


CASES = {
    "plain": Case(),
    "ragged": Case(channels=5, size=(1, 3, 11)),
    "wide": Case(channels=131),
    "pool": Case(pool=True),
    "pool even": Case(pool=True, size=(3, 4, 2), channels=16),
    "many pixels": Case(size=(1, 151, 110), channels=3, pool=True, dtype=torch.bfloat16),
    "without a norm": Case(norm=False, pool=True, act="silu"),
    "copy": Case(norm=False, act="identity"),
    "large mean": Case(mean=1000.0, std=0.01),
    "float64": Case(dtype=torch.float64, pool=True, act="mish"),
    **{name: Case(act=name, size=(2, 4, 3)) for name in ACTIVATIONS},
    **{
        f"{name} bfloat16": Case(act=name, dtype=torch.bfloat16, size=(2, 4, 3))
        for name in ("silu", "hardswish", "gelu")
    },
    "float16": Case(act="mish", dtype=torch.float16, pool=True),
}


def draw(case: Case) -> tuple[Tensor, Norm | None]:
    """z [P, O] and its norm: inputs of the activation on both sides of every kink."""
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    z = (torch.randn(case.geometry.pixels, case.channels) * case.std + case.mean).to(case.dtype)
    mean = case.mean + torch.randn(case.channels) * 0.3 * case.std
    scale, shift = (torch.rand(case.channels) + 1.5) / case.std, torch.randn(case.channels)
    return z, Norm(*(t.to(wide) for t in (mean, scale, shift))) if case.norm else None


def exact(z: Tensor, norm: Norm | None, case: Case) -> tuple[Tensor, Tensor]:
    """Output [P', O] and norm(z), float64, differentiable."""
    pre = z.double()
    if norm is not None:
        pre = (pre - norm.mean.double()) * norm.scale.double() + norm.shift.double()
    pre = pre.detach().requires_grad_()
    y = ACTIVATIONS[case.act][1](pre)
    if case.pool:
        images = y.unflatten(0, case.size).permute(0, 3, 1, 2)
        y = F.avg_pool2d(images, 2).permute(0, 2, 3, 1).flatten(0, 2)
    return y, pre


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, buffers: Any) -> None:
    case = CASES[name]
    z, norm = draw(case)
    out = buffers.empty(case.geometry.outputs, case.channels, case.dtype)
    activate.forward(buffers.put(z), norm, out, case.geometry, ACTIVATIONS[case.act][0])
    assert error(out, exact(z, norm, case)[0].detach()) <= CLOSE[case.dtype] * (20 if case.mean else 1)


@pytest.mark.parametrize("name", CASES)
def test_backward(name: str, buffers: Any) -> None:
    case = CASES[name]
    z, norm = draw(case)
    act = ACTIVATIONS[case.act][0]
    y, pre = exact(z, norm, case)
    d = torch.randn(y.shape).to(case.dtype)
    (expected,) = torch.autograd.grad(y, pre, d.double())
    dn = buffers.empty(case.geometry.pixels, case.channels, case.dtype)
    given = buffers.put(d), buffers.put(z), norm
    sums = activate.backward(*given, dn, case.geometry, act)
    scaled = expected * (1.0 if norm is None else norm.scale.double())
    # at mean 1000 a few ReLUs change sides
    assert error(dn, scaled) <= CLOSE[case.dtype] * (20 if case.mean else 1)
    if norm is None or sums is None:
        assert norm is None and sums is None
        return
    centred = z.double() - norm.mean.double()
    for got, terms in zip(sums, (expected, expected * centred), strict=True):
        assert error(got, terms.sum(0), terms.abs().sum(0).norm().item()) <= min(1e-5, CLOSE[case.dtype])
    again = activate.backward(*given, None, case.geometry, act)
    assert again is not None and torch.equal(sums, again)


@pytest.mark.parametrize("name", ["plain", "pool", "without a norm", "copy"])
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_adds(name: str, in_place: bool, buffers: Any) -> None:
    """The gradient to a source, on the border of an odd map too, and the sums to those of others."""
    case = replace(CASES[name], dtype=torch.float64)
    z, norm = draw(case)
    act, before = ACTIVATIONS[case.act][0], torch.randn(z.shape, dtype=torch.float64)
    d = torch.randn(case.geometry.outputs, case.channels, dtype=torch.float64)
    plain, added = (buffers.empty(*z.shape, torch.float64) for _ in range(2))
    source = added if in_place else buffers.put(before)
    source.copy_(before)
    expected = activate.backward(d, z, norm, plain, case.geometry, act)
    sums = None if norm is None else torch.ones(2, case.channels, dtype=torch.float64)
    got = activate.backward(d, z, norm, added, case.geometry, act, source, sums)
    assert got is sums
    torch.testing.assert_close(added, before + plain, rtol=1e-14, atol=1e-14)
    if expected is not None and sums is not None:
        torch.testing.assert_close(sums, expected + 1, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("pool", [False, True])
def test_backward_of_a_copy_needs_no_input(pool: bool, buffers: Any) -> None:
    case = Case(pool=pool, act="identity", norm=False)
    z, _ = draw(case)
    y, pre = exact(z, None, case)
    d, out = torch.randn(y.shape), buffers.empty(case.geometry.pixels, case.channels, torch.float32)
    activate.backward(d, None, None, out, case.geometry, IDENTITY)
    assert torch.equal(out, torch.autograd.grad(y, pre, d.double())[0].float())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinks_and_nan(name: str) -> None:
    """PyTorch's derivatives where there are two, NaN in, NaN out."""
    act = ACTIVATIONS[name][0]
    z, geometry = torch.tensor([[-3.0, 0.0, 3.0, 6.0, torch.nan]]), Geometry(1, 1, 1)
    y, dz = torch.empty(1, 5), torch.empty(1, 5)
    activate.forward(z, None, y, geometry, act)
    activate.backward(torch.ones(1, 5), z, None, dz, geometry, act)
    assert y[0, 4].isnan() and torch.equal(y[0, :4].isnan(), torch.zeros(4, dtype=torch.bool))
    at = {"relu": [0.0, 0.0, 1.0, 1.0], "leaky_relu": [0.1, 0.1, 1.0, 1.0], "hardswish": [0.0, 0.5, 1.0, 1.0]}
    at["relu6"] = [0.0, 0.0, 1.0, 0.0]
    if name in at:
        torch.testing.assert_close(dz[0, :4], torch.tensor(at[name]))


def test_large_arguments_stay_finite() -> None:
    z, geometry = torch.tensor([[-1e4, -90.0, -30.0, 30.0, 90.0, 1e4]]), Geometry(1, 1, 1)
    for act, function in ACTIVATIONS.values():
        y, dz = torch.empty(1, 6), torch.empty(1, 6)
        activate.forward(z, None, y, geometry, act)
        activate.backward(torch.ones(1, 6), z, None, dz, geometry, act)
        torch.testing.assert_close(y, function(z))
        assert dz.isfinite().all()


def test_refuses_wrong_shapes() -> None:
    z, geometry = torch.zeros(12, 4), Geometry(1, 3, 4, True)
    with pytest.raises(ValueError, match=r"out: expected \(2, 4\), got \(12, 4\)"):
        activate.forward(z, None, torch.empty(12, 4), geometry, RELU)
    with pytest.raises(ValueError, match=r"d: expected \(2, 4\)"):
        activate.backward(z, z, None, None, geometry, RELU)
    with pytest.raises(ValueError, match="z is needed"):
        activate.backward(torch.zeros(2, 4), None, None, z, geometry, RELU)
