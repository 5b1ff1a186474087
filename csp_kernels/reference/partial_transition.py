"""The partial transition with naive concatenation (CSPNet, arXiv 1911.11929, Eq. 4, Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels.reference._norms import Norms, conv
from csp_kernels.vocabulary import FUSIONS, TRANSITION_ORDERS

POOLS = ("avg", None)


class Unit(nn.Module):
    """One transition, [N, in_channels, H, W] -> [N, out_channels, H, W]; children norm, conv.

    order "post": 1x1 convolution, batch norm, ReLU; "pre": batch norm, ReLU, 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, order: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(out_channels if order == "post" else in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) if self.order == "post" else self.conv(F.relu(self.norm(x)))


class PartialTransition(nn.Module):
    """Joins the bypass and the dense part of a stage: [N, part_channels, H, W], [N, dense_channels, H, W] -> y.

    y [N, out_channels, H // 2, W // 2] (pool "avg") or [N, out_channels, H, W] (pool None). Children t (dense_channels
    to mid_channels) and u (to out_channels), each with norm and conv; the fusions of the paper's Fig. 3:
      "csp" (b)    u([part, t(dense)])
      "first" (c)  u([part, dense]); no t, mid_channels is not used
      "last" (d)   [part, t(dense)]; no u, out_channels = part_channels + mid_channels
    order: "post" (convolution, batch norm, ReLU: PeleeNet) pools in front of u, "pre" (batch norm, ReLU, convolution:
    DenseNet) at the end; "last" pools at the end. part_channels 0: there is no bypass, forward takes None for it.
    Raises ValueError for other values or sizes below 1 (part_channels: 0), and for inputs that do not fit.
    """

    def __init__(
        self,
        part_channels: int,
        dense_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        fusion: str = "csp",
        pool: str | None = "avg",
        order: str = "post",
    ) -> None:
        super().__init__()
        for name, choice, choices in (
            ("fusion", fusion, FUSIONS),
            ("pool", pool, POOLS),
            ("order", order, TRANSITION_ORDERS),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: got {choice!r}, expected one of {', '.join(map(str, choices))}")
        if part_channels < 0:
            raise ValueError(f"part_channels: got {part_channels}, expected at least 0")
        sizes = {"dense_channels": dense_channels, "mid_channels": mid_channels, "out_channels": out_channels}
        if fusion == "first":
            del sizes["mid_channels"]
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if fusion == "last" and out_channels != part_channels + mid_channels:
            expected = f"{part_channels + mid_channels}, part_channels + mid_channels, for fusion 'last'"
            raise ValueError(f"out_channels: got {out_channels}, expected {expected}")
        self.part_channels, self.dense_channels = part_channels, dense_channels
        self.fusion, self.pool, self.order = fusion, pool, order
        if fusion != "first":
            self.t = Unit(dense_channels, mid_channels, order)
        if fusion != "last":
            self.u = Unit(part_channels + (mid_channels if fusion == "csp" else dense_channels), out_channels, order)

    def forward(self, part: Tensor | None, dense: Tensor) -> Tensor:
        x = dense if self.fusion == "first" else self.t(dense)
        if part is not None:
            x = torch.cat((part, x), 1)
        first = self.fusion == "last" or self.order == "post"
        x = F.avg_pool2d(x, 2) if self.pool and first else x
        x = x if self.fusion == "last" else self.u(x)
        return F.avg_pool2d(x, 2) if self.pool and not first else x

    def extra_repr(self) -> str:
        return f"fusion={self.fusion!r}, pool={self.pool!r}, order={self.order!r}"


def partial_transition(
    part: Tensor | None,
    dense: Tensor,
    params: Sequence[Tensor | None],
    running: Sequence[Tensor] = (),
    *,
    fusion: str = "csp",
    order: str = "post",
    pool: str | None = "avg",
    frozen: Sequence[bool] | None = None,
    eps: float | Sequence[float] = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The functional form, same arguments and results as `csp.ops.partial_transition`, unchecked.

    Any floating dtype and device; differentiable any number of times.
    """
    norms = Norms(len(params) // 3, running, frozen, eps)

    def unit(x: Tensor, weight: Tensor | None, bias: Tensor | None, w: Tensor | None) -> Tensor:
        if order == "post":
            return F.relu(norms(conv(x, w), weight, bias))
        return conv(F.relu(norms(x, weight, bias)), w)

    x = dense if fusion == "first" else unit(dense, *params[:3])
    if part is not None:
        x = torch.cat((part, x), 1)
    first = fusion == "last" or order == "post"
    x = F.avg_pool2d(x, 2) if pool and first else x
    x = x if fusion == "last" else unit(x, *params[-3:])
    return (F.avg_pool2d(x, 2) if pool and not first else x), norms.stats()
