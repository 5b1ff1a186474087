"""PeleeNet's two-way dense layers (arXiv 1804.06882, section 2): one 3x3 on one branch, two on the other."""

from __future__ import annotations

from collections.abc import Sequence

from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph, Read

BRANCHES = (("branch1", 1), ("branch2", 2))  # and their 3x3 convolutions


def two_way_dense_block(in_channels: int, growth_rate: int, bottlenecks: Sequence[int]) -> Graph:
    """x [in_channels] -> y [in_channels + layers * growth_rate]; bottlenecks: channels of each layer's two 1x1.

    growth_rate is even: half of it comes from each branch.
    """
    build = Builder(in_channels)
    build.write(add_two_way_dense_layers(build, [build.read(0)], growth_rate, bottlenecks))
    return build.graph()


def add_two_way_dense_layers(
    build: Builder, features: Sequence[Read], growth_rate: int, bottlenecks: Sequence[int], prefix: str = ""
) -> list[Read]:
    """The features and what each layer adds, side by side, normalised and activated."""
    features = list(features)
    for i, bottleneck in enumerate(bottlenecks, 1):
        grown = []
        for branch, depth in BRANCHES:
            name = f"{prefix}denselayer{i}.{branch}."
            last = conv_norm(build, features, bottleneck, prefix=name, names=("conv1", "norm1"))
            for k in range(2, 2 + depth):
                last = conv_norm(build, [last], growth_rate // 2, 3, prefix=name, names=(f"conv{k}", f"norm{k}"))
            grown.append(last)
        features += grown
    return features
