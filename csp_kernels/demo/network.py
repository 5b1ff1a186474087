"""A DenseNet-BC for 28x28 images, built from fused or from naive parts with the same state_dict keys."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import csp_kernels as csp

LAYERS = (4, 8, 12)  # dense layers at 28x28, 14x14, 7x7
GROWTH = 16
KINDS = ("csp", "naive")


class DenseNetBC(nn.Module):
    """DenseNet-BC (arXiv 1608.06993, table 1 in small): [N, 1, 28, 28] -> logits [N, 10]; compression 0.5.

    `parts` is the module that DenseBlock and Transition come from: csp_kernels or csp_kernels.reference.
    """

    def __init__(self, parts: ModuleType) -> None:
        super().__init__()
        channels = 2 * GROWTH
        stages: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1, bias=False)]
        for index, layers in enumerate(LAYERS):
            stages.append(parts.DenseBlock(layers, channels, GROWTH))
            channels += layers * GROWTH
            if index + 1 < len(LAYERS):
                stages.append(parts.Transition(channels, channels // 2))
                channels //= 2
        self.features = nn.Sequential(*stages, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 1, 28, 28] -> logits [N, 10]."""
        return self.classifier(self.features(images).mean((2, 3)))


def build(kind: str, seed: int) -> DenseNetBC:
    """The network from 'csp' or 'naive' parts; the weights depend on the seed alone. channels_last."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    torch.manual_seed(seed)
    weights = DenseNetBC(csp.reference).state_dict()
    model = DenseNetBC(csp if kind == "csp" else csp.reference)
    model.load_state_dict(weights)
    return model.to(memory_format=torch.channels_last)
