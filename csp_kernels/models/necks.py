"""Feature pyramid necks: a list of maps, finest first, in; a list of maps out. Concatenations are `csp.ConcatConv`s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels.layers.concat_conv import ConcatConv
from csp_kernels.models.network import initialise
from csp_kernels.reference.csp_residual_stage import ConvNormAct

MERGES = ("concat", "add")
_LEAKY: dict[str, Any] = {"act": "leaky_relu", "negative_slope": 0.1}


class Maxout(nn.Module):
    """Cross-channel max pooling: [N, C, H, W] -> [N, min(C, groups), H, W].

    Output channel g is the largest of the input channels k with k mod groups == g (arXiv 1911.11929, section 3.2,
    in the arrangement of DarkNet's maxpool_depth).
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups: got {groups}, expected at least 1")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        if channels <= self.groups:
            return x
        missing = -channels % self.groups
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing), value=float("-inf"))
        return x.unflatten(1, (-1, self.groups)).amax(1)

    def extra_repr(self) -> str:
        return f"{self.groups}"


class FPN(nn.Module):
    """Feature pyramid: maps [N, channels[i], Hi, Wi], finest first -> as many maps of out_channels (arXiv 1612.03144).

    Top-down: each map meets the coarser node, enlarged to its size (nearest), in one 1x1 over both ("concat", as in
    YOLOv3) or by adding it to its own 1x1 ("add", the original); then a 3x3.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, merge: str = "concat") -> None:
        super().__init__()
        if merge not in MERGES:
            raise ValueError(f"merge: got {merge!r}, expected one of {', '.join(MERGES)}")
        self.channels, self.merge = _levels(channels, 1), merge
        above = [out_channels] if merge == "concat" else []
        *finer, top = self.channels
        inputs = [*([c, *above] for c in finer), [top]]
        self.lateral = nn.ModuleList(ConcatConv(i, out_channels, **_LEAKY) for i in inputs)
        self.smooth = nn.ModuleList(ConvNormAct(out_channels, out_channels, 3) for _ in channels)
        self.out_channels = (out_channels,) * len(channels)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        _check(maps, self.channels)
        node = self.lateral[-1]([maps[-1]])
        nodes = [node]
        for x, lateral in zip(maps[-2::-1], self.lateral[-2::-1], strict=True):
            node = _enlarged(node, x)
            node = lateral([x, node]) if self.merge == "concat" else lateral([x]) + node
            nodes.append(node)
        return [smooth(node) for smooth, node in zip(self.smooth, reversed(nodes), strict=True)]


class GFM(nn.Module):
    """Global fusion: maps [N, channels[i], Hi, Wi], finest first -> len(channels) - 1 maps (arXiv 1911.11929, Fig. 6b).

    Every map, compressed by `Maxout` and a 1x1 to out_channels, and the global average of the coarsest one are added
    up to one map of the second finest size. The predictions hang off it bottom-up: the first is its 3x3; each next
    one is a 3x3 over the fused map and the prediction before it, both at half the size. The outputs have the
    sizes of maps[1:], out_channels each (the paper gives no widths).
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.channels = _levels(channels, 2)
        self.compress = Maxout(out_channels)
        widths = [min(c, out_channels) for c in self.channels]
        self.lateral = nn.ModuleList(ConcatConv([c], out_channels, **_LEAKY) for c in widths)
        self.context = nn.Conv2d(self.channels[-1], out_channels, 1)
        outputs = len(channels) - 1
        pair = [out_channels, out_channels]
        self.merge = nn.ModuleList(ConcatConv(pair, out_channels, **_LEAKY) for _ in range(outputs - 1))
        self.predict = nn.ModuleList(ConvNormAct(out_channels, out_channels, 3) for _ in range(outputs))
        self.out_channels = (out_channels,) * outputs
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        _check(maps, self.channels)
        like = maps[1]
        fused = self.context(maps[-1].mean((2, 3), keepdim=True))
        for i, (x, lateral) in enumerate(zip(maps, self.lateral, strict=True)):
            x = self.compress(x)
            fused = fused + (lateral([_reduced(x, like)]) if i == 0 else _enlarged(lateral([x]), like))
        outputs = [self.predict[0](fused)]
        for x, merge, predict in zip(maps[2:], self.merge, self.predict[1:], strict=True):
            fused = _reduced(fused, x)
            outputs.append(predict(merge([fused, _reduced(outputs[-1], x)])))
        return outputs


class EFM(nn.Module):
    """Exact fusion: maps [N, channels[i], Hi, Wi], finest first -> len(channels) - 1 maps (arXiv 1911.11929, Fig. 6c).

    Top-down, fusion node s (the levels from the second finest on) takes its own level through a 1x1, the next finer
    level halved, and the coarser node enlarged; the last two are compressed to the node's width by `Maxout` first. One
    1x1 over all, then a 3x3. Bottom-up, prediction s is a 3x3 over node s and the finer prediction halved.
    out_channels: the widths of the nodes, finest first, or one for all. The outputs have the sizes of maps[1:].
    sam: multiplies each node by sigmoid(BN(1x1)) of the same inputs, per channel and pixel (the modified spatial
    attention module of DarkNet; from all inputs it costs what the paper adds for it).
    Wiring as drawn; widths were not published: (64, 128, 256) on PeleeNet comes close to the paper's cost.
    """

    def __init__(self, channels: Sequence[int], out_channels: int | Sequence[int], *, sam: bool = False) -> None:
        super().__init__()
        self.channels = _levels(channels, 2)
        nodes = len(self.channels) - 1
        widths = (out_channels,) * nodes if isinstance(out_channels, int) else tuple(out_channels)
        if len(widths) != nodes or min(widths) < 1:
            raise ValueError(f"out_channels: got {list(widths)}, expected {nodes} sizes of at least 1")
        self.out_channels, self.sam = widths, sam
        inputs = []  # of each node: own level, finer level, coarser node
        for s, width in enumerate(widths):
            coarser = [min(widths[s + 1], width)] if s + 1 < nodes else []
            inputs.append([width, min(self.channels[s], width), *coarser])
        own = zip(self.channels[1:], widths, strict=True)
        self.compress = nn.ModuleList(Maxout(width) for width in widths)
        self.lateral = nn.ModuleList(ConcatConv([c], width, **_LEAKY) for c, width in own)
        pairs = list(zip(inputs, widths, strict=True))
        self.fuse = nn.ModuleList(ConcatConv(i, width, **_LEAKY) for i, width in pairs)
        self.gate = nn.ModuleList(ConcatConv(i, width, act="identity") for i, width in pairs if sam)
        self.smooth = nn.ModuleList(ConvNormAct(width, width, 3) for width in widths)
        steps = zip(widths[1:], widths, strict=False)
        self.merge = nn.ModuleList(ConcatConv([w, finer], w, **_LEAKY) for w, finer in steps)
        self.predict = nn.ModuleList(ConvNormAct(width, width, 3) for width in widths)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        _check(maps, self.channels)
        nodes: list[Tensor] = []  # coarsest first
        for s in reversed(range(len(self.out_channels))):
            own, compress = maps[s + 1], self.compress[s]
            inputs = [self.lateral[s]([own]), _reduced(compress(maps[s]), own)]
            if nodes:
                inputs.append(_enlarged(compress(nodes[-1]), own))
            node = self.fuse[s](inputs)
            if self.sam:
                node = node * torch.sigmoid(self.gate[s](inputs))
            nodes.append(self.smooth[s](node))
        nodes.reverse()
        outputs = [self.predict[0](nodes[0])]
        for s, node in enumerate(nodes[1:]):
            outputs.append(self.predict[s + 1](self.merge[s]([node, _reduced(outputs[-1], node)])))
        return outputs


def _levels(channels: Sequence[int], least: int) -> tuple[int, ...]:
    if len(channels) < least or min(channels) < 1:
        raise ValueError(f"channels: got {list(channels)}, expected {least} or more sizes of at least 1, finest first")
    return tuple(channels)


def _check(maps: Sequence[Tensor], channels: Sequence[int]) -> None:
    got = [x.shape[1] for x in maps]
    if got != list(channels):
        raise ValueError(f"maps: got {got} channels, expected {list(channels)}")


def _reduced(x: Tensor, like: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, h, w], the size of `like`, at most H and W, by max pooling."""
    height, width = like.shape[2:]
    if x.shape[2:] == (2 * height, 2 * width):
        return F.max_pool2d(x, 2)
    return F.adaptive_max_pool2d(x, (height, width))


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C, H, W], the size of `like`, by the nearest pixel."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="nearest")
