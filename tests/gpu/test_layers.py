"""The modules on the device against their naive twins: modes of the norms, running statistics, one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import modes
import pytest
import torch
from modes import MODES
from torch import Tensor, nn

import csp_kernels as csp


@dataclass(frozen=True)
class Pair:
    """A layer, its twin in csp.reference, and the channels of its inputs."""

    name: str
    sizes: tuple[Any, ...]
    channels: tuple[int, ...]
    options: dict[str, Any]

    def build(self) -> tuple[nn.Module, nn.Module]:
        ours, naive = (getattr(where, self.name)(*self.sizes, **self.options) for where in (csp, csp.reference))
        return ours, naive

    def inputs(self, layout: torch.memory_format = torch.contiguous_format) -> Callable[[int], list[Tensor]]:
        def make(n: int) -> list[Tensor]:
            images = [torch.randn(n, c, 5, 6, dtype=torch.float64) * 2 + 1 for c in self.channels]
            return [x.contiguous(memory_format=layout) for x in images]

        return make


PAIRS = {
    "DenseBlock": Pair("DenseBlock", (2, 17, 8, 2), (17,), {}),
    "ConcatConv": Pair("ConcatConv", ([17], [6, 9]), (17,), {"act": "mish"}),
    "PostDenseBlock": Pair("PostDenseBlock", (2, 17, 8, 2), (17,), {}),
    "TwoWayDenseBlock": Pair("TwoWayDenseBlock", (2, 17, 8, 2), (17,), {}),
    "PartialTransition": Pair("PartialTransition", (5, 12, 9, 14), (5, 12), {}),
    "PartialTransition, pre": Pair("PartialTransition", (5, 12, 9, 14), (5, 12), {"order": "pre"}),
    "CSPDenseStage": Pair("CSPDenseStage", (17, 22, 2, 8, 2), (17,), {}),
    "CSPDenseStage, recompute": Pair("CSPDenseStage", (17, 22, 2, 8, 2), (17,), {"recompute": "bottleneck"}),
    "CSPDenseStage, two_way": Pair("CSPDenseStage", (17, 22, 2, 8, 2), (17,), {"layer": "two_way"}),
}
pairs = pytest.mark.parametrize("pair", PAIRS)


@pytest.mark.parametrize("mode", MODES)
@pairs
def test_three_steps_equal_the_naive_twin(pair: str, mode: str) -> None:
    ours, naive = PAIRS[pair].build()
    modes.twins(ours, naive, MODES[mode])
    modes.check_three_steps(ours, naive, PAIRS[pair].inputs())


@pairs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_equals_eager_for_any_batch_size(pair: str, layout: torch.memory_format) -> None:
    ours, naive = PAIRS[pair].build()
    modes.twins(ours, naive)
    modes.check_compiled(ours, PAIRS[pair].inputs(layout))
