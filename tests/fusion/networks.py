"""Networks that know nothing of this package, in the styles that people write them in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """A convolution, a norm and an activation that is a function."""

    def __init__(self, i: int, o: int, k: int = 3, s: int = 1, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Functional(nn.Module):
    """All in one forward, activations in place, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return F.leaky_relu_(y, 0.2)


class Lists(nn.Module):
    """Features in a list that grows, as in C2f; a slice, a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvNorm(8, 16, 1)
        self.blocks = nn.ModuleList(ConvNorm(8, 8) for _ in range(2))
        self.last = ConvNorm(32, 10, 1, act=nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            y.append(block(y[-1]).add(y[-1]))
        return self.last(torch.cat(y, dim=1))


class Join(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Layers(nn.Module):
    """Layers that its forward calls one after the other, as a YOLO's does: each takes what the one before it gave, or
    what those of some numbers gave."""

    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        layers = [ConvNorm(8, 16), ConvNorm(16, 16, 1), ConvNorm(16, 16), Join(), ConvNorm(48, 8, 1), Lists()]
        self.layers = nn.Sequential(*layers, ConvNorm(10, 8, s=2), *more)
        self.reads: dict[int, list[int]] = {3: [0, 1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x = layer([made[k] for k in self.reads[i]] if i in self.reads else x)
            made.append(x)
        return x


class SizedInEvaluation(Layers):
    """Like a YOLO's head in evaluation, it needs sizes; like a YOLO it has methods of nn.Module that take less."""

    def _apply(self, fn: Any) -> Any:  # type: ignore[override]
        return super()._apply(fn)

    def train(self, mode: Any = True) -> Any:
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else y * y.shape[2]


class Sized(nn.Module):
    """A trace cannot look into it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Lists()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.shape[2] > 1 else x


class Lambdas(nn.Module):
    """Layers in a plain dictionary, called through functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {"a": ConvNorm(8, 6), "b": ConvNorm(8, 6, 1), "c": ConvNorm(12, 8, 3, act=nn.GELU())}
        )

    def forward(self, x: Tensor) -> Tensor:
        both = [run(x) for run in (lambda t: self.layers["a"](t), lambda t: self.layers["b"](t))]
        return self.layers["c"](torch.cat(both, -3))


class Depth(nn.Module):
    """A loop over an attribute, dropout, averages."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.drop_rate = 2, 0.0
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(2))
        self.out, self.norm = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            new = self.convs[i](F.relu(self.norms[i](x)))
            if self.drop_rate > 0:
                new = F.dropout(new, p=self.drop_rate, training=self.training)
            x = torch.cat([x, new], 1)
        return F.avg_pool2d(self.out(F.relu(self.norm(x))), 2)


class Pools(nn.Module):
    """Maxima of maxima, an output of several tensors, a stride, a bias without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvNorm(8, 4, 1, act=nn.Hardswish()), ConvNorm(12, 8, 3, 2, act=nn.ReLU6())
        self.m, self.biased = nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(2))
        z = self.cv2(torch.cat(y, 1))
        return z, F.relu(self.biased(z))


class Stem(nn.Module):
    """A 7x7, which stays what it is, and maxima; then PeleeNet's stem, which halves odd sizes and rounds up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 7, 1, 3, bias=False), nn.BatchNorm2d(8)
        self.around, self.halves = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.narrow, self.down, self.joint = ConvNorm(8, 4, 1), ConvNorm(4, 8, 3, 2), ConvNorm(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.around(F.relu(self.norm(self.conv(x))))
        return self.joint(torch.cat([self.down(self.narrow(x)), self.halves(x)], 1))


class Averages(nn.Module):
    """Of what a 1x1 gives, once alone and once beside another reader; the stage goes on behind them, with a 1x1 too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.before, self.last, self.direct = ConvNorm(8, 8), ConvNorm(8, 4, 1), nn.Conv2d(6, 8, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.avg_pool2d(self.first(self.before(x)), 2)
        y = self.conv(F.relu(self.norm(y))) + self.direct(y)
        z = self.second(y)
        return self.last(F.avg_pool2d(z, 2)), torch.relu(z)


class Attention(nn.Module):
    """What a stage cannot express between two that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(ConvNorm(8, 6), ConvNorm(6, 12))
        self.b = nn.Sequential(ConvNorm(12, 12, 1), ConvNorm(12, 8))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * self.squeeze(y)) + x


class Twice(nn.Module):
    """A convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Sequential(ConvNorm(8, 8), ConvNorm(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.bn(self.conv(torch.relu(self.conv(x)))) + x))


class Net(nn.Module):
    """A whole network: two stages behind a convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.stage, self.head = ConvNorm(3, 8), Functional(), Lists(), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.body(self.stem(x))).mean((2, 3)))


class OnSize(nn.Module):
    """What it does depends on the size of its input: nothing can be known from one run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return torch.relu(y) if x.shape[-1] > 4 else y


class OnValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return torch.relu(y) if y.sum() > 0 else y


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(F.relu_(x)))


class Counts(nn.Module):
    """It keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.b(self.a(x)))


class Draws(nn.Module):
    """It leaves a layer out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x))) if torch.rand(()) < 2 else x


class Configured(nn.Module):
    """What it does is said by an object, and by an attribute of its class."""

    slope = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(8, 8), ConvNorm(8, 8, 1)
        self.config = SimpleNamespace(
            shortcut=True, order=["a", "b"], more={"x": {"y": {"z": [True]}}}, flags=(True, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self.config.order:
            y = getattr(self, name)(y)
        shortcut = self.config.shortcut and self.config.more["x"]["y"]["z"][0] is True and self.config.flags[0] is True
        return F.leaky_relu(y + x if shortcut else y, self.slope)


class Copies(nn.Module):
    """Changes copies in place and reads the originals again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(8, 8), ConvNorm(8, 8, 1)
        self.act, self.last = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        z = self.last(self.act(y.clone()))
        w = sum([y, z])
        return self.act(w + 0) + w + y


class Separable(nn.Module):
    """A depthwise convolution between two 1x1, attention to channels, no join."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = ConvNorm(8, 24, 1), ConvNorm(24, 8, 1, act=nn.Identity())
        self.depthwise, self.norm = nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm(self.depthwise(self.expand(x))))
        weight = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.project(y * weight)


class InPlaceInside(nn.Module):
    """A child that cannot be traced changes what it is given, which is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvNorm(8, 8), ConvNorm(8, 8, 1), OnSizeInPlace()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.c(y) + y


class OnSizeInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() * (2 if x.shape[0] > 0 else 3)


KINDS = (
    Functional, Lists, Layers, Lambdas, Depth, Pools, Stem, Averages, Attention, Twice, Configured, Copies, Separable,
)  # fmt: skip
FUSED: dict[str, Callable[[], nn.Module]] = {kind.__name__: kind for kind in KINDS}
FUSED["Sequential"] = lambda: nn.Sequential(
    nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(True), nn.Conv2d(12, 8, 1), nn.LeakyReLU(0.3, True)
)
FUSED["norms and ReLUs in front of 3x3s"] = lambda: nn.Sequential(
    nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, bias=False),
)  # fmt: skip
FUSED["depthwise, then with twice the channels"] = lambda: nn.Sequential(
    nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16),
    nn.Conv2d(16, 32, 3, padding=1, groups=16),
)  # fmt: skip
FUSED["biases in front of norms without parameters"] = lambda: nn.Sequential(
    nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12, affine=False), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
)
FUSED["maxima between convolutions that stay"] = lambda: nn.Sequential(
    nn.Conv2d(8, 16, 7, padding=3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    nn.Conv2d(16, 8, 5, padding=2), Functional(),
)  # fmt: skip
FUSED["residual blocks in a row"] = lambda: nn.Sequential(Functional(), Functional(), Functional())
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "OnSize": (OnSize, "it depends on the width of its input"),
    "OnValue": (OnValue, "it looks at a tensor: __gt__|__bool__|sum"),
    "ChangesItsInput": (ChangesItsInput, "it changes its input in place"),
    "InPlaceInside": (InPlaceInside, "c changes its input in place"),
    "Draws": (Draws, "it looks at tensors of its own, or makes some: rand"),
    "Counts": (Counts, "it changes attributes of its own"),
}


def tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]
