"""The cross stage partial dense stage as a module, run as one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, fits, layer_children, not_a, recorded, warn_once, weight_shapes
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
from csp_kernels.ops._program import built
from csp_kernels.ops.csp_stage import source_of
from csp_kernels.stage.graph import Graph

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
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            for child in (dense, transition):  # once is enough
                if isinstance(child, Fused):
                    child._warned = True
            return super().forward(x)
        norms = only_norms(children)
        frozen, running = frozen_norms(norms)
        y, stats = ops.csp_stage(
            x,
            parameters(children),
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
            self._update(norms, stats, x)
        return y

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        modules: dict[str, Any] = self._modules
        dense, transition = modules["dense"], modules["transition"]
        reason = not_a("dense", dense, _BLOCKS[self.layer]) or not_a("transition", transition, PartialTransition)
        if reason:
            return [], reason
        layers, reason = layer_children(dense, self.layer, "dense.")
        if not reason and self.layer == "pre" and any(dropped(dense)):
            reason = "dense has dropout"
        reason = reason or transition.not_plain("transition.")
        return ([] if reason else [*layers, *transition.units()]), reason

    @property
    def graph(self) -> Graph:
        """What a call computes; none of its layers drops."""
        dense, transition = self._modules["dense"], self._modules["transition"]
        for module, base in ((dense, _BLOCKS[self.layer]), (transition, PartialTransition)):
            if not isinstance(module, base):
                raise RuntimeError(f"its graph: got a {type(module).__name__}, expected a csp.{base.__name__}")
        assert dense is not None and isinstance(transition, PartialTransition)
        weights = [*weight_shapes(dense, self.layer), *transition.weight_shapes()]
        return built(source_of(self.part_channels, weights, self.layer, transition.fusion, transition.pool))

    def _update(self, norms: list[Any], stats: Tensor, x: Tensor) -> None:
        transition: Any = self._modules["transition"]
        counts = transition.counts(x)
        dense = norms[: len(norms) - sum(length for _, length in counts)]
        columns = prefixes(dense, transition.dense_channels) if self.layer == "pre" else consecutive(dense)
        columns += consecutive(norms[len(dense) :], sum(columns[-1]))
        update_running(norms, columns, stats, [(x.shape[0] * x.shape[2] * x.shape[3], len(dense)), *counts])
