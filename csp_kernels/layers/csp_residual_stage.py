"""Stage of CSPResNet, CSPResNeXt and CSPDarkNet as a module, run as one operator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from csp_kernels import ops, reference
from csp_kernels.layers._children import Fused, Shape, fits, hooked_globally, recorded, shape_of, warn_once
from csp_kernels.layers._norms import consecutive, frozen_norms, only_norms, parameters, update_running
from csp_kernels.layers.concat_conv import ConcatConv
from csp_kernels.ops._program import built
from csp_kernels.ops._transforms import backend_of
from csp_kernels.ops.stage import unsupported
from csp_kernels.stage.csp_residual_stage import csp_residual_stage
from csp_kernels.stage.graph import Graph
from csp_kernels.vocabulary import RECOMPUTE


class CSPStage(Fused, reference.CSPStage):
    """Cross stage partial residual stage: [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride].

    CSPNet (arXiv 1911.11929, section 3.2 and Fig. 5). Arguments, children (down, split, blocks, t_a, t_b) and sizes:
    `reference.CSPStage`. It runs as one operator, nothing is concatenated; what backward keeps is what the
    convolutions and the sums of the blocks give. The norms are plain nn.BatchNorm2d and count as such: momentum, eps,
    affine, track_running_stats, train and eval act as usual. Plain children are not called; where its stride is
    above 2, down.conv is.

    recompute: what backward computes again instead of keeping it: "none", "bottleneck" (1x1 convolutions that 3x3 ones
    alone read) or "all" (all but inputs and outputs). dtypes, memory formats and errors: `csp.ops.stage`. With other
    children than it was made with (SyncBatchNorm), hooks on them or another forward it calls them one after the other,
    joins fused, and says why, once; RuntimeError if "native" was chosen.
    """

    joint: ClassVar[Callable[..., nn.Module]] = ConcatConv

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, *, recompute: str = "none", **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, num_blocks, **options)
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(RECOMPUTE)}")
        self.recompute = recompute
        act: str = options.get("act", "leaky_relu")
        slope = options.get("negative_slope", 0.1) if act == "leaky_relu" else 0.0
        channels = (options.get("down_channels") or in_channels) if self.down is not None else in_channels
        groups = options.get("groups", 1)
        before = (
            csp_residual_stage, channels, self.part_channels, self.entry_channels, self.width, self.mid_channels,
            out_channels, num_blocks, options.get("block", "bottleneck"), groups,
        )  # fmt: skip
        rest = self.split_acts, self.order, act, slope
        whole = self.down is None or self.down.conv.stride == (2, 2)  # else PyTorch runs the convolution of `down`
        self.called: tuple[str, ...] = () if whole else ("down.conv",)  # children that run beside the operator
        down = 0 if self.down is None else in_channels if whole else -1
        self._source = *before, down, *rest
        self._shape: Shape = shape_of(self)

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x) or self._foreign():
            return super().forward(x)
        graph = self.graph
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            return super().forward(x)
        if not fits(x, self.in_channels):
            raise ValueError(f"x: got {x.shape[1]} channels {list(x.shape)}, expected {self.in_channels}")
        norms, params = only_norms(children), parameters(children)
        frozen, running = frozen_norms(norms)
        if backend_of("stage", [x], params, running) == "reference":
            return super().forward(x)
        (image,) = self.images(x)
        eps = [norm.eps for norm in norms]
        outputs, stats = ops.stage(
            graph, [image], params, running, frozen=frozen, eps=eps, recompute=self.recompute
        )  # fmt: skip
        if not all(frozen):
            y = outputs[0]
            update_running(norms, consecutive(norms), stats, y.shape[0] * y.shape[2] * y.shape[3])
        return outputs[0]

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        found: dict[str, Any] = {}
        reason = self._foreign() or hooked_globally() or self._shape.differs(self, found, self.called)
        return ([] if reason else [found[item.name] for item in self.graph.order]), reason

    def _foreign(self) -> str:
        """What the kernels cannot run, in words; "" if nothing."""
        return unsupported(self.graph)

    @property
    def graph(self) -> Graph:
        """What a call computes, of what `images` gives."""
        return built(self._source)

    def images(self, x: Tensor) -> Sequence[Tensor]:
        """The input of the graph: x, or what the convolution of `down` makes of it. Of a meta tensor its shape."""
        if self.down is None or not self.called:
            return [x]
        conv = self.down.conv
        return [copy.deepcopy(conv).to("meta")(x) if x.is_meta and not conv.weight.is_meta else conv(x)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recompute={self.recompute!r}"
