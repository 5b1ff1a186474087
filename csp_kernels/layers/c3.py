"""YOLOv5's C3 as a module, run as one operator."""

from __future__ import annotations

from csp_kernels.layers.stage import Stage
from csp_kernels.stage.c3 import c3


class C3(Stage):
    """Cross stage partial block of YOLOv5: [N, in_channels, H, W] -> [N, out_channels, H, W].

    cv3 of [m(cv1(x)), cv2(x)] side by side: cv1, cv2, cv3 are 1x1 convolutions, m is `blocks` bottlenecks of a 1x1 and
    a 3x3, with or without a shortcut; batch norm and `act` behind every convolution. hidden: channels of both parts,
    by default half of out_channels. Children and defaults are those of ultralytics: cv1, cv2, cv3, m.{i}.cv1 and
    m.{i}.cv2, each with conv and bn (eps 1e-3, momentum 0.03). How it runs, `recompute`, dtypes and errors:
    `csp.Stage`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = True, *, hidden: int = 0,
        act: str = "silu", negative_slope: float = 0.1, eps: float = 1e-3, momentum: float = 0.03,
        recompute: str = "none",
    ) -> None:  # fmt: skip
        graph = c3(in_channels, out_channels, blocks, shortcut, hidden, act, negative_slope)
        super().__init__(graph, eps=eps, momentum=momentum, recompute=recompute)
