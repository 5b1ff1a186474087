"""Functional operators, backed by torch.ops.csp_kernels.*"""

from csp_kernels.ops.dense_block import dense_block

__all__ = ["dense_block"]
