"""YOLOv8's C2f as a module, run as one operator."""

from __future__ import annotations

from csp_kernels.layers.stage import Stage
from csp_kernels.stage.c2f import c2f


class C2f(Stage):
    """Cross stage partial block of YOLOv8: [N, in_channels, H, W] -> [N, out_channels, H, W].

    cv2 of [a, b, m0(b), m1(m0(b)), ...] side by side, a and b the halves of cv1(x): cv1 and cv2 are 1x1 convolutions,
    each of the `blocks` bottlenecks is two 3x3, with or without a shortcut; batch norm and `act` behind every
    convolution. hidden: channels of a half, by default half of out_channels. Children and defaults are those of
    ultralytics: cv1, cv2, m.{i}.cv1, m.{i}.cv2, each with conv and bn (eps 1e-3, momentum 0.03). How it runs,
    `recompute`, dtypes and errors: `csp.Stage`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = False, *, hidden: int = 0,
        act: str = "silu", negative_slope: float = 0.1, eps: float = 1e-3, momentum: float = 0.03,
        recompute: str = "none",
    ) -> None:  # fmt: skip
        graph = c2f(in_channels, out_channels, blocks, shortcut, hidden, act, negative_slope)
        super().__init__(graph, eps=eps, momentum=momentum, recompute=recompute)
