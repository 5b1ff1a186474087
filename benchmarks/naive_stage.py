"""A graph as one would write it with plain modules: every norm and activation once, concatenations made."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import csp_kernels as csp
from csp_kernels.stage.graph import Conv, MaxPool, Read


class NaiveStage(csp.Stage):
    """[N, graph.inputs[i], H, W] each -> the graph's only output; parameters under the names of `csp.Stage`."""

    def forward(self, *inputs: Tensor) -> Tensor:
        modules: dict[tuple[str, int], Any] = {
            (item.kind, item.index): self.get_submodule(item.name) for item in self.graph.order
        }
        values, known = list(inputs), dict[tuple[object, ...], Tensor]()
        pieces: dict[tuple[object, ...], dict[int, Tensor]] = {}  # by first channel; cut once, as chunk() does
        ends: dict[tuple[object, ...], list[int]] = {}
        for r in (r for _, user in self.graph.users() for r in user.reads):
            here = {*ends.get((r.value, r.norm, r.act, r.slope), ()), r.start, r.stop, 0, self.graph.channels[r.value]}
            ends[r.value, r.norm, r.act, r.slope] = sorted(here)

        def widths(channels: list[int]) -> list[int]:
            return [b - a for a, b in pairwise(channels)]

        def read(r: Read) -> Tensor:
            key = r.value, r.norm, r.act, r.slope
            if key not in known:
                y = values[r.value] if r.norm is None else modules["norm", r.norm](values[r.value])
                known[key] = activated(y, r.act, r.slope, r.norm is not None)
                pieces[key] = dict(zip(ends[key], known[key].split(widths(ends[key]), 1), strict=False))
            inside = [piece for start, piece in pieces[key].items() if r.start <= start < r.stop]
            return inside[0] if len(inside) == 1 else torch.cat(inside, 1)

        for i, node in enumerate(self.graph.nodes):
            found = [read(r) for r in node.reads]
            if isinstance(node, Conv):
                values.append(modules["conv", i](torch.cat(found, 1) if len(found) > 1 else found[0]))
            elif isinstance(node, MaxPool):
                values.append(F.max_pool2d(found[0], node.size, node.stride, node.size // 2))
            else:
                values.append(activated(sum(found[1:], found[0]), node.act, node.slope, False))
        (write,) = self.graph.outputs
        found = [read(r) for r in write.reads]
        return torch.cat(found, 1) if len(found) > 1 else found[0]


def activated(x: Tensor, act: str, slope: float, inplace: bool) -> Tensor:
    """inplace: as networks have it behind a norm."""
    if act == "identity":
        return x
    if act == "leaky_relu":
        return F.leaky_relu(x, slope, inplace)
    if act in ("relu", "silu", "hardswish", "mish"):
        return getattr(F, act)(x, inplace=inplace)
    raise ValueError(f"act: got {act!r}, expected one of relu, leaky_relu, silu, mish, hardswish, identity")
