"""The block of one-shot aggregation (VoVNet, arXiv 1904.09730, Fig. 2; with a shortcut arXiv 1911.06667, Fig. 3)."""

from __future__ import annotations

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph


def osa_block(
    in_channels: int, mid: int, out_channels: int, layers: int = 5, shortcut: bool = False, act: str = "relu",
    slope: float = 0.0,
) -> Graph:  # fmt: skip
    """x, then a chain of `layers` 3x3 convolutions of `mid` channels; all of them joined by one 1x1; with a shortcut x
    is added to that. Parameters, as timm names them: conv_mid.{i}.conv, conv_mid.{i}.bn, conv_concat.*."""
    build = Builder(in_channels)
    x = build.read(0)
    features, names = [x], ("conv", "bn")
    for i in range(layers):
        read = conv_norm(build, [features[-1]], mid, 3, act, slope, prefix=f"conv_mid.{i}.", names=names)
        features.append(read)
    y = conv_norm(build, features, out_channels, 1, act, slope, prefix="conv_concat.", names=names)
    build.write([build.read(build.sum([y, x])) if shortcut else y])
    return build.graph()
