"""The necks: wiring, sizes, gradients, cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import models
from csp_kernels.models.necks import EFM, FPN, GFM, Maxout

CHANNELS = (12, 24, 40, 52)
NECKS: dict[str, Callable[[], nn.Module]] = {
    "FPN concat": lambda: FPN(CHANNELS, 16),
    "FPN add": lambda: FPN(CHANNELS, 16, "add"),
    "GFM": lambda: GFM(CHANNELS, 16),
    "EFM": lambda: EFM(CHANNELS, (8, 16, 32)),
    "EFM sam": lambda: EFM(CHANNELS, 16, sam=True),
}


def pyramid(size: int, batch: int = 2) -> list[Tensor]:
    """Maps of strides 4, 8, 16, 32, sizes rounded up."""
    sizes = [-(-size // stride) for stride in (4, 8, 16, 32)]
    return [torch.randn(batch, c, s, s, requires_grad=True) for c, s in zip(CHANNELS, sizes, strict=True)]


@pytest.fixture(autouse=True)
def reference(one_thread: None) -> None:
    csp.use_backend("reference")


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("size", [64, 104])  # 104: 26, 13, 7, 4
def test_sizes_and_gradients(name: str, size: int) -> None:
    """Each output depends on the maps and every parameter has a gradient."""
    neck, maps = NECKS[name](), pyramid(size)
    outputs = neck(maps)
    levels = maps[len(maps) - len(outputs) :]
    assert [y.shape for y in outputs] == [(2, c, *m.shape[2:]) for c, m in zip(neck.out_channels, levels, strict=True)]
    sum(y.square().sum() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
    assert all(m.grad is not None and m.grad.any() for m in maps)


@pytest.mark.parametrize("name", NECKS)
def test_native_equals_reference(name: str) -> None:
    neck, maps = NECKS[name]().double(), [m.double() for m in pyramid(64)]
    expected = neck(maps)
    with csp.use_backend("native"):
        torch.testing.assert_close(neck(maps), expected, rtol=1e-9, atol=1e-9)


def reached(neck: nn.Module, output: int) -> list[bool]:
    """Which maps an output depends on."""
    maps = pyramid(64)
    y = neck.eval()(maps)[output]
    grads = torch.autograd.grad(y.square().sum(), maps, allow_unused=True)
    return [g is not None and bool(g.any()) for g in grads]


def test_wiring_of_the_figure() -> None:
    """Before the bottom-up predictions, EFM's coarsest node sees its own level and the finer one, and no other."""
    neck = EFM(CHANNELS, 16)
    nodes: list[Tensor] = []
    for smooth in neck.smooth:
        smooth.register_forward_hook(lambda module, inputs, y: nodes.append(y))
    maps = pyramid(64)
    neck.eval()(maps)
    seen = []
    for node in nodes:  # coarsest first
        grads = torch.autograd.grad(node.square().sum(), maps, allow_unused=True, retain_graph=True)
        seen.append([g is not None and bool(g.any()) for g in grads])
    assert seen == [[False, False, True, True], [False, True, True, True], [True, True, True, True]]
    assert reached(FPN(CHANNELS, 16), 3) == [False, False, False, True]
    assert reached(FPN(CHANNELS, 16), 0) == [True] * 4
    assert reached(GFM(CHANNELS, 16), 0) == [True] * 4


def test_maxout_takes_strided_groups() -> None:
    """Output channel g is the largest of the channels k with k mod groups == g."""
    for channels, groups in ((12, 4), (10, 4), (3, 4), (4, 4)):
        x = torch.randn(2, channels, 3, 5)
        expected = [x[:, g::groups].amax(1) for g in range(min(channels, groups))]
        assert torch.equal(Maxout(groups)(x), torch.stack(expected, 1))


def test_cost_on_peleenet() -> None:
    """At 416x416 with three 1x1 heads of 255: the paper's GFM 1.559 and EFM 1.822 GFLOP beside the backbone's 3.498."""
    with torch.device("meta"):
        net = models.peleenet()
        backbone = csp.analysis.profile(net.features, (1, 3, 416, 416)).total["flops"]
        assert f"{backbone / 1e9:.3f}" == "3.498"
        for neck, expected in ((GFM(net.channels, 128), 1.559), (EFM(net.channels, (64, 128, 256)), 1.822)):
            heads = [nn.Conv2d(c, 255, 1) for c in neck.out_channels]
            total = csp.analysis.profile(Detector(net.features, neck, heads), (1, 3, 416, 416)).total["flops"]
            assert (total - backbone) / 1e9 == pytest.approx(expected, rel=0.02)


class Detector(nn.Module):
    def __init__(self, features: nn.Module, neck: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.features, self.neck, self.heads = features, neck, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(y) for head, y in zip(self.heads, self.neck(self.features(x)), strict=True)]


@pytest.mark.parametrize("name", ["csp_peleenet", "csp_resnet50"])
def test_on_networks(name: str) -> None:
    net = getattr(models, name)(num_classes=2).eval()
    with torch.no_grad():
        outputs = EFM(net.channels, 16, sam=True).eval()(net.features(torch.randn(1, 3, 64, 96)))
    assert [tuple(y.shape) for y in outputs] == [(1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3)]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="merge: got 'sum', expected one of concat, add"):
        FPN(CHANNELS, 16, "sum")
    with pytest.raises(ValueError, match="out_channels: got \\[8, 16\\], expected 3 sizes"):
        EFM(CHANNELS, (8, 16))
    with pytest.raises(ValueError, match="channels: got \\[8\\], expected 2 or more"):
        GFM((8,), 16)
    with pytest.raises(ValueError, match="groups: got 0"):
        Maxout(0)
    with pytest.raises(ValueError, match="maps: got \\[12, 24, 40\\] channels, expected \\[12, 24, 40, 52\\]"):
        FPN(CHANNELS, 16)(pyramid(64)[:3])
