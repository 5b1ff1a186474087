"""Functional operators, backed by torch.ops.csp_kernels.*"""

from csp_kernels.ops import flops as flops
from csp_kernels.ops.concat_conv import concat_conv
from csp_kernels.ops.csp_stage import csp_stage
from csp_kernels.ops.dense_block import dense_block
from csp_kernels.ops.partial_transition import partial_transition
from csp_kernels.ops.post_dense_block import post_dense_block
from csp_kernels.ops.stage import stage
from csp_kernels.ops.two_way_dense_block import two_way_dense_block

__all__ = [
    "concat_conv",
    "csp_stage",
    "dense_block",
    "partial_transition",
    "post_dense_block",
    "stage",
    "two_way_dense_block",
]
