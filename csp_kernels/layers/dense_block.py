"""The dense block as a module with torchvision's parameters, run as one operator."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, layer_children, recorded, warn_once, weight_shapes
from csp_kernels.layers._norms import (
    frozen_norms,
    parameters,
    prefixes,
    update_running,
)
from csp_kernels.ops._program import built
from csp_kernels.ops.dense_block import source_of
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.vocabulary import DENSE_RECOMPUTE


class DenseBlock(Fused, reference.DenseBlock):
    """Dense block, nothing concatenated: [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].

    Each layer is batch norm, ReLU, 1x1 to bn_size * growth_rate, batch norm, ReLU, 3x3 to growth_rate, dropout
    (DenseNet-BC, arXiv 1608.06993, section 3). Children denselayer{i}.{norm1,conv1,norm2,conv2} hold the parameters
    under torchvision's state_dict keys; the norms are plain nn.BatchNorm2d and count as such: momentum, eps, affine,
    track_running_stats, train and eval (a norm in eval mode is frozen) act as usual. Plain children are not called.

    recompute: "none" keeps features and bottlenecks for backward, "bottleneck" features alone (one more 1x1 product).
    dtypes, memory formats and errors: `csp.ops.dense_block`. Blocks with other norms (SyncBatchNorm) or changed
    convolutions, hooks or another forward run layer by layer as the reference does, with one warning; RuntimeError if
    "native" was chosen.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int = 32,
        bn_size: int = 4,
        *,
        drop_rate: float = 0.0,
        recompute: str = "none",
    ) -> None:
        super().__init__(num_layers, in_channels, growth_rate, bn_size, drop_rate=drop_rate)
        if recompute not in DENSE_RECOMPUTE:
            raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(DENSE_RECOMPUTE)}")
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x):
            return super().forward(x)
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            return super().forward(x)
        norms = children[::2]
        frozen, running = frozen_norms(norms)
        y, stats = ops.dense_block(
            x,
            parameters(children),
            running,
            frozen=frozen,
            eps=[norm.eps for norm in norms],
            drop_rate=dropped(self)[0],
            recompute=self.recompute,
        )
        if not all(frozen):
            update_running(norms, prefixes(norms, y.shape[1]), stats, y.numel() // y.shape[1])
        return y

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        children, reason = layer_children(self, "pre")
        if reason:
            return children, reason
        rates = set(dropped(self))
        if len(rates) > 1:
            return children, f"its layers drop at different rates: {', '.join(map(str, sorted(rates)))}"
        return children, ""

    @property
    def graph(self) -> Graph:
        """What a call computes in the present mode; dropout is there where it is on."""
        rates = [float(rate) for rate in dropped(self)]
        graph = built(source_of(weight_shapes(self, "pre"), rates[0]))
        if len(set(rates)) == 1:
            return graph
        convs = zip(graph.nodes[1::2], rates, strict=True)  # the 3x3 of each layer
        nodes = [replace(conv, drop_rate=rate) if isinstance(conv, Conv) else conv for conv, rate in convs]
        return replace(graph, nodes=tuple(chain(*zip(graph.nodes[::2], nodes, strict=True))))

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}, recompute={self.recompute!r}"


def dropped(block: nn.Module) -> list[float]:
    """The rate at which each layer drops, by its own drop_rate and mode."""
    layers: Any = block._modules.values()
    return [layer.drop_rate if layer.training else 0.0 for layer in layers if layer is not None]
