"""NaN, infinities and numbers near the limits of float32: every layer against its plain PyTorch twin.

Maps of 2x2 pixels: a 3x3 reaches all of an image there, whichever algorithm computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import modes
import pytest
import torch
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import reference
from csp_kernels.vocabulary import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("native")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Joined(nn.Module):
    """Takes the inputs of a ConcatConv as slices of one tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer([x[:, :5], x[:, 5:]])


class Split(Joined):
    """The same for a PartialTransition."""

    def forward(self, x: Tensor) -> Any:
        return self.layer(x[:, :5], x[:, 5:])


def concat(act: str) -> Callable[[Any], nn.Module]:
    return lambda where: Joined(where.ConcatConv([5, 12], 9, act=act, negative_slope=0.1))


def partial(order: str, fusion: str) -> Callable[[Any], nn.Module]:
    return lambda where: Split(where.PartialTransition(5, 12, 9, 14, order=order, fusion=fusion, pool=None))


def stage(layer: str) -> Callable[[Any], nn.Module]:
    return lambda where: where.CSPDenseStage(17, 22, 2, 8, 2, layer=layer, pool=None)


POINTWISE: dict[str, Callable[[Any], nn.Module]] = {
    **{f"concat {act}": concat(act) for act in ACTIVATIONS},
    **{f"partial {o} {f}": partial(o, f) for o in ("pre", "post") for f in ("csp", "first", "last")},
}
LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    **POINTWISE,
    "dense": lambda where: where.DenseBlock(2, 17, 8, 2),
    "dense recompute": lambda where: where.DenseBlock(2, 17, 8, 2, **({} if where is reference else RECOMPUTE)),
    "post": lambda where: where.PostDenseBlock(2, 17, 8, 2),
    "two_way": lambda where: where.TwoWayDenseBlock(2, 17, 8, 2),
    **{f"stage {layer}": stage(layer) for layer in ("pre", "post", "two_way")},
}
RECOMPUTE = {"recompute": "bottleneck"}


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A layer and its twin, of the same random norms."""
    ours, naive = LAYERS[name](csp), LAYERS[name](reference)
    modes.twins(ours, naive)
    return ours.to(dtype), naive.to(dtype)


def results(module: nn.Module, x: Tensor, spoil: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y = y[0] if isinstance(y, tuple) else y
    grad = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], spoil(grad) if spoil else grad)
    named = {f"grad {name}": g for (name, _), g in zip(module.named_parameters(), gradients[1:], strict=True)}
    state = {name: t.clone() for name, t in module.named_buffers() if t.is_floating_point()}
    return {"y": y.detach(), "grad x": gradients[0], **named, **state}


def check_same_kinds(ours: dict[str, Tensor], naive: dict[str, Tensor], dtype: torch.dtype) -> None:
    """NaN and infinities in the same places (of a 3x3's weights: channels), the rest close; in 16 bits kinks decide."""
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, math.inf)
    for name, expected in naive.items():
        got = ours[name]
        if name.startswith("grad") and expected.dim() == 4 and expected.shape[-1] == 3:
            got, expected = got.sum((2, 3)), expected.sum((2, 3))
        message = f"{name}: NaN {int(got.isnan().sum())}, expected {int(expected.isnan().sum())} of {got.numel()}"
        assert torch.equal(got.isnan(), expected.isnan()), message
        assert torch.equal(got.isinf(), expected.isinf()), name
        finite = expected.isfinite()
        if finite.any():
            error = (got[finite].double() - expected[finite].double()).norm() / expected[finite].double().norm()
            assert not error > tolerance, f"{name}: {error}"


def frozen(*blocks: nn.Module) -> None:
    for block in blocks:
        block.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_nan_pixel_with_running_statistics(name: str, dtype: torch.dtype) -> None:
    """It reaches its image and the sums, no more; where the activation is NaN its gradient passes."""
    ours, naive = pair(name, dtype)
    frozen(ours, naive)
    x = torch.randn(3, 17, 2, 2).to(dtype)
    x[1, 3, 0, 1] = x[1, 9, 1, 1] = math.nan
    if "hardswish" in name and dtype.itemsize == 2:  # PyTorch's gradient there: NaN in whole vectors, not behind them
        naive = naive.double()
    check_same_kinds(results(ours, x), results(naive, x.to(next(naive.parameters()).dtype)), dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_nan_pixel_of_a_larger_map(name: str) -> None:
    """F(2x2) carries it no further than a 3x3 does."""
    ours, naive = pair(name, torch.float32)
    frozen(ours, naive)
    x = torch.randn(2, 17, 13, 14)
    x[1, 3, 6, 5] = math.nan
    mine, expected = ({k: t for k, t in results(m, x).items() if k in ("y", "grad x")} for m in (ours, naive))
    assert expected["y"].isnan().any() and not expected["y"].isnan().all()
    check_same_kinds(mine, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_nan_in_a_batch(name: str, dtype: torch.dtype) -> None:
    ours, naive = pair(name, dtype)
    x = torch.randn(3, 17, 2, 2).to(dtype)
    x[1, 3, 0, 1] = math.nan
    got, expected = results(ours, x), results(naive, x)
    if "relu6" in name:  # PyTorch's gradient at NaN is 0 in whole vectors, 1 behind them
        del expected["grad layer.norm.bias"]
    check_same_kinds(got, expected, dtype)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", POINTWISE)
def test_infinite_pixel_with_running_statistics(name: str, value: float) -> None:
    ours, naive = pair(name, torch.float64)
    frozen(ours, naive)
    x = torch.randn(3, 17, 2, 2).double()
    x[1, 3, 0, 1] = value
    check_same_kinds(results(ours, x), results(naive, x), torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_nan_gradient(name: str, dtype: torch.dtype, training: bool) -> None:
    """It ends at an inactive ReLU."""
    ours, naive = pair(name, dtype)
    if not training:
        frozen(ours, naive)
    x = torch.randn(3, 17, 2, 2).to(dtype)

    def spoil(grad: Tensor) -> Tensor:
        grad[1, -3, 0, 1] = math.nan
        return grad

    check_same_kinds(results(ours, x, spoil), results(naive, x, spoil), dtype)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "hardswish", "relu6"])
def test_nan_gradient_where_an_output_is_constant(act: str) -> None:
    """Of every output in turn: exactly those that torch leaves out."""
    x, w = torch.randn(2, 17, 2, 2) * 4, torch.randn(9, 17, 1, 1)
    running = [torch.zeros(9), torch.ones(9)]
    norm = torch.ones(9), torch.zeros(9)
    results: list[list[bool]] = []
    for where in (csp.ops, reference):
        a = x.clone().requires_grad_()
        (y,), _ = where.concat_conv([a], w, *norm, running, frozen=True, act=act, negative_slope=0.0)
        spoiled = []
        for i in range(y.numel()):
            grad = torch.ones_like(y)
            grad.view(-1)[i] = math.nan
            spoiled.append(bool(torch.autograd.grad(y, a, grad, retain_graph=True)[0].isnan().any()))
        results.append(spoiled)
    assert results[0] == results[1] and (act == "leaky_relu" or not all(results[1]))


@pytest.mark.parametrize("act", ["hardswish", "relu6"])
def test_corners(act: str) -> None:
    """The derivatives at -3 and 3, 0 and 6 are torch's."""
    x = torch.tensor([-3.0, 3.0, -4.0, 6.0, 0.0, 1.0]).view(1, 1, 2, 3)
    gradients = []
    for where in (csp.ops, reference):
        a = x.clone().requires_grad_()
        one, zero = torch.ones(1), torch.zeros(1)
        (y,), _ = where.concat_conv(
            [a], torch.ones(1, 1, 1, 1), one, zero, [zero, one], frozen=True, act=act, eps=1e-30
        )
        gradients.append(torch.autograd.grad(y.sum(), a)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("act", ["silu", "mish", "hardswish", "relu6", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_of_huge_numbers(act: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1.5e38, -1e30, -100.0, -88.4, -87.9, -20.0, 20.0, 88.4, 1e30, 1.5e38, 0.0, -0.0], dtype=dtype)
    values = []
    for where in (csp.ops, reference):
        a = x.view(1, 1, 3, 4).clone().requires_grad_()
        one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        w = torch.ones(1, 1, 1, 1, dtype=dtype)
        (y,), _ = where.concat_conv([a], w, one, zero, [zero, one], frozen=True, act=act, eps=1e-30)
        values.append((y.detach(), torch.autograd.grad(y.sum(), a)[0]))
    for ours, naive in zip(*values, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", LAYERS)
def test_infinite_running_statistics_stay(name: str, momentum: float | None) -> None:
    ours, naive = pair(name, torch.float32)
    for module in (ours, naive):
        for norm in modes.norms(module):
            norm.momentum = momentum
            norm.num_batches_tracked.fill_(3)
            norm.running_var[0] = norm.running_mean[1] = math.inf
        module(torch.randn(3, 17, 2, 2, generator=torch.Generator().manual_seed(1)))
    infinite = 0
    for (key, got), expected in zip(ours.state_dict().items(), naive.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        infinite += int(got.isinf().sum())
    assert infinite == 2 * len(list(modes.norms(ours)))


@pytest.mark.parametrize("scale", [1e15, 1e19, 1e25, 1e34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_of_huge_numbers(name: str, dtype: torch.dtype, scale: float) -> None:
    """Outputs and running statistics, against float64; variances beyond float32 are infinite in the buffers."""
    ours, naive = pair(name, dtype)
    naive.double()
    x = (torch.randn(4, 17, 6, 6) * scale).to(dtype)
    y, expected = (module(value) for module, value in ((ours, x), (naive, x.double())))
    y, expected = (t[0] if isinstance(t, tuple) else t for t in (y, expected))
    assert y.isfinite().all()
    error = (y.double() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5), error
    for (key, got), wide in zip(ours.named_buffers(), naive.buffers(), strict=True):
        wide = wide.to(got.dtype)
        assert torch.equal(got.isinf(), wide.isinf()) and not got.isnan().any(), key
        finite = wide.isfinite()
        error = (got[finite].double() - wide[finite].double()).norm()
        assert error <= 0.05 * wide[finite].double().norm(), f"{key}: {error}"


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_huge_numbers(name: str) -> None:
    """As float64 has them while 1 / variance, times a gradient that may itself be that small, is a normal float32."""
    ours, naive = pair(name, torch.float32)
    naive.double()
    x = torch.randn(4, 17, 6, 6) * (1e17 if name.startswith(("concat", "dense")) else 1e8)
    for key, expected in results(naive, x.double()).items():
        got = results(ours, x)[key]
        if key.startswith("grad"):
            assert (got.double() - expected).norm() <= 2e-3 * expected.norm(), key
