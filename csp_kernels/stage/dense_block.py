"""Dense layers of DenseNet-BC (arXiv 1608.06993, section 3): batch norm, ReLU, 1x1, batch norm, ReLU, 3x3."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, through_norm
from csp_kernels.stage.graph import Graph, Read


def dense_block(num_layers: int, in_channels: int, growth_rate: int, bottleneck: int, drop_rate: float = 0.0) -> Graph:
    """x [in_channels] -> y [in_channels + num_layers * growth_rate]; bottleneck: channels of each 1x1."""
    build = Builder(in_channels)
    features = add_dense_layers(build, [build.read(0)], num_layers, growth_rate, bottleneck, drop_rate)
    build.write(features)
    return build.graph()


def add_dense_layers(
    build: Builder, features: Sequence[Read], num_layers: int, growth_rate: int, bottleneck: int,
    drop_rate: float = 0.0, prefix: str = "",
) -> list[Read]:  # fmt: skip
    """The features and what each layer adds, side by side, raw."""
    features = list(features)
    for i in range(1, num_layers + 1):
        name = f"{prefix}denselayer{i}"
        z = build.conv(through_norm(build, features, name=f"{name}.norm1"), bottleneck, name=f"{name}.conv1")
        bottleneck_reads = through_norm(build, [build.read(z)], name=f"{name}.norm2")
        grown = build.conv(bottleneck_reads, growth_rate, 3, drop_rate=drop_rate, name=f"{name}.conv2")
        features.append(build.read(grown))
    return features
