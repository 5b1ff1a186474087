"""DenseNet-BC (arXiv 1608.06993, table 1) and its cross stage partial form (arXiv 1911.11929, Fig. 2b)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from csp_kernels import layers
from csp_kernels.models.network import Features, Network

LAYERS = {121: (6, 12, 24, 16), 161: (6, 12, 36, 24), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
DIGITS = (4, 8, 12)  # layers at 28x28, 14x14, 7x7


def _stem(in_channels: int, channels: int) -> dict[str, nn.Module]:
    """[N, in_channels, H, W] -> [N, channels, H/4, W/4]"""
    return {
        "conv0": nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
        "norm0": nn.BatchNorm2d(channels),
        "relu0": nn.ReLU(inplace=True),
        "pool0": nn.MaxPool2d(3, 2, padding=1),
    }


def _densenet(
    stem: dict[str, nn.Module],
    channels: int,
    stride: int,
    blocks: Sequence[int],
    growth: int,
    num_classes: int,
    drop_rate: float,
    recompute: str,
) -> Network:
    stages, taps = dict(stem), {}
    for i, count in enumerate(blocks, 1):
        stages[f"denseblock{i}"] = layers.DenseBlock(count, channels, growth, drop_rate=drop_rate, recompute=recompute)
        channels += count * growth
        if i < len(blocks):
            taps[f"denseblock{i}"] = channels, stride
            stages[f"transition{i}"] = layers.Transition(channels, channels // 2)
            channels, stride = channels // 2, 2 * stride
    stages |= {"norm5": nn.BatchNorm2d(channels), "relu5": nn.ReLU(inplace=True)}
    return Network(Features(stages, {**taps, "relu5": (channels, stride)}), num_classes)


def _csp_densenet(
    stem: dict[str, nn.Module],
    channels: int,
    stride: int,
    blocks: Sequence[int],
    growth: int,
    num_classes: int,
    part_ratio: float,
    fusion: str,
    recompute: str,
) -> Network:
    stages, taps = dict(stem), {[*stem][-1]: (channels, stride)}
    for i, count in enumerate(blocks, 1):
        last = i == len(blocks)
        out = channels + count * growth  # the plain network's width, halved where it has a transition
        out = out if last else out // 2
        stages[f"stage{i}"] = layers.CSPDenseStage(
            channels, out, count, growth, part_ratio=part_ratio, fusion=fusion, pool=None if last else "avg",
            recompute=recompute,
        )  # fmt: skip
        channels, stride = out, stride if last else 2 * stride
        taps[f"stage{i}"] = channels, stride
    del taps[f"stage{len(blocks)}"]
    stages |= {"norm5": nn.BatchNorm2d(channels), "relu5": nn.ReLU(inplace=True)}
    return Network(Features(stages, {**taps, "relu5": (channels, stride)}), num_classes)


def _plain(depth: int, num_classes: int, in_channels: int, drop_rate: float, recompute: str) -> Network:
    growth, width = (48, 96) if depth == 161 else (32, 64)
    return _densenet(_stem(in_channels, width), width, 4, LAYERS[depth], growth, num_classes, drop_rate, recompute)


def _csp(depth: int, num_classes: int, in_channels: int, part_ratio: float, fusion: str, recompute: str) -> Network:
    growth, width = (48, 96) if depth == 161 else (32, 64)
    stem = _stem(in_channels, width)
    return _csp_densenet(stem, width, 4, LAYERS[depth], growth, num_classes, part_ratio, fusion, recompute)


def densenet121(
    num_classes: int = 1000, in_channels: int = 3, *, drop_rate: float = 0.0, recompute: str = "none"
) -> Network:
    """DenseNet-121: 7.98 M parameters, 5.67 GFLOP at 224x224. torchvision's state_dict keys.

    [N, in_channels, H, W] -> logits [N, num_classes], H and W at least 32. features(x): the dense blocks' outputs,
    256, 512, 1024, 1024 channels at strides 4, 8, 16, 32 (the first three before any norm, the last activated).
    drop_rate, recompute: `csp.DenseBlock`. densenet161, densenet169 and densenet201 take the same arguments.
    """
    return _plain(121, num_classes, in_channels, drop_rate, recompute)


def densenet161(
    num_classes: int = 1000, in_channels: int = 3, *, drop_rate: float = 0.0, recompute: str = "none"
) -> Network:
    """DenseNet-161, growth 48: 28.68 M parameters, 15.5 GFLOP at 224x224; as densenet121."""
    return _plain(161, num_classes, in_channels, drop_rate, recompute)


def densenet169(
    num_classes: int = 1000, in_channels: int = 3, *, drop_rate: float = 0.0, recompute: str = "none"
) -> Network:
    """DenseNet-169: 14.15 M parameters, 6.72 GFLOP at 224x224; as densenet121."""
    return _plain(169, num_classes, in_channels, drop_rate, recompute)


def densenet201(
    num_classes: int = 1000, in_channels: int = 3, *, drop_rate: float = 0.0, recompute: str = "none"
) -> Network:
    """DenseNet-201: 20.01 M parameters, 8.58 GFLOP at 224x224; as densenet121."""
    return _plain(201, num_classes, in_channels, drop_rate, recompute)


def csp_densenet121(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    recompute: str = "none",
) -> Network:
    """CSPDenseNet-121: every dense stage a `csp.CSPDenseStage`, the widths after a stage those of DenseNet-121.

    [N, in_channels, H, W] -> logits [N, num_classes], H and W at least 32. features(x): the stem and the stages'
    outputs, 64, 128, 256, 1024 channels at strides 4, 8, 16, 32. part_ratio (the paper's gamma), fusion, recompute:
    `csp.CSPDenseStage`. No configuration was published: this is Fig. 2b (arXiv 1911.11929) over DenseNet's own
    widths, both transitions compressing by half: 8.10 M parameters, 5.45 GFLOP at 224x224 (DenseNet-121: 7.98, 5.67).
    csp_densenet161, csp_densenet169 and csp_densenet201 take the same arguments.
    """
    return _csp(121, num_classes, in_channels, part_ratio, fusion, recompute)


def csp_densenet161(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    recompute: str = "none",
) -> Network:
    """CSPDenseNet-161, growth 48: 29.99 M parameters, 15.1 GFLOP at 224x224; as csp_densenet121."""
    return _csp(161, num_classes, in_channels, part_ratio, fusion, recompute)


def csp_densenet169(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    recompute: str = "none",
) -> Network:
    """CSPDenseNet-169: 15.07 M parameters, 6.58 GFLOP at 224x224; as csp_densenet121."""
    return _csp(169, num_classes, in_channels, part_ratio, fusion, recompute)


def csp_densenet201(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    recompute: str = "none",
) -> Network:
    """CSPDenseNet-201: 21.28 M parameters, 8.50 GFLOP at 224x224; as csp_densenet121.

    The paper's CSPDenseNet-201-Elastic (20.17 M, 7.13 GFLOP) is another network, built on DenseNet-201-Elastic.
    """
    return _csp(201, num_classes, in_channels, part_ratio, fusion, recompute)


def densenet_digits(
    num_classes: int = 10, in_channels: int = 1, *, drop_rate: float = 0.0, recompute: str = "none"
) -> Network:
    """A DenseNet-BC for 28x28 images: 4, 8 and 12 layers of growth 16 at strides 1, 2, 4, from 32 channels."""
    stem: dict[str, nn.Module] = {"conv0": nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)}
    return _densenet(stem, 32, 1, DIGITS, 16, num_classes, drop_rate, recompute)


def csp_densenet_digits(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    part_ratio: float = 0.5,
    fusion: str = "csp",
    recompute: str = "none",
) -> Network:
    """densenet_digits with cross stage partial stages."""
    stem: dict[str, nn.Module] = {"conv0": nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)}
    return _csp_densenet(stem, 32, 1, DIGITS, 16, num_classes, part_ratio, fusion, recompute)
