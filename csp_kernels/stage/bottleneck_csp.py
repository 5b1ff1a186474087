"""The first cross stage partial block of YOLOv4 and YOLOv5 (ultralytics' BottleneckCSP)."""

from __future__ import annotations

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.c3 import NAMES, add_bottleneck
from csp_kernels.stage.graph import Graph, Read


def bottleneck_csp(
    in_channels: int, out_channels: int, blocks: int = 1, shortcut: bool = True, hidden: int = 0, act: str = "silu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """y = cv4(act(bn([cv3(m(cv1(x))), cv2(x)]))): cv2 and cv3 are bare 1x1, which one norm follows; m: `blocks`
    bottlenecks of a 1x1 and a 3x3. Parameters: cv1.conv, cv1.bn, m.{i}.cv1.*, m.{i}.cv2.*, cv3, cv2, bn, cv4.*."""
    build = Builder(in_channels)
    x, hidden = build.read(0), hidden or out_channels // 2
    y = conv_norm(build, [x], hidden, 1, act, slope, prefix="cv1.", names=NAMES)
    for i in range(blocks):
        y = add_bottleneck(build, y, (1, 3), shortcut, act, slope, f"m.{i}.")
    values = build.conv([y], hidden, name="cv3"), build.conv([x], hidden, name="cv2")
    norm = build.norm(2 * hidden, "bn")
    joined = [Read(value, 0, hidden, norm, i * hidden, act, slope) for i, value in enumerate(values)]
    build.write([conv_norm(build, joined, out_channels, 1, act, slope, prefix="cv4.", names=NAMES)])
    return build.graph()
