"""The cross stage partial dense stage as a module, run as one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, fits, layer_children, not_a, recorded, warn_once
from csp_kernels.layers._norms import (
    consecutive,
    frozen_norms,
    only_norms,
    parameters,
    prefixes,
    update_running,
)
from csp_kernels.layers.dense_block import DenseBlock, dropped
from csp_kernels.layers.partial_transition import PartialTransition
from csp_kernels.layers.post_dense_block import PostDenseBlock
from csp_kernels.layers.two_way_dense_block import TwoWayDenseBlock

_BLOCKS: dict[str, type[nn.Module]] = {"pre": DenseBlock, "post": PostDenseBlock, "two_way": TwoWayDenseBlock}


class CSPDenseStage(Fused, reference.CSPDenseStage):
    """A dense stage of which part_ratio bypasses the block, nothing concatenated: [N, in_channels, H, W] -> y.

    CSPNet (arXiv 1911.11929, Eq. 4, Fig. 2b and 3). Arguments, children (dense, transition) and sizes:
    `reference.CSPDenseStage`. The norms are plain nn.BatchNorm2d and count as such: momentum, eps, affine,
    track_running_stats, train and eval (a norm in eval mode is frozen) act as usual. Plain children are not called.

    recompute: "none" keeps what backward needs, "bottleneck" computes the bottlenecks again there. dtypes, memory
    formats and errors: `csp.ops.csp_stage`. With other norms (SyncBatchNorm) or changed convolutions, hooks or another
    forward it runs split, block and transition one after the other, with one warning; RuntimeError if "native" was
    chosen.
    """

    blocks: ClassVar[dict[str, Callable[..., nn.Module]]] = dict(_BLOCKS)
    joint: ClassVar[Callable[..., nn.Module]] = PartialTransition

    def _block(self, *arguments: Any) -> nn.Module:
        options = {"recompute": self.recompute} if self.layer == "pre" else {}
        return self.blocks[self.layer](*arguments, **options)

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x):
            return super().forward(x)
        if not fits(x, self.in_channels):
            raise ValueError(f"x: got {x.shape[1]} channels {list(x.shape)}, expected {self.in_channels}")
        modules: dict[str, Any] = self._modules
        dense, transition = modules["dense"], modules["transition"]
        layers, reason = self._layers(dense, transition)
        if reason:
            warn_once(self, reason)
            for child in (dense, transition):  # once is enough
                if isinstance(child, Fused):
                    child._warned = True
            return super().forward(x)
        units = transition.units()
        norms = only_norms([*layers, *units])
        frozen, running = frozen_norms(norms)
        y, stats = ops.csp_stage(
            x,
            parameters([*layers, *units]),
            running,
            part_channels=self.part_channels,
            layer=self.layer,
            fusion=transition.fusion,
            pool=transition.pool,
            frozen=frozen,
            eps=[norm.eps for norm in norms],
            recompute=self.recompute,
        )
        if not all(frozen):
            self._update(norms[: len(norms) - len(units) // 2], stats, x)
        return y

    def _layers(self, dense: Any, transition: Any) -> tuple[list[Any], str]:
        """Convolutions and norms of the dense layers, and why the operator cannot stand for all children, if so."""
        reason = not_a("dense", dense, _BLOCKS[self.layer]) or not_a("transition", transition, PartialTransition)
        if reason:
            return [], reason
        layers, reason = layer_children(dense, self.layer, "dense.")
        if not reason and self.layer == "pre" and any(dropped(dense)):
            reason = "dense has dropout"
        return layers, reason or transition.not_plain("transition.")

    def _update(self, norms: list[Any], stats: Tensor, x: Tensor) -> None:
        """norms: those of the dense layers."""
        transition: Any = self._modules["transition"]
        columns = prefixes(norms, transition.dense_channels) if self.layer == "pre" else consecutive(norms)
        update_running(norms, columns, stats, x.shape[0] * x.shape[2] * x.shape[3])
        transition.update(stats, sum(columns[-1]), x)
