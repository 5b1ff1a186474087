"""Forwards that a trace could get wrong: they are left alone, or compute what they computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ConvNorm, tensors
from torch import Tensor, nn

import csp_kernels as csp


class Base(nn.Module):
    def __init__(self, middle: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvNorm(8, 8, 1), ConvNorm(8, 8), ConvNorm(16, 8, 1)
        self.middle = middle
        self.register_buffer("scale", torch.tensor(2.0))
        self.log: list[int] = []
        self.held: dict[str, Any] = {}
        self.child = Child()

    def forward(self, x: Tensor, k: Any = 0) -> Any:
        y = self.a(x)
        z = self.middle(self, y)
        if isinstance(z, tuple):
            return z
        z = z.relu() if isinstance(k, bool) else z
        return self.c(torch.cat([self.b(z), y], 1))


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.flag else x


class Negative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return -g


def without_gradients(m: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.relu(y)
    return z + y


def in_bfloat16(m: Any, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.relu(m.b(y))
    return z.to(y.dtype) + y


def counts(m: Any, y: Tensor) -> Tensor:
    m.log.append(1)
    return y * len(m.log)


def holds(m: Any, y: Tensor) -> Tensor:
    z = y + m.held["y"].mean() if "y" in m.held else y
    m.held["y"] = y.detach()
    return z


def changes_a_view(m: Any, y: Tensor) -> Tensor:
    F.relu_(y[:, :, ::2, ::2])
    return y


def changes_contiguous(m: Any, y: Tensor) -> Tensor:
    z = y.contiguous()
    F.relu_(z)
    return y + z


def of_permuted(m: Any, y: Tensor) -> Tensor:
    return y.relu() if y.permute(0, 2, 3, 1).shape[1] > 100 else y.sigmoid()


def of_flat(m: Any, y: Tensor) -> Tensor:
    a, b = y.flatten(0, 1).unsqueeze(0).chunk(2, 1)
    return y + a.mean() - b.sum()


def squeezed(m: Any, y: Tensor) -> Tensor:
    g = y.mean((2, 3), keepdim=True).squeeze()
    return y * (g.unsqueeze(0) if g.dim() == 1 else g)[:, :, None, None]


MIDDLES: dict[str, Callable[[Any, Tensor], Any]] = {
    "without gradients": without_gradients,
    "asks for gradients": lambda m, y: y + y if torch.is_grad_enabled() else y,
    "autocast": in_bfloat16,
    "a function of its own": lambda m, y: Negative.apply(y),
    "a buffer's value": lambda m, y: y * m.scale.item(),
    "a way by a buffer": lambda m, y: y.relu() if m.scale > 1 else y,
    "requires_grad": lambda m, y: y.relu() if m.a.conv.weight.requires_grad else y,
    "counts": counts,
    "holds": holds,
    "changes a view": changes_a_view,
    "changes what may be contiguous": changes_contiguous,
    "sizes after permute": of_permuted,
    "sizes after flatten": of_flat,
    "squeeze": squeezed,
    "a child's forward": lambda m, y: m.child.forward(y),
    "a child's flag": lambda m, y: y.relu() if m.child.flag else y,
    "a norm's mode": lambda m, y: y.relu() if m.a.bn.training else y,
}


def results(module: nn.Module, x: Tensor, *args: Any) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    outputs = tensors(module(leaf, *args))
    loss: Any = sum(y.double().square().mean() for y in outputs)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (leaf, *module.parameters())]
    return [*(y.detach() for y in outputs), *gradients, *(t.clone() for t in module.state_dict().values())]


def same(ours: nn.Module, plain: nn.Module, x: Tensor, *args: Any) -> None:
    for got, expected in zip(results(ours, x, *args), results(plain, x, *args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MIDDLES)
def test_same(name: str) -> None:
    """In training and evaluation, for other batches, and after what the forward asks for has changed."""
    torch.manual_seed(0)
    plain = Base(MIDDLES[name]).double()
    ours = copy.deepcopy(plain)
    csp.fuse(ours)
    assert not plain.held and not ours.held and not ours.log
    for mode in (True, False):
        for batch in (2, 3, 1):
            x = torch.randn(batch, 8, 6, 5, dtype=torch.float64)
            same(ours.train(mode), plain.train(mode), x)
            same(ours, plain, x.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-10)
    for m in (ours, plain):
        m.scale.fill_(0.5)
        m.child.flag = True
        m.a.conv.weight.requires_grad_(False)
        m.train().a.bn.eval()
    same(ours, plain, torch.randn(2, 8, 6, 5, dtype=torch.float64))
    copy.deepcopy(ours)


def test_true_is_not_one() -> None:
    plain = Base(lambda m, y: y).double()
    ours = copy.deepcopy(plain)
    csp.fuse(ours)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for k in (1, True, 1.0, None, "a"):
        same(ours, plain, x, k)


@pytest.mark.parametrize("copies", [torch.clone, lambda z: z + 0, lambda z: sum([z]), lambda z: z.contiguous()])
def test_returned_copies(copies: Callable[[Tensor], Tensor]) -> None:
    plain = Base(lambda m, y: (m.b(y), copies(m.b(y)))).eval()
    ours = copy.deepcopy(plain)
    csp.fuse(ours)
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        for m in (plain, ours):
            first, second = m(x)
            before = second.clone()
            first.add_(1)
            assert torch.equal(second, before)


def test_images_that_broadcast() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = ConvNorm(8, 8), ConvNorm(8, 8, 1)

        def forward(self, x: Tensor, g: Tensor) -> Tensor:
            return self.b(self.a(x) + g)

    plain = Two().double()
    ours = copy.deepcopy(plain)
    csp.fuse(ours)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for size in ((6, 5), (6, 1), (1, 5), (1, 1)):
        same(ours, plain, x, torch.randn(2, 8, *size, dtype=torch.float64))


def test_a_list_that_grows() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = ConvNorm(8, 8), ConvNorm(8, 8, 1)

        def forward(self, features: list[Tensor]) -> Tensor:
            z = self.b(self.a(features[-1])) + features[0]
            features.append(z)
            return z

    ours = Grows()
    csp.fuse(ours)
    features = [torch.randn(2, 8, 6, 5) for _ in range(2)]
    z = ours(features)
    assert len(features) == 3 and features[-1] is z


def test_a_call_of_its_own() -> None:
    class Doubled(nn.BatchNorm2d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    plain = nn.Sequential(ConvNorm(8, 8), ConvNorm(8, 8), nn.Conv2d(8, 8, 1), Doubled(8)).double()
    ours = copy.deepcopy(plain)
    csp.fuse(ours)
    same(ours, plain, torch.randn(2, 8, 6, 5, dtype=torch.float64))
