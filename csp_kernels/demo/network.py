"""The demo's networks, from `csp_kernels.models`: fused, and naive from the plain PyTorch twins of the same layers."""

from __future__ import annotations

import torch
from torch import nn

import csp_kernels as csp

NETWORKS = ("densenet", "csp_densenet", "peleenet", "csp_peleenet")
KINDS = ("fused", "naive")


def build(network: str, kind: str, seed: int) -> csp.models.Network:
    """[N, 1, 28, 28] -> logits [N, 10], channels_last; the weights depend on network and seed alone."""
    for name, value, choices in (("network", network, NETWORKS), ("kind", kind, KINDS)):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    model: csp.models.Network = getattr(csp.models, f"{network}_digits")()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # torch's initialisation: the start of earlier demos
            module.reset_parameters()
        if kind == "naive":
            _make_twin(module)
    return model.to(memory_format=torch.channels_last)


def _make_twin(module: nn.Module) -> None:
    """Makes a fused layer its plain PyTorch twin, in place: the same parameters and state_dict keys."""
    name = type(module).__name__
    if type(module) is getattr(csp.layers, name, None):
        module.__class__ = getattr(csp.reference, name)
