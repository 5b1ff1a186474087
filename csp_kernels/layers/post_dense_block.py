"""The dense block in the order convolution, batch norm, ReLU as a module, run as one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, layer_children, recorded, warn_once, weight_shapes
from csp_kernels.layers._norms import (
    consecutive,
    frozen_norms,
    parameters,
    update_running,
)
from csp_kernels.ops._program import built
from csp_kernels.ops.post_dense_block import source_of
from csp_kernels.stage.graph import Graph


class PostDenseBlock(Fused, reference.PostDenseBlock):
    """Post-activation dense block, nothing concatenated: [N, c, H, W] -> [N, c + num_layers * growth_rate, H, W].

    Each layer is 1x1 to bn_size * growth_rate, batch norm, ReLU, 3x3 to growth_rate, batch norm, ReLU. Arguments and
    children denselayer{i}.{conv1,norm1,conv2,norm2}: `reference.PostDenseBlock`. The norms are plain nn.BatchNorm2d and
    count as such: momentum, eps, affine, track_running_stats, train and eval (a norm in eval mode is frozen) act as
    usual. Plain children are not called. With other norms (SyncBatchNorm) or changed convolutions, hooks or another
    forward it runs as the reference does, with one warning; RuntimeError if "native" was chosen. dtypes, memory formats
    and errors: `csp.ops.post_dense_block`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x):
            return super().forward(x)
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            return super().forward(x)
        norms = children[1::2]
        frozen, running = frozen_norms(norms)
        y, stats = ops.post_dense_block(
            x,
            parameters(children),
            running,
            frozen=frozen,
            eps=[norm.eps for norm in norms],
        )
        if not all(frozen):
            update_running(norms, consecutive(norms), stats, y.shape[0] * y.shape[2] * y.shape[3])
        return y

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        return layer_children(self, "post")

    @property
    def graph(self) -> Graph:
        """What a call computes."""
        return built(source_of(weight_shapes(self, "post")))
