"""Dense layers in the order 1x1, batch norm, ReLU, 3x3, batch norm, ReLU (arXiv 1911.11929, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph, Read


def post_dense_block(in_channels: int, growth_rate: int, bottlenecks: Sequence[int]) -> Graph:
    """x [in_channels] -> y [in_channels + layers * growth_rate]; bottlenecks: channels of each layer's 1x1."""
    build = Builder(in_channels)
    build.write(add_post_dense_layers(build, [build.read(0)], growth_rate, bottlenecks))
    return build.graph()


def add_post_dense_layers(
    build: Builder, features: Sequence[Read], growth_rate: int, bottlenecks: Sequence[int], prefix: str = ""
) -> list[Read]:
    """The features and what each layer adds, side by side, normalised and activated."""
    features = list(features)
    for i, bottleneck in enumerate(bottlenecks, 1):
        name = f"{prefix}denselayer{i}."
        z = conv_norm(build, features, bottleneck, prefix=name, names=("conv1", "norm1"))
        features.append(conv_norm(build, [z], growth_rate, 3, prefix=name, names=("conv2", "norm2")))
    return features
