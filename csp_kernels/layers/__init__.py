"""Modules: drop-in layers over the fused operators."""

from csp_kernels.layers.c2f import C2f
from csp_kernels.layers.c3 import C3
from csp_kernels.layers.concat_conv import ConcatConv
from csp_kernels.layers.csp_dense_stage import CSPDenseStage
from csp_kernels.layers.csp_residual_stage import CSPStage
from csp_kernels.layers.dense_block import DenseBlock
from csp_kernels.layers.elan import ELAN
from csp_kernels.layers.osa_block import OSABlock
from csp_kernels.layers.partial_transition import PartialTransition
from csp_kernels.layers.post_dense_block import PostDenseBlock
from csp_kernels.layers.stage import Stage
from csp_kernels.layers.transition import Transition
from csp_kernels.layers.two_way_dense_block import TwoWayDenseBlock

__all__ = [
    "C3",
    "ELAN",
    "C2f",
    "CSPDenseStage",
    "CSPStage",
    "ConcatConv",
    "DenseBlock",
    "OSABlock",
    "PartialTransition",
    "PostDenseBlock",
    "Stage",
    "Transition",
    "TwoWayDenseBlock",
]
