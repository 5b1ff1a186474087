"""ResNet-10, ResNet-50, ResNeXt-50 in DarkNet's form and their cross stage partial forms (arXiv 1911.11929)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from csp_kernels.layers.csp_residual_stage import CSPStage
from csp_kernels.models.network import Features, Network
from csp_kernels.reference.csp_residual_stage import ConvNormAct, ResidualBlock

DEPTHS = (3, 4, 6, 3)
CSP_DEPTHS = (3, 3, 5, 2)
VARIANTS = ("darknet", "timm")


def _network(in_channels: int, num_classes: int, stages: Sequence[tuple[nn.Module, int]], **stem: Any) -> Network:
    """7x7/2 to 64 channels, pooling, then (stage, channels) at strides 4, 8, 16, 32."""
    pool = stem.pop("pool", None) or nn.MaxPool2d(2, 2, ceil_mode=True)
    modules: dict[str, nn.Module] = {"stem": ConvNormAct(in_channels, 64, 7, stride=2, **stem), "pool": pool}
    modules |= {f"stage{i}": stage for i, (stage, _) in enumerate(stages, 1)}
    taps = {f"stage{i}": (channels, 2 ** (i + 1)) for i, (_, channels) in enumerate(stages, 1)}
    return Network(Features(modules, taps), num_classes)


def _resnet(
    in_channels: int,
    num_classes: int,
    depths: Sequence[int],
    widths: Sequence[int],
    mids: Sequence[int],
    **options: Any,
) -> Network:
    stages: list[tuple[nn.Module, int]] = []
    channels = 64
    for i, (depth, width, mid) in enumerate(zip(depths, widths, mids, strict=True)):
        blocks = []
        for j in range(depth):
            blocks.append(ResidualBlock(channels, width, mid, stride=2 if i and not j else 1, **options))
            channels = width
        stages.append((nn.Sequential(*blocks), width))
    return _network(in_channels, num_classes, stages)


def _csp_resnet(
    in_channels: int,
    num_classes: int,
    widths: Sequence[int],
    mids: Sequence[int],
    outs: Sequence[int],
    groups: int,
    variant: str,
) -> Network:
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}")
    timm = variant == "timm"
    act: dict[str, Any] = {"negative_slope": 0.01 if timm else 0.1}
    stages: list[tuple[nn.Module, int]] = []
    channels = 64
    for i, (depth, width, mid, out) in enumerate(zip(CSP_DEPTHS, widths, mids, outs, strict=True)):
        stage = CSPStage(
            channels, out, depth, stride=2 if i else 1, width=width, mid_channels=mid, groups=groups,
            entry_channels=width if i or timm else 64, split_act="identity" if timm or i in (1, 2) else None,
            order="part_first" if timm else "main_first", **act,
        )  # fmt: skip
        stages.append((stage, out))
        channels = out
    return _network(in_channels, num_classes, stages, pool=nn.MaxPool2d(3, 2, padding=1) if timm else None, **act)


def resnet10(num_classes: int = 1000, in_channels: int = 3) -> Network:
    """ResNet-10: four blocks of two 3x3 convolutions; 5.24 M weights, 2.27 GFLOP at 256x256 (resnet10.cfg).

    [N, in_channels, H, W] -> logits [N, num_classes]. features(x): 64, 128, 256, 512 channels at strides 4, 8, 16, 32.
    Leaky ReLU 0.1, shortcuts without projection (`ResidualBlock`), as all networks of this file and of darknet.py.
    """
    widths = 64, 128, 256, 512
    return _resnet(in_channels, num_classes, (1, 1, 1, 1), widths, widths, block="basic")


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> Network:
    """ResNet-50 in DarkNet's form: 22.73 M weights, 9.74 GFLOP at 256x256 (resnet50.cfg).

    features(x): 256, 512, 1024, 2048 channels at strides 4, 8, 16, 32; the rest as resnet10.
    """
    return _resnet(in_channels, num_classes, DEPTHS, (256, 512, 1024, 2048), (64, 128, 256, 512))


def resnext50(num_classes: int = 1000, in_channels: int = 3) -> Network:
    """ResNeXt-50 (32 groups): 22.19 M weights, 10.11 GFLOP at 256x256 (resnext50.cfg); as resnet50."""
    return _resnet(in_channels, num_classes, DEPTHS, (256, 512, 1024, 2048), (128, 256, 512, 1024), groups=32)


def csp_resnet10(num_classes: int = 1000, in_channels: int = 3) -> Network:
    """CSPResNet-10: the first stage as ResNet-10's, then `csp.CSPStage`s of one basic block on half of the channels.

    features(x): 64, 128, 256, 512 channels at strides 4, 8, 16, 32. No configuration was published: these are the
    stages of csresnet50.cfg around ResNet-10's block. 3.52 M weights and 1.77 GFLOP at 256x256, where the paper has
    2.73 M and 1.905 (29 % more and 7 % less).
    """
    stages: list[tuple[nn.Module, int]] = [(ResidualBlock(64, 64, 64, block="basic"), 64)]
    stages += [(CSPStage(width // 2, width, 1, block="basic"), width) for width in (128, 256, 512)]
    return _network(in_channels, num_classes, stages)


def csp_resnet50(num_classes: int = 1000, in_channels: int = 3, *, variant: str = "darknet") -> Network:
    """CSPResNet-50: 21.57 M weights, 8.97 GFLOP at 256x256 (csresnet50.cfg).

    [N, in_channels, H, W] -> logits [N, num_classes]. features(x): 128, 256, 512, 1024 channels, strides 4, 8, 16, 32.
    variant "darknet": as published; "timm": as timm's cspresnet50 (slope 0.01, 3x3 pooling, an even first split, bypass
    first): `models.timm_keys.from_timm` takes its weights over.
    """
    widths = 128, 256, 512, 1024
    return _csp_resnet(in_channels, num_classes, widths, (64, 128, 256, 512), widths, 1, variant)


def csp_resnext50(num_classes: int = 1000, in_channels: int = 3, *, variant: str = "darknet") -> Network:
    """CSPResNeXt-50: 20.50 M weights, 7.93 GFLOP at 256x256 (csresnext50.cfg).

    features(x): 256, 512, 1024, 2048 channels at strides 4, 8, 16, 32; the rest as csp_resnet50.
    """
    widths = 128, 256, 512, 1024
    return _csp_resnet(in_channels, num_classes, widths, widths, (256, 512, 1024, 2048), 32, variant)
