"""DenseNet's transition in the paper's order: batch norm, ReLU, 1x1, pooling (arXiv 1608.06993, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Transition(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2]; torchvision's state_dict keys (norm, conv).

    pool: "avg" (2x2, stride 2, as nn.AvgPool2d(2, 2)) or None (the size stays). Any floating dtype.
    Raises ValueError for other values or sizes below 1.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: str | None = "avg") -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if pool not in ("avg", None):
            raise ValueError(f"pool: got {pool!r}, expected 'avg' or None")
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.norm(x)))
        return F.avg_pool2d(y, 2, 2) if self.pool else y

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}"
