"""Fused, concat-free, memory-efficient operators for DenseNets and Cross Stage Partial networks."""

import warnings

from csp_kernels import layers, native, ops, reference
from csp_kernels.backends import backends, use_backend
from csp_kernels.layers import DenseBlock, Transition

__version__ = "0.1.0"
__all__ = ["DenseBlock", "Transition", "__version__", "backends", "layers", "ops", "reference", "use_backend"]

if not native.available():
    warnings.warn(f"csp_kernels runs its plain PyTorch reference: {native.why_not()}", RuntimeWarning, stacklevel=2)
