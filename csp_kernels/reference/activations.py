"""The activations of the vocabulary: as functions and as modules."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from csp_kernels.vocabulary import ACTIVATIONS

# act(x, slope), slope: of leaky_relu for negative numbers; others ignore it.
FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, slope: F.silu(x),
    "mish": lambda x, slope: F.mish(x),
    "hardswish": lambda x, slope: F.hardswish(x),
    "relu6": lambda x, slope: F.relu6(x),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
}
MODULES: dict[str, Callable[[float], nn.Module]] = {
    "identity": lambda slope: nn.Identity(),
    "relu": lambda slope: nn.ReLU(inplace=True),
    "leaky_relu": lambda slope: nn.LeakyReLU(slope, inplace=True),
    "silu": lambda slope: nn.SiLU(),
    "mish": lambda slope: nn.Mish(),
    "hardswish": lambda slope: nn.Hardswish(),
    "relu6": lambda slope: nn.ReLU6(inplace=True),
    "gelu": lambda slope: nn.GELU(),
    "gelu_tanh": lambda slope: nn.GELU(approximate="tanh"),
}


def activation(act: str, negative_slope: float) -> nn.Module:
    """The activation as a module. Raises ValueError for an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act: got {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return MODULES[act](negative_slope)
