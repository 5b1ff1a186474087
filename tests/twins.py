"""All layers with their naive twins, for tests of what other packages do to modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from modes import random_norms
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.layers import _children

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(csp.layers, name): getattr(csp.reference, name)
    for name in csp.layers.__all__
    if hasattr(csp.reference, name)
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: csp.DenseBlock(2, 8, 4, 2),
    "dense bottleneck": lambda: csp.DenseBlock(2, 8, 4, 2, recompute="bottleneck"),
    "post": lambda: csp.PostDenseBlock(2, 8, 4, 2),
    "two_way": lambda: csp.TwoWayDenseBlock(2, 8, 8),
    "transition": lambda: csp.Transition(8, 6),
    "join": lambda: csp.ConcatConv([8, 4], 6, act="silu"),
    "fork": lambda: csp.ConcatConv(8, [4, 6], act="mish"),
    "partial post": lambda: csp.PartialTransition(4, 8, 6, 10),
    "partial pre": lambda: csp.PartialTransition(4, 8, 6, 10, order="pre"),
    "stage pre": lambda: csp.CSPDenseStage(8, 12, 2, 4, 2),
    "stage post": lambda: csp.CSPDenseStage(8, 12, 2, 4, 2, layer="post", fusion="first"),
    "stage two_way": lambda: csp.CSPDenseStage(8, 12, 2, 8, 1, layer="two_way", fusion="last"),
    "residual conv": lambda: csp.CSPStage(8, 12, 1),
    "residual slice": lambda: csp.CSPStage(8, 12, 1, split="slice", part_channels=3, width=6),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "csp_peleenet_digits": csp.models.csp_peleenet_digits,
    "densenet_digits": csp.models.densenet_digits,
}
ALL = {**LAYERS, **NETWORKS}


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With random norms, so that no batch statistic or parameter is like another."""
    module = ALL[name]()
    random_norms(module)
    return module.to(dtype)


def plain(module: nn.Module) -> nn.Module:
    """A copy that calls its children: every fused layer replaced by its twin, hooks and all."""
    other = copy.deepcopy(module)
    for m in other.modules():
        m.__class__ = TWINS.get(type(m), type(m))
    assert not any(isinstance(m, _children.Fused) for m in other.modules())
    return other


def inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Random arguments of forward."""
    if name in NETWORKS:
        return [torch.randn(batch, 1, 28, 28, dtype=dtype)]
    x, y = torch.randn(batch, 8, 6, 5, dtype=dtype), torch.randn(batch, 4, 6, 5, dtype=dtype)
    return {"join": [[x, y]], "partial post": [y, x], "partial pre": [y, x]}.get(name, [x])


def tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [t for v in values for t in tensors(v)]


def step(module: nn.Module, arguments: Sequence[Any], seed: int = 0) -> dict[str, Tensor]:
    """One training step without an optimiser: outputs, gradients of inputs and parameters, buffers."""
    torch.manual_seed(seed)
    leaves = [t.detach().clone().requires_grad_() for t in tensors(arguments)]
    rest = iter(leaves)
    given = [next(rest) if isinstance(a, Tensor) else [next(rest) for _ in a] for a in arguments]
    module.zero_grad()
    outputs = tensors(module(*given))
    sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs).backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"grad of input {i}": t.grad for i, t in enumerate(leaves)}
    results |= {f"grad of {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return results | {n: b.clone() for n, b in module.named_buffers()}


def check_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
