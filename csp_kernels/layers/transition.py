"""DenseNet's transition as a module, run as one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, hooked_globally, not_plain, recorded, warn_once
from csp_kernels.layers._norms import consecutive, frozen_norms, parameters, update_running
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.partial_transition import transition


class Transition(Fused, reference.Transition):
    """Batch norm, ReLU, 1x1 convolution, 2x2 average pooling: [N, in_channels, H, W] -> [N, out_channels, H//2, W//2].

    Average pooling and a bias-free 1x1 convolution commute: the operator pools first, which equals the paper's order
    (arXiv 1608.06993, section 3) up to rounding, at a quarter of the products, and keeps nothing but x for backward.
    Odd sizes drop the last row or column, as nn.AvgPool2d(2, 2). Arguments, children (norm, conv; torchvision's keys):
    `reference.Transition`; plain children are not called. With another norm (SyncBatchNorm) or a changed convolution,
    hooks or another forward it runs as the reference does, with one warning; RuntimeError if "native" was chosen.
    dtypes and memory formats: `csp.ops.stage`. Raises TypeError or ValueError for an input that is not a
    [N, in_channels, H, W] tensor or is too small to pool.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: str | None = "avg") -> None:
        super().__init__(in_channels, out_channels, pool)
        self._graphs = {pooled: transition(in_channels, out_channels, pooled) for pooled in (False, True)}

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x):
            return super().forward(x)
        self._check(x)
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            return super().forward(x)
        norms = children[:1]
        frozen, running = frozen_norms(norms)
        (y,), stats = ops.stage(self.graph, [x], parameters(children), running, frozen=frozen, eps=norms[0].eps)
        if not frozen[0]:
            update_running(norms, consecutive(norms), stats, x.shape[0] * x.shape[2] * x.shape[3])
        return y

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        modules: dict[str, Any] = self._modules
        norm, conv = modules["norm"], modules["conv"]
        reason = hooked_globally() or not_plain("norm", norm) or not_plain("conv", conv, 1)
        made = self.graph.inputs[0], self.graph.nodes[0].out_channels
        if not reason and (conv.in_channels, conv.out_channels) != made:
            reason = "conv has other channels than it was made with"
        return [norm, conv], reason

    @property
    def graph(self) -> Graph:
        """What a call computes."""
        return self._graphs[bool(self.pool)]

    def _check(self, x: Tensor) -> None:
        channels = getattr(self._modules["conv"], "in_channels", self.graph.inputs[0])
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a Tensor [N, {channels}, H, W]")
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x: got shape {list(x.shape)}, expected [N, {channels}, H, W]")
        if self.pool and (x.shape[2] < 2 or x.shape[3] < 2):
            raise ValueError(f"x: got size {x.shape[2]}x{x.shape[3]}, expected at least 2x2 to pool; or pass pool=None")
