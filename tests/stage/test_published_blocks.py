"""The blocks of published networks against the same written out with plain modules, as their authors have them:
outputs, every gradient, running statistics and three steps of SGD, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modes import random_norms
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.stage.bottleneck_csp import bottleneck_csp
from csp_kernels.stage.c2f import c2, c3k2
from csp_kernels.stage.dla_root import dla_root
from csp_kernels.stage.residual_block import residual_block
from csp_kernels.stage.sppf import sppf


class Conv(nn.Module):
    """ultralytics' Conv, timm's ConvNormAct, mmcv's ConvModule."""

    def __init__(self, i: int, o: int, kernel: int = 1, act: Callable[[Tensor], Tensor] = F.silu, norm: str = "bn"):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False)
        self.add_module(norm, nn.BatchNorm2d(o))
        self.norm_name, self.act = norm, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.get_submodule(self.norm_name)(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool, kernels: tuple[int, int]) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = Conv(c, c, kernels[0]), Conv(c, c, kernels[1]), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.shortcut else self.cv2(self.cv1(x))


class C3(nn.Module):
    def __init__(self, i: int, o: int, n: int, shortcut: bool, kernels: tuple[int, int] = (1, 3)) -> None:
        super().__init__()
        c = o // 2
        self.cv1, self.cv2, self.cv3 = Conv(i, c), Conv(i, c), Conv(2 * c, o)
        self.m = nn.Sequential(*(Bottleneck(c, shortcut, kernels) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    def __init__(self, i: int, o: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = Conv(i, 2 * self.c), Conv((2 + len(blocks)) * self.c, o)
        self.m = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2(nn.Module):
    def __init__(self, i: int, o: int, n: int) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = Conv(i, 2 * self.c), Conv(2 * self.c, o)
        self.m = nn.Sequential(*(Bottleneck(self.c, True, (3, 3)) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), 1)
        return self.cv2(torch.cat((self.m(a), b), 1))


class BottleneckCSP(nn.Module):
    def __init__(self, i: int, o: int, n: int) -> None:
        super().__init__()
        c = o // 2
        self.cv1, self.cv4 = Conv(i, c), Conv(2 * c, o)
        self.cv2, self.cv3 = nn.Conv2d(i, c, 1, bias=False), nn.Conv2d(c, c, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * c)
        self.m = nn.Sequential(*(Bottleneck(c, True, (1, 3)) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(F.silu(self.bn(torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1))))


class SPPF(nn.Module):
    def __init__(self, i: int, o: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(i, i // 2), Conv(i // 2 * 4, o)
        self.m, self.shortcut = nn.MaxPool2d(5, 1, 2), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        z = self.cv2(torch.cat(y, 1))
        return z + x if self.shortcut else z


class OsaBlock(nn.Module):
    def __init__(self, i: int, mid: int, o: int, n: int, shortcut: bool) -> None:
        super().__init__()
        self.conv_mid = nn.Sequential(*(Conv(mid if k else i, mid, 3, F.relu) for k in range(n)))
        self.conv_concat, self.shortcut = Conv(i + n * mid, o, 1, F.relu), shortcut

    def forward(self, x: Tensor) -> Tensor:
        output = [x]
        for conv in self.conv_mid:
            output.append(conv(output[-1]))
        y = self.conv_concat(torch.cat(output, 1))
        return y + x if self.shortcut else y


class Elan(nn.Module):
    """The layers of yolov7.yaml from one 1x1 to the other."""

    def __init__(self, i: int, o: int, hidden: int, mid: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = Conv(i, hidden), Conv(i, hidden), Conv(2 * hidden + 2 * mid, o)
        rows = ((hidden, mid), (mid, mid))
        self.m = nn.Sequential(*(nn.Sequential(Conv(a, mid, 3), Conv(mid, mid, 3)) for a, _ in rows))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cv1(x), self.cv2(x)
        third = self.m[0](second)
        return self.cv3(torch.cat((self.m[1](third), third, second, first), 1))


class DlaRoot(nn.Module):
    def __init__(self, channels: list[int], o: int, shortcut: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.shortcut = nn.Conv2d(sum(channels), o, 1, bias=False), nn.BatchNorm2d(o), shortcut

    def forward(self, *children: Tensor) -> Tensor:
        x = self.bn(self.conv(torch.cat(children, 1)))
        return F.relu(x + children[0] if self.shortcut else x)


class Residual(nn.Module):
    def __init__(self, c: int, mid: int, block: str, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        same = lambda x: x  # noqa: E731
        if block == "basic":
            self.conv1, self.conv2 = Conv(c, mid, 3, act, "norm"), Conv(mid, c, 3, same, "norm")
        else:
            self.conv1 = Conv(c, mid, 1, act, "norm")
            self.conv2 = Conv(mid, c if block == "dark" else mid, 3, act, "norm")
        self.conv3 = Conv(mid, c, 1, same, "norm") if block == "bottleneck" else nn.Identity()
        self.act = same if block == "dark" else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv3(self.conv2(self.conv1(x))) + x)


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def residual(block: str, act: str, function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, nn.Module, list[int]]:
    graph = residual_block(12, 12, 8, block=block, act=act, slope=0.1)
    return csp.Stage(graph), Residual(12, 8, block, function), [12]


BLOCKS: dict[str, Callable[[], tuple[nn.Module, nn.Module, list[int]]]] = {
    "C3": lambda: (csp.C3(10, 16, 2), C3(10, 16, 2, True), [10]),
    "C3 without a shortcut": lambda: (csp.C3(10, 16, 1, False), C3(10, 16, 1, False), [10]),
    "C2f": lambda: (csp.C2f(10, 16, 2), C2f(10, 16, [Bottleneck(8, False, (3, 3)) for _ in range(2)]), [10]),
    "C2f with a shortcut": lambda: (csp.C2f(10, 16, 1, True), C2f(10, 16, [Bottleneck(8, True, (3, 3))]), [10]),
    "C3k2": lambda: (csp.Stage(c3k2(10, 16)), C2f(10, 16, [C3(8, 8, 2, True, (3, 3))]), [10]),
    "C2": lambda: (csp.Stage(c2(10, 16, 2)), C2(10, 16, 2), [10]),
    "BottleneckCSP": lambda: (csp.Stage(bottleneck_csp(10, 16)), BottleneckCSP(10, 16, 1), [10]),
    "SPPF": lambda: (csp.Stage(sppf(10, 16)), SPPF(10, 16, False), [10]),
    "SPPF with a shortcut": lambda: (csp.Stage(sppf(10, 10, shortcut=True)), SPPF(10, 10, True), [10]),
    "OSA": lambda: (csp.OSABlock(10, 6, 16, 3), OsaBlock(10, 6, 16, 3, False), [10]),
    "OSA with a shortcut": lambda: (csp.OSABlock(10, 6, 10, 2, True), OsaBlock(10, 6, 10, 2, True), [10]),
    "ELAN": lambda: (csp.ELAN(10, 16, 6, 5), Elan(10, 16, 6, 5), [10]),
    "DLA root": lambda: (csp.Stage(dla_root([8, 6], 8)), DlaRoot([8, 6], 8, False), [8, 6]),
    "DLA root with a shortcut": lambda: (csp.Stage(dla_root([8, 6], 8, True)), DlaRoot([8, 6], 8, True), [8, 6]),
    "dark": lambda: residual("dark", "leaky_relu", leaky),
    "basic": lambda: residual("basic", "relu", F.relu),
    "bottleneck": lambda: residual("bottleneck", "relu", F.relu),
    "bottleneck, costly": lambda: residual("bottleneck", "silu", F.silu),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Ours, theirs with the same parameters and settings of norms, and inputs."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs, channels = BLOCKS[name]()
    random_norms(ours)
    ours, theirs = ours.double(), theirs.double()
    norms = dict(theirs.named_modules())
    for path, norm in ours.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norms[path].eps, norms[path].momentum = norm.eps, norm.momentum
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert {*ours.state_dict()} <= {*theirs.state_dict()}
    x = [torch.randn(2, c, 7, 5, dtype=torch.float64, generator=generator) for c in channels]
    return ours, theirs, x


def step(module: nn.Module, x: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in x]
    y: Any = module(*leaves)
    optimizer.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {"y": y.detach(), **{f"input {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}}
    found |= {f"{name} gradient": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    optimizer.step()
    return found | {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_plain_modules(name: str) -> None:
    ours, theirs, x = pair(name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    with csp.use_backend("native"):
        for _ in range(3):
            mine, plain = (step(m, x, o) for m, o in zip((ours, theirs), optimizers, strict=True))
            for key, value in mine.items():
                torch.testing.assert_close(value, plain[key], rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(*x), theirs.eval()(*x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_errors_of_rounding(name: str) -> None:
    """Alone, in float32, as large as those of plain modules."""
    ours, _, x = pair(name)
    verdict = csp.check(ours.float(), *(t.float() for t in x))
    assert verdict, str(verdict)
