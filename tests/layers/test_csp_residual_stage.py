"""The residual cross stage partial stage against the figure written out with plain layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.reference.csp_residual_stage import ResidualBlock

FORMS: dict[str, dict[str, Any]] = {
    "published": {"width": 12, "entry_channels": 8, "groups": 4, "split_act": "identity"},
    "dark": {"block": "dark", "down_channels": 20, "mid_channels": 6},
    "basic": {"block": "basic", "width": 10},
    "slice": {"split": "slice", "part_ratio": 0.25, "act": "relu"},
    "slice, other width": {"split": "slice", "part_channels": 5, "width": 12},
    "timm": {"order": "part_first", "negative_slope": 0.01, "act": "leaky_relu"},
    "two activations": {"split_act": ("silu", "identity"), "act": "silu"},
    "no downsampling": {"stride": 1, "act": "mish", "part_channels": 7},
}


def stage(form: str) -> csp.CSPStage:
    made = csp.CSPStage(16, 24, 2, **FORMS[form]).double()
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    return made


def unit(x: Tensor, module: Any, act: str, slope: float, stride: int = 1) -> Tensor:
    """conv, batch norm with batch statistics, activation."""
    w = module.conv.weight
    y = F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2, groups=x.shape[1] // w.shape[1])
    y = F.batch_norm(y, None, None, module.norm.weight, module.norm.bias, True)
    return F.leaky_relu(y, slope) if act == "leaky_relu" else getattr(F, act)(y) if act != "identity" else y


def written_out(s: csp.CSPStage, x: Tensor, form: dict[str, Any]) -> Tensor:
    """The stage from torch.cat and functional calls."""
    act, slope, kind = form.get("act", "leaky_relu"), form.get("negative_slope", 0.1), form.get("block", "bottleneck")
    if form.get("stride", 2) > 1:
        x = unit(x, s.down, act, slope, 2)
    if form.get("split") == "slice":
        part, main = x[:, : s.part_channels], x[:, s.part_channels :]
    elif isinstance(form.get("split_act"), tuple):
        part, main = (unit(x, m, a, slope) for m, a in zip(s.split, form["split_act"], strict=True))
    else:
        y = unit(x, s.split, form.get("split_act", act), slope)
        part, main = y[:, : s.part_channels], y[:, s.part_channels :]
    for block in s.blocks:
        y = unit(main, block.conv1, act, slope)
        y = unit(y, block.conv2, "identity" if kind == "basic" else act, slope)
        y = unit(y, block.conv3, "identity", slope) if kind == "bottleneck" else y
        common = min(y.shape[1], main.shape[1])
        y = torch.cat([y[:, :common] + main[:, :common], y[:, common:]], 1)
        main = y if kind == "dark" else F.leaky_relu(y, slope) if act == "leaky_relu" else getattr(F, act)(y)
    main = unit(main, s.t_a, act, slope)
    return unit(torch.cat([part, main] if form.get("order") == "part_first" else [main, part], 1), s.t_b, act, slope)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_figure(form: str, backend: str) -> None:
    """Output and every gradient in float64, on an odd size."""
    ours = stage(form)
    a, b = (torch.randn(2, 16, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    parameters = dict(ours.named_parameters())
    expected = written_out(ours, b.requires_grad_(), FORMS[form])
    grad = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, [b, *parameters.values()], grad)
    with csp.use_backend(backend):
        y = ours(a.requires_grad_())
        mine = torch.autograd.grad(y, [a, *parameters.values()], grad)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, got, want in zip(["x", *parameters], mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_sizes_and_defaults() -> None:
    """Width half of the output; without a bottleneck; the split is one convolution with two outputs."""
    made = csp.CSPStage(16, 24, 3)
    assert made.split.splits == (12, 12)
    assert [tuple(m.weight.shape) for m in made.blocks[0].modules() if isinstance(m, nn.Conv2d)] == [
        (12, 12, 1, 1), (12, 12, 3, 3), (12, 12, 1, 1)
    ]  # fmt: skip
    assert made.t_b.in_channels == (12, 12) and len(made.blocks) == 3
    assert made(torch.randn(2, 16, 8, 10)).shape == (2, 24, 4, 5)
    assert csp.CSPStage(16, 24, 1, split="slice", part_ratio=0.25).part_channels == 4


def test_the_bypass_gives_nothing_to_the_blocks() -> None:
    """With the paper's slice, only t_b sees the first channels."""
    made = csp.CSPStage(8, 8, 1, stride=1, split="slice").double().eval()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []
    made.t_a.register_forward_hook(lambda module, inputs, y: seen.append(y))
    made(x)
    (grad,) = torch.autograd.grad(seen[0].square().sum(), x)
    assert not grad[:, :4].any() and grad[:, 4:].any()


@pytest.mark.parametrize(("source", "target"), [(8, 12), (12, 8)])
def test_partial_shortcut(source: int, target: int) -> None:
    """With a linear block of zero weights, only the common channels of the subsampled input come through."""
    block = ResidualBlock(source, target, 4, block="dark", stride=2)
    nn.init.zeros_(block.conv2.norm.weight)
    x = torch.randn(2, source, 5, 6)
    y, common = block(x), min(source, target)
    assert torch.equal(y[:, :common], x[:, :common, ::2, ::2])
    assert not y[:, common:].any()


def test_bad_arguments() -> None:
    for options, message in (
        ({"split": "half"}, "split: got 'half', expected one of conv, slice"),
        ({"order": "first"}, "order: got 'first', expected one of main_first, part_first"),
        ({"block": "wide"}, "block: got 'wide', expected one of bottleneck, dark, basic"),
        ({"act": "tanh"}, "act: got 'tanh', expected one of identity, relu"),
        ({"split": "slice", "split_act": "relu"}, "not with split='slice'"),
        ({"split": "slice", "part_ratio": 1.0}, "width: got 0, expected at least 1"),
        ({"part_channels": 0}, "part_channels: got 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            csp.CSPStage(8, 8, 1, **options)


@pytest.mark.parametrize("form", FORMS)
def test_runs_as_one_operator(form: str) -> None:
    """On the CPU with all of its convolutions."""
    made = stage(form)
    assert made.holders()[1] == ""
    assert made.called == ()
    with csp.use_backend("native"), torch.profiler.profile() as profile:
        made(torch.randn(2, 16, 8, 8, dtype=torch.float64))
    names = [event.name for event in profile.events()]
    assert names.count("csp_kernels::stage") == 1
    assert not names.count("aten::conv2d")


CHANGES: dict[str, tuple[str, str, Any]] = {  # what becomes of a child, by whom
    "another activation": ("blocks.0.conv1", "act", nn.LeakyReLU(0.3)),
    "another slope": ("blocks.0.conv1.act", "negative_slope", 0.3),
    "another norm": ("blocks.1.conv2", "norm", nn.InstanceNorm2d(12)),
    "another convolution": ("blocks.1.conv2", "conv", nn.Conv2d(12, 12, 3, padding=1, bias=True)),
    "another stride": ("down.conv", "stride", (1, 1)),
    "no block": ("blocks", "1", nn.Identity()),
    "another join": ("t_b", "act", "relu"),
    "one more": ("blocks", "2", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_children_are_called(change: str) -> None:
    """With one warning, and the result is theirs."""
    csp.use_backend("auto")
    path, name, value = CHANGES[change]
    made = csp.CSPStage(16, 24, 2).double()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    parent = made.get_submodule(path)
    parent.add_module(name, value.double()) if isinstance(value, nn.Module) else setattr(parent, name, value)
    with pytest.warns(RuntimeWarning, match=f"csp.CSPStage runs its plain PyTorch reference: {path}"):
        y = made(x)
    with csp.use_backend("reference"):
        assert torch.equal(y, made(x)) or torch.allclose(y, made(x), rtol=1e-9)
    with csp.use_backend("native"), pytest.raises(RuntimeError, match=path):
        made(x)


def test_recompute() -> None:
    made = csp.CSPStage(16, 24, 2, recompute="all").double()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    verdict = csp.check(made, x)
    assert verdict, str(verdict)
    with pytest.raises(ValueError, match="recompute: got 'some'"):
        csp.CSPStage(16, 24, 2, recompute="some")
