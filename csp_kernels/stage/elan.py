"""The efficient layer aggregation network's block (YOLOv7, arXiv 2207.02696, Fig. 2c; ELAN, arXiv 2211.04800)."""

from __future__ import annotations

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.c3 import NAMES
from csp_kernels.stage.graph import Graph


def elan(
    in_channels: int, out_channels: int, hidden: int, mid: int, blocks: int = 2, depth: int = 2, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """a = cv1(x), b0 = cv2(x), [hidden] both; b(i+1) = `depth` 3x3 of `mid` channels behind bi; y = cv3 of all that,
    the last first as YOLOv7's files list them: [b(blocks), ..., b0, a]. Parameters: cv1.conv, cv1.bn, cv2.*,
    m.{i}.{j}.*, cv3.*."""
    build = Builder(in_channels)
    x = build.read(0)
    parts = [conv_norm(build, [x], hidden, 1, act, slope, prefix=f"cv{i}.", names=NAMES) for i in (1, 2)]
    for i in range(blocks):
        y = parts[-1]
        for j in range(depth):
            y = conv_norm(build, [y], mid, 3, act, slope, prefix=f"m.{i}.{j}.", names=NAMES)
        parts.append(y)
    build.write([conv_norm(build, parts[::-1], out_channels, 1, act, slope, prefix="cv3.", names=NAMES)])
    return build.graph()
