"""VoVNet's one-shot aggregation as a module, run as one operator."""

from __future__ import annotations

from csp_kernels.layers.stage import Stage
from csp_kernels.stage.osa_block import osa_block


class OSABlock(Stage):
    """One-shot aggregation (VoVNet, arXiv 1904.09730, Fig. 2): [N, in_channels, H, W] -> [N, out_channels, H, W].

    A chain of `layers` 3x3 convolutions of mid_channels, and a 1x1 over x and all of them side by side; batch norm and
    `act` behind every convolution. shortcut: x is added to what that gives (arXiv 1911.06667, Fig. 3; then
    in_channels is out_channels). Children are timm's: conv_mid.{i} and conv_concat, each with conv and bn; its
    attention is another module. How it runs, `recompute`, dtypes and errors: `csp.Stage`.
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, layers: int = 5, shortcut: bool = False, *,
        act: str = "relu", negative_slope: float = 0.1, eps: float = 1e-5, momentum: float = 0.1,
        recompute: str = "none",
    ) -> None:  # fmt: skip
        graph = osa_block(in_channels, mid_channels, out_channels, layers, shortcut, act, negative_slope)
        super().__init__(graph, eps=eps, momentum=momentum, recompute=recompute)
