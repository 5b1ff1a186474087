"""The cross stage partial dense stage with naive split and concatenation (arXiv 1911.11929, Eq. 4, Fig. 2b and 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from csp_kernels.reference.dense_block import DenseBlock, dense_block
from csp_kernels.reference.partial_transition import PartialTransition, partial_transition
from csp_kernels.reference.post_dense_block import PostDenseBlock, post_dense_block
from csp_kernels.reference.two_way_dense_block import TwoWayDenseBlock, two_way_dense_block
from csp_kernels.vocabulary import DENSE_RECOMPUTE, LAYERS

_BLOCKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "pre": dense_block,
    "post": post_dense_block,
    "two_way": two_way_dense_block,
}


class CSPDenseStage(nn.Module):
    """A dense stage of which part_ratio bypasses the block: [N, in_channels, H, W] -> y.

    x = [x', x''] along the channels, x' the round(part_ratio * in_channels) that bypass (the paper's gamma);
    y = transition(x', dense(x'')), [N, out_channels, H // 2, W // 2] with pool "avg", H, W with pool None.
    Children dense and transition:
      layer "pre"      DenseBlock, transition of order "pre"; bn_size as there
      layer "post"     PostDenseBlock, order "post"; bn_size as there
      layer "two_way"  TwoWayDenseBlock, order "post"; bn_size is its bottleneck_width
    fusion "csp", "first", "last": see `PartialTransition`. mid_channels, the width of its first transition: by default
    that of the dense block's output for "csp" (half of it for layer "pre"), out_channels minus the bypass for "last".
    recompute ("none", "bottleneck") is what the fused stage keeps for backward; here it does nothing.
    Raises ValueError for other values, sizes below 1, a part_ratio outside [0, 1) or one that leaves either side of
    the split without a channel (bypass: unless part_ratio is 0).
    """

    blocks: ClassVar[dict[str, Callable[..., nn.Module]]] = {
        "pre": DenseBlock,
        "post": PostDenseBlock,
        "two_way": TwoWayDenseBlock,
    }
    joint: ClassVar[Callable[..., nn.Module]] = PartialTransition

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        growth_rate: int = 32,
        bn_size: float = 4,
        *,
        part_ratio: float = 0.5,
        fusion: str = "csp",
        pool: str | None = "avg",
        layer: str = "pre",
        mid_channels: int | None = None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        for name, choice, choices in (("layer", layer, LAYERS), ("recompute", recompute, DENSE_RECOMPUTE)):
            if choice not in choices:
                raise ValueError(f"{name}: got {choice!r}, expected one of {', '.join(choices)}")
        self.part_channels = part = _bypass(part_ratio, in_channels)
        self.in_channels, self.part_ratio, self.layer, self.recompute = in_channels, part_ratio, layer, recompute
        self.dense = self._block(num_layers, in_channels - part, growth_rate, bn_size)
        width = in_channels - part + num_layers * growth_rate
        mid = _mid_channels(mid_channels, part, width, out_channels, fusion, layer)
        order = "pre" if layer == "pre" else "post"
        self.transition = type(self).joint(part, width, mid, out_channels, fusion=fusion, pool=pool, order=order)

    def _block(self, *arguments: Any) -> nn.Module:
        return self.blocks[self.layer](*arguments)

    def forward(self, x: Tensor) -> Tensor:
        part, rest = torch.split(x, [self.part_channels, self.in_channels - self.part_channels], 1)
        return self.transition(part if self.part_channels else None, self.dense(rest))

    def extra_repr(self) -> str:
        return f"part_ratio={self.part_ratio}, layer={self.layer!r}, recompute={self.recompute!r}"


def _bypass(part_ratio: float, in_channels: int) -> int:
    if not 0 <= part_ratio < 1:
        raise ValueError(f"part_ratio: got {part_ratio}, expected 0 <= part_ratio < 1")
    part = round(part_ratio * in_channels)
    if part == in_channels or (part == 0 and part_ratio > 0):
        split = f"{part} of {in_channels} channels to the bypass"
        raise ValueError(
            f"part_ratio: got {part_ratio}, which gives {split}, expected at least one channel on either side; "
            "use another ratio (0 for no bypass) or more in_channels"
        )
    return part


def _mid_channels(given: int | None, part: int, width: int, out_channels: int, fusion: str, layer: str) -> int:
    """Channels of the first transition; width is the dense block's output."""
    if fusion == "last":
        if out_channels <= part:
            raise ValueError(f"out_channels: got {out_channels}, expected more than the {part} of the bypass")
        default = out_channels - part
    else:
        default = width // 2 if layer == "pre" else width
    if given is not None and fusion == "first":
        raise ValueError(f"mid_channels: got {given}, expected None for fusion 'first', which has one transition")
    return default if given is None else given


def csp_stage(
    x: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    part_channels: int,
    layer: str = "pre",
    fusion: str = "csp",
    pool: str | None = "avg",
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
    recompute: str = "none",
) -> tuple[Tensor, Tensor]:
    """The functional form, same arguments and results as `csp.ops.csp_stage`, unchecked.

    Any floating dtype and device; differentiable any number of times. Stores everything: `recompute` does nothing.
    """
    count = len(params) // 3  # norms
    frozen = [False] * count if frozen is None else list(frozen)
    eps = [eps] * count if isinstance(eps, (int, float)) else list(eps)
    last = 2 if fusion == "csp" else 1  # norms of the transition
    n, given = count - last, 2 * sum(frozen[: count - last])
    part, rest = torch.split(x, [part_channels, x.shape[1] - part_channels], 1)
    dense, first = _BLOCKS[layer](rest, params[: 3 * n], running[:given], frozen=frozen[:n], eps=eps[:n])
    y, second = partial_transition(
        part if part_channels else None,
        dense,
        params[3 * n :],
        running[given:],
        fusion=fusion,
        order="pre" if layer == "pre" else "post",
        pool=pool,
        frozen=frozen[n:],
        eps=eps[n:],
    )
    return y, torch.cat((first, second), 1)
