"""Stage of CSPResNet, CSPResNeXt, CSPDarkNet in plain PyTorch: split, residual blocks, partial transition
(arXiv 1911.11929, Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels.reference.activations import activation
from csp_kernels.reference.concat_conv import ConcatConv
from csp_kernels.vocabulary import BLOCKS, SPLITS, STAGE_ORDERS


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


class CSPStage(nn.Module):
    """Cross stage partial residual stage: [N, in_channels, H, W] -> [N, out_channels, H/stride, W/stride].

    down: 3x3 convolution (grouped as the blocks) if stride > 1, to down_channels (default in_channels);
    split into a bypass of part_channels and a main part of entry_channels;
    blocks: num_blocks `ResidualBlock`s of `width` channels, mid_channels inside (default width: no bottleneck);
    t_a: 1x1, width to width; t_b: 1x1 over [t_a, bypass] (order "main_first", DarkNet's files) or [bypass, t_a]
    ("part_first", timm), to out_channels.

    split: "slice" takes the paper's channel slices, the first part_channels (default round(part_ratio * down_channels))
        bypassing; entry_channels is what remains, and width defaults to it.
        "conv" (the published configurations) computes both parts by 1x1 convolutions of the same input, as one
        convolution with two outputs, bypass first; part_channels and entry_channels default to width, width to
        out_channels // 2. part_ratio is not used. split_act: its activation, default act; "identity" is "linear".
        A pair (bypass, main) of different ones gives two convolutions.
    Sources: arXiv 1911.11929 section 3.2 and Fig. 5; csresnet50, csresnext50 and csdarknet53 of its repository.
    Raises ValueError for unknown names and for sizes below 1.
    """

    joint: ClassVar[Callable[..., nn.Module]] = ConcatConv

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
    ) -> None:
        super().__init__()
        for name, value, known in (("split", split, SPLITS), ("order", order, STAGE_ORDERS)):
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
        self.in_channels, self.part_channels, self.entry_channels, self.order = in_channels, part, entry, order
        self.width, self.mid_channels, self.out_channels = width, mid, out_channels

        if stride > 1:
            self.down: ConvNormAct | None = ConvNormAct(
                in_channels, channels, 3, stride=stride, groups=groups, act=act, negative_slope=negative_slope
            )
        else:
            self.down = None
        self.split_acts = _acts(split_act or act) if split == "conv" else ()
        self.split = self._split(channels, negative_slope) if self.split_acts else None
        options: dict[str, Any] = {"block": block, "groups": groups, "act": act, "negative_slope": negative_slope}
        blocks = (ResidualBlock(width if i else entry, width, mid, **options) for i in range(num_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.t_a = self.joint([width], width, act=act, negative_slope=negative_slope)
        inputs = [width, part] if order == "main_first" else [part, width]
        self.t_b = self.joint(inputs, out_channels, act=act, negative_slope=negative_slope)

    def _split(self, channels: int, slope: float) -> nn.Module:
        """One convolution with two outputs, or two with different activations."""
        widths = [self.part_channels, self.entry_channels]
        if len(self.split_acts) == 1:
            return self.joint([channels], widths, act=self.split_acts[0], negative_slope=slope)
        pairs = zip(widths, self.split_acts, strict=True)
        return nn.ModuleList(self.joint([channels], n, act=act, negative_slope=slope) for n, act in pairs)

    def forward(self, x: Tensor) -> Tensor:
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

    def extra_repr(self) -> str:
        return f"part_channels={self.part_channels}, entry_channels={self.entry_channels}, order={self.order!r}"


def _acts(act: str | Sequence[str]) -> tuple[str, ...]:
    """Of one 1x1 that gives both parts, or of two."""
    acts = (act,) if isinstance(act, str) else tuple(act)
    return acts[:1] if len({*acts}) == 1 else acts
