"""1x1 convolution, batch norm and activation over a concatenation, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from csp_kernels.reference._norms import Norms, conv
from csp_kernels.reference.activations import FUNCTIONS
from csp_kernels.vocabulary import ACTIVATIONS


class ConcatConv(nn.Module):
    """act(BN(conv1x1(cat(inputs)))): tensors [N, in_channels[i], H, W] -> [N, out_channels, H, W].

    out_channels: a number gives one tensor, a sequence a tuple of tensors with that many channels each (channel slices
    of one result: the two 1x1 convolutions of a cross stage split, CSPNet, arXiv 1911.11929, Fig. 5).
    act: one of csp_kernels.vocabulary.ACTIVATIONS; leaky_relu with negative_slope.
    Children conv (no bias) and norm. forward takes the sequence of inputs, or the tensor if there is one.
    Raises ValueError for sizes below 1 or another act, TypeError or ValueError for inputs of other sizes.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        *,
        act: str = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        self.in_channels = (in_channels,) if isinstance(in_channels, int) else tuple(in_channels)
        self.out_channels = out_channels if isinstance(out_channels, int) else tuple(out_channels)
        self.splits = (out_channels,) if isinstance(out_channels, int) else tuple(out_channels)
        for name, sizes in (("in_channels", self.in_channels), ("out_channels", self.splits)):
            if not sizes or min(sizes) < 1:
                got = sizes[0] if len(sizes) == 1 else list(sizes)
                raise ValueError(f"{name}: got {got}, expected one or more sizes of at least 1")
        if act not in ACTIVATIONS:
            raise ValueError(f"act: got {act!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.act, self.negative_slope = act, float(negative_slope)
        self.conv = nn.Conv2d(sum(self.in_channels), sum(self.splits), kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(sum(self.splits))

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(inputs, Proxy):  # of torch.fx: a tensor, or a sequence of unknown length
            inputs = inputs if len(self.in_channels) == 1 else [inputs[i] for i in range(len(self.in_channels))]
        x = inputs if isinstance(inputs, (Tensor, Proxy)) else torch.cat(list(inputs), 1)
        y = FUNCTIONS[self.act](self.norm(self.conv(x)), self.negative_slope)
        return y if isinstance(self.out_channels, int) else torch.split(y, list(self.splits), 1)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, act={self.act!r}, negative_slope={self.negative_slope}"


def concat_conv(
    inputs: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running: Sequence[Tensor] = (),
    *,
    frozen: bool = False,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    splits: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The functional form, same arguments and results as `csp.ops.concat_conv`, unchecked.

    Any floating dtype and device; differentiable any number of times.
    """
    norm = Norms(1, running, [frozen], eps)
    z = norm(conv(torch.cat(list(inputs), 1), weight), norm_weight, norm_bias)  # [N, out, H, W]
    y = FUNCTIONS[act](z, negative_slope)
    return ([y] if splits is None else list(torch.split(y, list(splits), 1))), norm.stats()
