"""Plain PyTorch twins of the layers and operators: naive concatenation, any dtype, any device."""

from csp_kernels.reference.concat_conv import ConcatConv, concat_conv
from csp_kernels.reference.csp_residual_stage import CSPStage
from csp_kernels.reference.csp_stage import CSPDenseStage, csp_stage
from csp_kernels.reference.dense_block import DenseBlock, DenseLayer, dense_block
from csp_kernels.reference.partial_transition import PartialTransition, partial_transition
from csp_kernels.reference.post_dense_block import PostDenseBlock, post_dense_block
from csp_kernels.reference.transition import Transition
from csp_kernels.reference.two_way_dense_block import TwoWayDenseBlock, two_way_dense_block

__all__ = [
    "CSPDenseStage",
    "CSPStage",
    "ConcatConv",
    "DenseBlock",
    "DenseLayer",
    "PartialTransition",
    "PostDenseBlock",
    "Transition",
    "TwoWayDenseBlock",
    "concat_conv",
    "csp_stage",
    "dense_block",
    "partial_transition",
    "post_dense_block",
    "two_way_dense_block",
]
