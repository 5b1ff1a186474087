"""Fused, concat-free, memory-efficient operators for DenseNets and Cross Stage Partial networks."""

import warnings

from csp_kernels import analysis, layers, models, native, ops, reference
from csp_kernels.backends import backends, use_backend
from csp_kernels.explain import explain
from csp_kernels.fusion import fuse, fused, unfuse
from csp_kernels.layers import (
    C3,
    ELAN,
    C2f,
    ConcatConv,
    CSPDenseStage,
    CSPStage,
    DenseBlock,
    OSABlock,
    PartialTransition,
    PostDenseBlock,
    Stage,
    Transition,
    TwoWayDenseBlock,
)
from csp_kernels.native import empty_cache
from csp_kernels.verify import check

__version__ = "0.1.0"
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
    "__version__",
    "analysis",
    "backends",
    "check",
    "empty_cache",
    "explain",
    "fuse",
    "fused",
    "layers",
    "models",
    "ops",
    "reference",
    "unfuse",
    "use_backend",
]

if not native.available():
    warnings.warn(f"csp_kernels runs its plain PyTorch reference: {native.why_not()}", RuntimeWarning, stacklevel=2)
