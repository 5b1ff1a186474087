"""Plain PyTorch twins of the layers and operators: naive concatenation, any dtype, any device."""

from csp_kernels.reference.dense_block import DenseBlock, DenseLayer, dense_block
from csp_kernels.reference.transition import Transition

__all__ = ["DenseBlock", "DenseLayer", "Transition", "dense_block"]
