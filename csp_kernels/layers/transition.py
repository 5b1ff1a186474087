"""DenseNet's transition, pooled before the product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from csp_kernels import reference
from csp_kernels.layers._children import Fused, hooked_globally, not_pointwise, recorded, warn_once


class Transition(Fused, reference.Transition):
    """Batch norm, ReLU, 2x2 average pooling, 1x1 convolution: [N, in_channels, H, W] -> [N, out_channels, H//2, W//2].

    Average pooling and a bias-free 1x1 convolution commute, so this equals the paper's order (arXiv 1608.06993,
    section 3) up to rounding, at a quarter of the products. Odd sizes drop the last row or column, as
    nn.AvgPool2d(2, 2). Arguments, state_dict keys (torchvision's norm, conv) and dtypes: `reference.Transition`.
    Raises TypeError or ValueError for an input that is not a [N, in_channels, H, W] tensor or is too small to pool.
    """

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x):
            return super().forward(x)
        reason = (hooked_globally() or not_pointwise("conv", self.conv)) if self.pool else ""
        if reason:
            warn_once(self, reason)
            return super().forward(x)
        self._check(x)
        a = F.relu(self.norm(x))  # [N, in_channels, H, W]
        return self.conv(F.avg_pool2d(a, 2, 2) if self.pool else a)

    def _check(self, x: Tensor) -> None:
        channels = self.conv.in_channels
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a Tensor [N, {channels}, H, W]")
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x: got shape {list(x.shape)}, expected [N, {channels}, H, W]")
        if self.pool and (x.shape[2] < 2 or x.shape[3] < 2):
            raise ValueError(f"x: got size {x.shape[2]}x{x.shape[3]}, expected at least 2x2 to pool; or pass pool=None")
