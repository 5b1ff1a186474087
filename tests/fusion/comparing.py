"""A network and its fused copy, a step of both, and whether they computed the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import networks
import torch
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import ops


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, csp.fusion.Report]:
    """A network and a fused copy, in float64, with norms that differ from how they begin."""
    torch.manual_seed(0)
    plain = make().double()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    ours = copy.deepcopy(plain)
    return plain, ours, csp.fuse(ours)


def step(module: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Outputs, gradients, state; seeded for dropout."""
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    outputs = networks.tensors(module(leaf))
    loss: Any = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs)
    (loss * 0.01).backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {"input": leaf.grad}
    found |= {f"{n} gradient": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    if optimizer is not None:
        optimizer.step()
    return found | {n: t.clone() for n, t in module.state_dict().items()}


def compare(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(t.abs().max().item() for n, t in expected.items() if "gradient" in n or n == "input")
    for name, t in expected.items():
        if name not in got:
            assert not t.any(), name
            continue
        torch.testing.assert_close(
            got[name], t, rtol=1e-9, atol=1e-10 * max(1.0, scale), msg=lambda m, n=name: f"{n}: {m}"
        )


def image(channels: int = 8, size: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, channels, size, size + 1, dtype=torch.float64, generator=generator)


def calls(run: Callable[[], Any]) -> int:
    """How often the operator of stages ran."""
    count, original = 0, ops.stage

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    ops.stage = counting
    try:
        run()
    finally:
        ops.stage = original
    return count
