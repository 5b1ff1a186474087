"""DarkNet-53 (YOLOv3, arXiv 1804.02767) and CSPDarkNet-53 (arXiv 1911.11929, table 3)."""

from __future__ import annotations

from typing import Any

from torch import nn

from csp_kernels.layers.csp_residual_stage import CSPStage
from csp_kernels.models.network import Features, Network
from csp_kernels.models.resnet import VARIANTS
from csp_kernels.reference.csp_residual_stage import ConvNormAct, ResidualBlock

WIDTHS, DEPTHS = (64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)


def _network(stem: nn.Module, stages: list[nn.Module], num_classes: int) -> Network:
    """Stages at strides 2, 4, 8, 16, 32; the last four give the pyramid."""
    modules = {"stem": stem} | {f"stage{i}": stage for i, stage in enumerate(stages, 1)}
    taps = {f"stage{i}": (width, 2**i) for i, width in enumerate(WIDTHS, 1) if i > 1}
    return Network(Features(modules, taps), num_classes)


def darknet53(num_classes: int = 1000, in_channels: int = 3) -> Network:
    """DarkNet-53: 41.57 M weights, 18.57 GFLOP at 256x256 (darknet53.cfg).

    [N, in_channels, H, W] -> logits [N, num_classes]. features(x): 128, 256, 512, 1024 channels, strides 4, 8, 16, 32.
    """
    stages, channels = [], 32
    for width, depth in zip(WIDTHS, DEPTHS, strict=True):
        down = ConvNormAct(channels, width, 3, stride=2)
        blocks = (ResidualBlock(width, width, width // 2, block="dark") for _ in range(depth))
        stages.append(nn.Sequential(down, *blocks))
        channels = width
    return _network(ConvNormAct(in_channels, 32, 3), list(stages), num_classes)


def csp_darknet53(
    num_classes: int = 1000, in_channels: int = 3, *, variant: str = "darknet", act: str = "leaky_relu"
) -> Network:
    """CSPDarkNet-53: 27.61 M weights, 13.07 GFLOP at 256x256 (csdarknet53.cfg).

    features(x) as darknet53. variant "darknet": as published; "timm": as timm's cspdarknet53 (slope 0.01, bypass
    first): `models.timm_keys.from_timm` takes its weights over. act: "mish" gives YOLOv4's backbone.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}")
    options: dict[str, Any] = {"act": act, "negative_slope": 0.01 if variant == "timm" else 0.1}
    order = "part_first" if variant == "timm" else "main_first"
    stages: list[nn.Module] = []
    channels = 32
    for i, (out, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        width, mid = (out // 2, out // 2) if i else (out, out // 2)  # the first stage is not halved
        stages.append(
            CSPStage(
                channels, out, depth, down_channels=out, width=width, mid_channels=mid, block="dark", order=order,
                **options,
            )
        )  # fmt: skip
        channels = out
    return _network(ConvNormAct(in_channels, 32, 3, **options), stages, num_classes)
