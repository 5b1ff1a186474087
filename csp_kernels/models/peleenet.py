"""PeleeNet (arXiv 1804.06882) and its cross stage partial form (arXiv 1911.11929, table 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from csp_kernels import layers
from csp_kernels.models.network import Features, Network
from csp_kernels.reference.concat_conv import ConcatConv
from csp_kernels.reference.csp_residual_stage import ConvNormAct

LAYERS, WIDTHS = (3, 4, 8, 6), (1, 2, 4, 4)  # two-way layers and bottleneck width of each stage
DIGITS, DIGITS_WIDTHS = (3, 4, 6), (1, 2, 4)  # at 28x28, 14x14, 7x7
CHANNELS = 32  # of the stem


class Stem(nn.Module):
    """[N, in_channels, H, W] -> [N, channels, H/4, W/4] (arXiv 1804.06882, Fig. 2).

    3x3/2, then 1x1 to half and 3x3/2 beside a 2x2 max pooling, both into one 1x1. Children conv, narrow, down, joint.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, channels, 3, stride=2, act="relu")
        self.narrow = ConvNormAct(channels, channels // 2, 1, act="relu")
        self.down = ConvNormAct(channels // 2, channels, 3, stride=2, act="relu")
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.joint = ConcatConv([channels, channels], channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.joint([self.pool(x), self.down(self.narrow(x))])


def _peleenet(
    stem: nn.Module,
    stride: int,
    blocks: Sequence[int],
    growth: int,
    widths: Sequence[int],
    num_classes: int,
    drop_rate: float,
) -> Network:
    stages, taps, channels = {"stem": stem}, {}, CHANNELS
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        if i > 1:
            stages[f"pool{i - 1}"] = nn.AvgPool2d(2, 2)
            stride *= 2
        stages[f"block{i}"] = layers.TwoWayDenseBlock(count, channels, growth, width)
        channels += count * growth
        stages[f"transition{i}"] = layers.ConcatConv([channels], channels)
        taps[f"transition{i}"] = channels, stride
    return Network(Features(stages, taps), num_classes, drop_rate)


def _csp_peleenet(
    stem: nn.Module,
    stride: int,
    blocks: Sequence[int],
    growth: int,
    widths: Sequence[int],
    num_classes: int,
    part_ratio: float,
    fusion: str,
    drop_rate: float,
    recompute: str,
) -> Network:
    stages, taps, channels = {"stem": stem}, {"stem": (CHANNELS, stride)}, CHANNELS
    for i, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        last, out = i == len(blocks), channels + count * growth
        stages[f"stage{i}"] = layers.CSPDenseStage(
            channels, out, count, growth, width, part_ratio=part_ratio, fusion=fusion, pool=None if last else "avg",
            layer="two_way", recompute=recompute,
        )  # fmt: skip
        channels, stride = out, stride if last else 2 * stride
        taps[f"stage{i}"] = channels, stride
    del taps[f"stage{len(blocks) - 1}"]  # the last stage keeps its size: one map a stride
    return Network(Features(stages, taps), num_classes, drop_rate)


def peleenet(num_classes: int = 1000, in_channels: int = 3, *, drop_rate: float = 0.05) -> Network:
    """PeleeNet: 2.80 M parameters, 1.017 GFLOP at 224x224.

    [N, in_channels, H, W] -> logits [N, num_classes], H and W at least 32. features(x): the transitions before their
    pooling, 128, 256, 512, 704 channels at strides 4, 8, 16, 32. drop_rate: dropout before the classifier.
    """
    return _peleenet(Stem(in_channels, CHANNELS), 4, LAYERS, 32, WIDTHS, num_classes, drop_rate)


def csp_peleenet(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    drop_rate: float = 0.05,
    recompute: str = "none",
) -> Network:
    """CSPPeleeNet: every dense stage a `csp.CSPDenseStage`, the widths after a stage those of PeleeNet.

    [N, in_channels, H, W] -> logits [N, num_classes], H and W at least 32. features(x): the stem and the stages'
    outputs, 32, 128, 256, 704 channels at strides 4, 8, 16, 32. part_ratio (the paper's gamma), fusion, recompute:
    `csp.CSPDenseStage`; drop_rate: dropout before the classifier.
    No configuration was published. The second transition lies behind the pooling (in front of it the cost would be
    1.11 GFLOP): 2.841 M weights and 0.877 GFLOP at 224x224 where the paper has 2.83 M and 0.888 (0.4 % and 1.3 %).
    """
    stem = Stem(in_channels, CHANNELS)
    return _csp_peleenet(stem, 4, LAYERS, 32, WIDTHS, num_classes, part_ratio, fusion, drop_rate, recompute)


def peleenet_digits(num_classes: int = 10, in_channels: int = 1, *, drop_rate: float = 0.0) -> Network:
    """A PeleeNet for 28x28 images: 3, 4 and 6 two-way layers of growth 16 at strides 1, 2, 4, from 32 channels."""
    stem = ConvNormAct(in_channels, CHANNELS, 3, act="relu")
    return _peleenet(stem, 1, DIGITS, 16, DIGITS_WIDTHS, num_classes, drop_rate)


def csp_peleenet_digits(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    drop_rate: float = 0.0,
    recompute: str = "none",
) -> Network:
    """peleenet_digits with cross stage partial stages."""
    stem = ConvNormAct(in_channels, CHANNELS, 3, act="relu")
    return _csp_peleenet(stem, 1, DIGITS, 16, DIGITS_WIDTHS, num_classes, part_ratio, fusion, drop_rate, recompute)
