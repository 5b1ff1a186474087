"""One case of every operator, sizes that fill several tiles, and what is too small or odd for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cases import BlockCase, Case, ConcatConvCase, StageCase, TransitionCase
from torch import Tensor


@dataclass(frozen=True)
class DenseCase(BlockCase):
    layer: str = "pre"

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        y, stats = where.dense_block(*inputs, params, running, frozen=self.flags, **self.options)
        total = y.shape[1]  # what the last layer adds has unspecified statistics: no norm needs them
        return y, torch.cat([stats[:, : total - self.growth], stats[:, total:]], 1)


BOTTLENECK = {"recompute": "bottleneck"}
OPERATORS: dict[str, Case] = {
    "dense_block": DenseCase(),
    "dense_block, recompute": DenseCase(options=BOTTLENECK),
    "dense_block, multiples of 8": DenseCase(channels=16, growth=16, width=32, size=(2, 9, 10)),
    "concat_conv": ConcatConvCase(),
    "concat_conv, mish, two outputs": ConcatConvCase(options={"act": "mish", "splits": [5, 12]}),
    "partial_transition, post": TransitionCase(),
    "partial_transition, pre": TransitionCase(order="pre", pool=None),
    "post_dense_block": BlockCase(layer="post"),
    "two_way_dense_block": BlockCase(layer="two_way"),
    "csp_stage, pre": StageCase(),
    "csp_stage, pre, recompute": StageCase(options=BOTTLENECK),
    "csp_stage, post, first": StageCase(layer="post", fusion="first"),
    "csp_stage, two_way, last": StageCase(layer="two_way", fusion="last", pool=None),
}
MAPS = (4, 37, 29)  # N, H, W: 4,292 pixels
_BLOCK = {"layers": 3, "channels": 128, "growth": 32, "width": 128, "size": MAPS}
_STAGE = {**_BLOCK, "part": 64, "mid": 96, "out": 160}
LARGE: dict[str, Case] = {
    "dense_block": DenseCase(**_BLOCK),
    "concat_conv": ConcatConvCase(channels=(136, 72, 64, 24), out=264, size=MAPS),
    "partial_transition, post": TransitionCase(part=64, dense=160, mid=96, out=136, size=MAPS),
    "partial_transition, pre": TransitionCase(part=64, dense=160, mid=96, out=136, size=MAPS, order="pre"),
    "post_dense_block": BlockCase(**_BLOCK),
    "two_way_dense_block": BlockCase(**{**_BLOCK, "layer": "two_way"}),
    "csp_stage, pre": StageCase(**_STAGE),
    "csp_stage, post, first": StageCase(**_STAGE, layer="post", fusion="first"),
    "csp_stage, two_way, last": StageCase(**_STAGE, layer="two_way", fusion="last"),
}
