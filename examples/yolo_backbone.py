"""Takes the backbone of ultralytics' YOLOv8n as a feature extractor, fused by one line, and trains it for some steps.

    pip install csp_kernels ultralytics
    python examples/yolo_backbone.py       # 5 steps
    python examples/yolo_backbone.py 20    # 20 steps

It downloads nothing: ultralytics builds the network from its yaml, with random weights. Weights of a trained one
(YOLO("yolov8n.pt").model) have the same names, and may be loaded before csp.fuse or after it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

import csp_kernels as csp

LEVELS = 4, 6, 9  # layers of YOLOv8 whose maps its neck reads: 1/8, 1/16 and 1/32 of the image


class Backbone(nn.Module):
    """The layers of a YOLOv8 up to its SPPF; forward returns the maps of LEVELS."""

    def __init__(self, name: str = "yolov8n.yaml") -> None:
        super().__init__()
        layers: Any = DetectionModel(name, verbose=False).model
        self.layers = layers[: LEVELS[-1] + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in LEVELS:
                maps.append(x)
        return maps


def main(steps: int = 5, fuse: bool = True) -> tuple[list[float], float]:
    """The loss of each step, and how far the features were from those of the plain backbone, relatively."""
    torch.manual_seed(0)
    backbone = Backbone().train()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        before = backbone.eval()(images)
        if fuse:
            print(csp.fuse(backbone))  # the one line
        after = backbone(images)
    for level in after:
        print("features", list(level.shape))
    differs = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(after, before, strict=True))
    print(f"they differ by at most {differs:.1e} of the largest from those of the plain backbone")

    targets = [torch.randn(level.shape) for level in after]  # a loss for show: to copy random maps
    optimizer = torch.optim.SGD(backbone.train().parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    for _ in range(steps):
        loss = torch.stack([(a - b).square().mean() for a, b in zip(backbone(images), targets, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("losses:", " ".join(f"{loss:.3f}" for loss in losses))
    return losses, differs


if __name__ == "__main__":
    main(int(sys.argv[1])) if sys.argv[1:] else main()
