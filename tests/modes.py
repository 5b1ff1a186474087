"""What nn.BatchNorm2d can be asked for, and the comparison of a layer with its naive twin over three steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import csp_kernels as csp

Inputs = Callable[[int], Sequence[Tensor]]  # batch size -> random arguments of the layer


def norms(block: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in block.modules() if isinstance(m, nn.BatchNorm2d))


def set_norms(**attributes: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for norm in norms(block):
            for name, value in attributes.items():
                setattr(norm, name, value)

    return change


def untracked(block: nn.Module) -> None:
    """As built with track_running_stats=False: no buffers, batch statistics even in eval mode."""
    set_norms(track_running_stats=False, running_mean=None, running_var=None, num_batches_tracked=None)(block)


def some_frozen(block: nn.Module) -> None:
    for i, norm in enumerate(norms(block)):
        norm.train(i % 3 != 1)


def different_norms(block: nn.Module) -> None:
    for i, norm in enumerate(norms(block)):
        norm.momentum, norm.eps = (0.1, 0.3, None)[i % 3], (1e-5, 1e-3)[i % 2]


MODES: dict[str, Callable[[nn.Module], Any]] = {
    "train": lambda block: block.train(),
    "eval": lambda block: block.eval(),
    "frozen norms": lambda block: [norm.eval() for norm in norms(block)],
    "some frozen": some_frozen,
    "momentum None": set_norms(momentum=None),
    "momentum 0.7": set_norms(momentum=0.7),
    "different norms": different_norms,
    "no affine": set_norms(weight=None, bias=None),
    "untracked": untracked,
    "untracked eval": lambda block: (untracked(block), block.eval()),
    "tracking switched off": set_norms(track_running_stats=False),
    "no counter": set_norms(num_batches_tracked=None),
    "frozen parameters": lambda block: [p.requires_grad_(False) for p in block.parameters()],
}


def outputs(module: nn.Module, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    y = module(*inputs)
    return [y] if isinstance(y, Tensor) else list(y)


@torch.no_grad()
def random_norms(module: nn.Module) -> None:
    """No parameter or running statistic of a norm is like another, none the identity's."""
    for norm in norms(module):
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.3)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 1.5)


def twins(ours: nn.Module, naive: nn.Module, change: Callable[[nn.Module], Any] = lambda module: None) -> None:
    """Both in float64 with the same random norms, both changed the same way; the same keys."""
    assert list(ours.state_dict()) == list(naive.state_dict())
    random_norms(ours)
    naive.load_state_dict(ours.state_dict())
    for module in (ours, naive):
        change(module.double())


def check_three_steps(ours: nn.Module, naive: nn.Module, inputs: Inputs) -> None:
    """Outputs, gradients, running statistics and counters."""
    for step in range(3):
        given = inputs(2 + step)
        mine, theirs = ([None if t is None else t.clone().requires_grad_() for t in given] for _ in range(2))
        for y, expected in zip(outputs(ours, mine), outputs(naive, theirs), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
            grad = torch.randn_like(y)
            y.backward(grad, retain_graph=True)
            expected.backward(grad, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    for (name, p), other in zip(ours.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    check_same_state(ours, naive)


def check_same_state(ours: nn.Module, naive: nn.Module) -> None:
    assert list(ours.state_dict()) == list(naive.state_dict())
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_compiled(eager: nn.Module, inputs: Inputs) -> None:
    """One graph for any batch size; the same outputs, gradients and running statistics. inputs in float64."""
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    counters.clear()
    for n in (3, 2, 5):
        given = inputs(n)
        mine, theirs = ([None if t is None else t.clone().requires_grad_() for t in given] for _ in range(2))
        results, expected = outputs(compiled, mine), outputs(eager, theirs)
        for y, other in zip(results, expected, strict=True):
            torch.testing.assert_close(y, other, rtol=1e-11, atol=1e-11)
            assert y.stride() == other.stride()
        sum(y.square().sum() for y in results).backward()
        sum(y.square().sum() for y in expected).backward()
        for a, b in zip(mine, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for p, other in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-10, atol=1e-10)
    check_same_state(module, eager)


def check_state_survives(module: nn.Module, error: type[Exception], message: str, arguments: Sequence[Any]) -> None:
    """A call that raises leaves running statistics and counters alone."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        module(*arguments)
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name


def check_fallback(ours: nn.Module, naive: nn.Module, arguments: Sequence[Any], message: str) -> None:
    """Children that the operator cannot stand for: RuntimeError under "native", else the reference and a warning."""
    with pytest.raises(RuntimeError, match=f"backend 'native': {message}"):
        ours(*arguments)
    csp.use_backend("auto")
    with pytest.warns(RuntimeWarning, match=f"csp.{type(ours).__name__} runs its plain .*: {message}") as caught:
        for _ in range(2):
            results = outputs(ours, arguments)
    assert len(caught) == 1
    for _ in range(2):
        expected = outputs(naive, arguments)
    for y, other in zip(results, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)
