"""Spatial pyramid pooling, fast: maxima of maxima beside what they are of (YOLOv5 to YOLO26's SPPF, ultralytics)."""

from __future__ import annotations

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.c3 import NAMES
from csp_kernels.stage.graph import Graph


def sppf(
    in_channels: int, out_channels: int, size: int = 5, pools: int = 3, shortcut: bool = False, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """y0 = cv1(x), half of in_channels; y(i+1) the maximum of yi over size x size pixels, `pools` times; cv2 of all of
    them; with a shortcut x is added. Parameters: cv1.conv, cv1.bn, cv2.*."""
    build = Builder(in_channels)
    x = build.read(0)
    parts = [conv_norm(build, [x], in_channels // 2, 1, act, slope, prefix="cv1.", names=NAMES)]
    for _ in range(pools):
        parts.append(build.read(build.max_pool(parts[-1], size)))
    y = conv_norm(build, parts, out_channels, 1, act, slope, prefix="cv2.", names=NAMES)
    build.write([build.read(build.sum([y, x])) if shortcut else y])
    return build.graph()
