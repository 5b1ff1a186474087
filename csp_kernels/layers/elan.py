"""YOLOv7's ELAN as a module, run as one operator."""

from __future__ import annotations

from csp_kernels.layers.stage import Stage
from csp_kernels.stage.elan import elan


class ELAN(Stage):
    """Efficient layer aggregation of YOLOv7: [N, in_channels, H, W] -> [N, out_channels, H, W].

    arXiv 2207.02696, Fig. 2c. a = cv1(x) and b0 = cv2(x) are 1x1 convolutions of `hidden` channels; b(i+1) are `depth`
    3x3 of mid_channels behind bi, `blocks` times; cv3 is a 1x1 over [b(blocks), ..., b0, a] side by side; batch norm
    and `act` behind every convolution. Children: cv1, cv2, cv3, m.{i}.{j}, each with conv and bn (eps 1e-3, momentum
    0.03, as YOLOv7 has them). How it runs, `recompute`, dtypes and errors: `csp.Stage`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, mid_channels: int, blocks: int = 2, depth: int = 2, *,
        act: str = "silu", negative_slope: float = 0.1, eps: float = 1e-3, momentum: float = 0.03,
        recompute: str = "none",
    ) -> None:  # fmt: skip
        graph = elan(in_channels, out_channels, hidden, mid_channels, blocks, depth, act, negative_slope)
        super().__init__(graph, eps=eps, momentum=momentum, recompute=recompute)
