"""Stage of CSPResNet, CSPResNeXt, CSPDarkNet: split, residual blocks, partial transition (arXiv 1911.11929, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels import ops
from csp_kernels.layers._children import Fused, Shape, fits, recorded, shape_of, warn_once
from csp_kernels.layers._norms import consecutive, frozen_norms, only_norms, parameters, update_running
from csp_kernels.layers.concat_conv import ConcatConv
from csp_kernels.ops._program import built
from csp_kernels.ops._transforms import backend_of
from csp_kernels.ops.stage import unsupported
from csp_kernels.stage.csp_residual_stage import csp_residual_stage
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.place import RECOMPUTE
from csp_kernels.stage.residual_block import BLOCKS

ACTIVATIONS = ("relu", "leaky_relu", "silu", "mish", "hardswish", "identity")
ORDERS = ("main_first", "part_first")
SPLITS = ("conv", "slice")


def activation(act: str, negative_slope: float) -> nn.Module:
    """The activation as a module. Raises ValueError for an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act: got {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    if act == "leaky_relu":
        return nn.LeakyReLU(negative_slope, inplace=True)
    if act == "relu":
        return nn.ReLU(inplace=True)
    return {"silu": nn.SiLU, "mish": nn.Mish, "hardswish": nn.Hardswish, "identity": nn.Identity}[act]()


class ConvNormAct(nn.Module):
    """Convolution, batch norm, activation: [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride].

    Padded to keep the size; sizes that the stride does not divide are rounded up. Children conv (no bias), norm, act.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: str = "leaky_relu",
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = activation(act, negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Residual block: [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride].

    block: "bottleneck": 1x1, 3x3 (groups, stride), 1x1 linear, add, activation (ResNet, ResNeXt);
           "dark": 1x1, 3x3 (groups, stride), linear add (DarkNet-53);
           "basic": 3x3 (groups, stride), 3x3 linear, add, activation (ResNet-10).
    The shortcut has no parameters. As in DarkNet it is subsampled by the stride, and of unequal numbers of channels
    only the leading common ones are added. Children conv1, conv2 (, conv3), each with conv and norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        *,
        block: str = "bottleneck",
        stride: int = 1,
        groups: int = 1,
        act: str = "leaky_relu",
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block: got {block!r}, expected one of {', '.join(BLOCKS)}")

        def conv(i: int, o: int, kernel: int, name: str = act) -> ConvNormAct:
            g, s = (groups, stride) if kernel == 3 and name == act else (1, 1)
            return ConvNormAct(i, o, kernel, stride=s, groups=g, act=name, negative_slope=negative_slope)

        if block == "basic":
            self.conv1, self.conv2 = conv(in_channels, mid_channels, 3), conv(mid_channels, out_channels, 3, "identity")
        else:
            self.conv1 = conv(in_channels, mid_channels, 1)
            self.conv2 = conv(mid_channels, out_channels if block == "dark" else mid_channels, 3)
        if block == "bottleneck":
            self.conv3 = conv(mid_channels, out_channels, 1, "identity")
        self.act = nn.Identity() if block == "dark" else activation(act, negative_slope)
        self.block, self.stride, self.missing = block, stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        if self.block == "bottleneck":
            y = self.conv3(y)
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            x = F.pad(x, (0, 0, 0, 0, 0, self.missing))  # a negative number drops channels
        return self.act(y + x)

    def extra_repr(self) -> str:
        return f"block={self.block!r}, stride={self.stride}"


class CSPStage(Fused, nn.Module):
    """Cross stage partial residual stage: [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride].

    down: 3x3 convolution (grouped as the blocks) if stride > 1, to down_channels (default in_channels);
    split into a bypass of part_channels and a main part of entry_channels;
    blocks: num_blocks `ResidualBlock`s of `width` channels, mid_channels inside (default width: no bottleneck);
    t_a: 1x1, width to width; t_b: 1x1 over [t_a, bypass] (order "main_first", DarkNet's files) or [bypass, t_a]
    ("part_first", timm), to out_channels.
    All behind the convolution of `down` runs as one operator, nothing is concatenated (`csp.ops.stage`: dtypes, memory
    formats and errors); what backward keeps is what the convolutions and the sums of the blocks give. The norms are
    plain nn.BatchNorm2d and count as such; no child but down.conv is called. With grouped blocks, other children than
    it was made with (SyncBatchNorm), hooks on them or another forward it calls them one after the other, and says why
    not, once; RuntimeError if "native" was chosen, except for groups.

    split: "slice" takes the paper's channel slices, the first part_channels (default round(part_ratio * down_channels))
        bypassing; entry_channels is what remains, and width defaults to it.
        "conv" (the published configurations) computes both parts by 1x1 convolutions of the same input, as one
        convolution with two outputs, bypass first; part_channels and entry_channels default to width, width to
        out_channels // 2. part_ratio is not used. split_act: its activation, default act; "identity" is "linear".
            A pair (bypass, main) of different ones gives two convolutions.
    recompute: what backward computes again instead of keeping it: "none", "bottleneck" (1x1 convolutions that 3x3 ones
        alone read) or "all" (all but inputs and outputs).
    Sources: arXiv 1911.11929 section 3.2 and Fig. 5; csresnet50, csresnext50 and csdarknet53 of its repository.
    Raises ValueError for unknown names and for sizes below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        stride: int = 2,
        down_channels: int | None = None,
        width: int | None = None,
        mid_channels: int | None = None,
        part_channels: int | None = None,
        entry_channels: int | None = None,
        part_ratio: float = 0.5,
        groups: int = 1,
        block: str = "bottleneck",
        split: str = "conv",
        split_act: str | Sequence[str] | None = None,
        order: str = "main_first",
        act: str = "leaky_relu",
        negative_slope: float = 0.1,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        for name, value, known in (("split", split, SPLITS), ("order", order, ORDERS)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        channels = (down_channels or in_channels) if stride > 1 else in_channels
        if split == "slice":
            part = round(part_ratio * channels) if part_channels is None else part_channels
            entry = channels - part
            if entry_channels not in (None, entry) or split_act is not None:
                raise ValueError("entry_channels, split_act: not with split='slice'")
            width = entry if width is None else width
        else:
            width = out_channels // 2 if width is None else width
            part = width if part_channels is None else part_channels
            entry = width if entry_channels is None else entry_channels
        mid = width if mid_channels is None else mid_channels
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "num_blocks": num_blocks, "width": width,
                 "part_channels": part, "entry_channels": entry, "mid_channels": mid, "stride": stride}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(RECOMPUTE)}")
        self.in_channels, self.part_channels, self.entry_channels, self.order = in_channels, part, entry, order
        self.recompute = recompute

        if stride > 1:
            self.down: ConvNormAct | None = ConvNormAct(
                in_channels, channels, 3, stride=stride, groups=groups, act=act, negative_slope=negative_slope
            )
        else:
            self.down = None
        self.split = _split(channels, part, entry, split_act or act, negative_slope) if split == "conv" else None
        options: dict[str, Any] = {"block": block, "groups": groups, "act": act, "negative_slope": negative_slope}
        blocks = (ResidualBlock(width if i else entry, width, mid, **options) for i in range(num_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.t_a = ConcatConv([width], width, act=act, negative_slope=negative_slope)
        inputs = [width, part] if order == "main_first" else [part, width]
        self.t_b = ConcatConv(inputs, out_channels, act=act, negative_slope=negative_slope)

        self._source = (
            csp_residual_stage, channels, part, entry, width, mid, out_channels, num_blocks, block, groups, stride > 1,
            _acts(split, split_act or act), order, act, negative_slope if act == "leaky_relu" else 0.0,
        )  # fmt: skip
        self._shape: Shape = shape_of(self)

    def forward(self, x: Tensor) -> Tensor:
        if recorded(x) or unsupported(self.graph):
            return self._by_children(x)
        children, reason = self.holders()
        if reason:
            warn_once(self, reason)
            return self._by_children(x)
        if not fits(x, self.in_channels):
            raise ValueError(f"x: got {x.shape[1]} channels {list(x.shape)}, expected {self.in_channels}")
        norms, params = only_norms(children), parameters(children)
        frozen, running = frozen_norms(norms)
        if backend_of("stage", [x], params, running) == "reference":
            return self._by_children(x)
        (image,) = self.images(x)
        eps = [norm.eps for norm in norms]
        outputs, stats = ops.stage(
            self.graph, [image], params, running, frozen=frozen, eps=eps, recompute=self.recompute
        )  # fmt: skip
        if not all(frozen):
            count = image.shape[0] * image.shape[2] * image.shape[3]
            update_running(norms, consecutive(norms), stats, count)
        return outputs[0]

    def _by_children(self, x: Tensor) -> Tensor:
        if self.down is not None:
            x = self.down(x)
        if self.split is None:
            part, main = x[:, : self.part_channels], x[:, self.part_channels :]
        elif isinstance(self.split, nn.ModuleList):
            part, main = (conv(x) for conv in self.split)
        else:
            part, main = self.split(x)
        main = self.t_a(self.blocks(main))
        return self.t_b([main, part] if self.order == "main_first" else [part, main])

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can."""
        reason = unsupported(self.graph) or self._shape.differs(self, self.called)
        return ([] if reason else [self.get_submodule(item.name) for item in self.graph.order]), reason

    @property
    def called(self) -> tuple[str, ...]:
        """Children that run beside the operator."""
        return ("down.conv",) if self.down is not None else ()

    @property
    def graph(self) -> Graph:
        """What a call computes, of what `images` gives."""
        return built(self._source)

    def images(self, x: Tensor) -> Sequence[Tensor]:
        """The input of the graph: x, or what the convolution of `down` makes of it."""
        return [x if self.down is None else self.down.conv(x)]

    def extra_repr(self) -> str:
        return f"part_channels={self.part_channels}, entry_channels={self.entry_channels}, order={self.order!r}"


def _split(channels: int, part: int, main: int, act: str | Sequence[str], slope: float) -> ConcatConv | nn.ModuleList:
    """One convolution with two outputs, or two with different activations."""
    acts = {act} if isinstance(act, str) else set(act)
    if len(acts) == 1:
        return ConcatConv([channels], [part, main], act=acts.pop(), negative_slope=slope)
    pairs = zip((part, main), act, strict=True)
    return nn.ModuleList(ConcatConv([channels], o, act=a, negative_slope=slope) for o, a in pairs)


def _acts(split: str, act: str | Sequence[str]) -> tuple[str, ...]:
    """Of the 1x1 of the split, or of its two; (): it has none."""
    if split == "slice":
        return ()
    acts = (act,) if isinstance(act, str) else tuple(act)
    return acts[:1] if len({*acts}) == 1 else acts
