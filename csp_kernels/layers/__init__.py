"""Modules: drop-in layers over the fused operators."""

from csp_kernels.layers.dense_block import DenseBlock
from csp_kernels.layers.transition import Transition

__all__ = ["DenseBlock", "Transition"]
