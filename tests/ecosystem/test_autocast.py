"""Mixed precision, as training loops use it: autocast, nested autocast, GradScaler, half() and bfloat16()."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from modes import norms, outputs
from tolerances import error, limit
from torch import Tensor, nn

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")

SIZE = 3, 6, 8  # N, H, W
REDUCTION = 9 * 24
LAYERS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {  # class, arguments, input channels
    "DenseBlock": ("DenseBlock", (2, 10, 6), {}, (10,)),
    "DenseBlock, lean": ("DenseBlock", (2, 10, 6), {"recompute": "bottleneck"}, (10,)),
    "PostDenseBlock": ("PostDenseBlock", (2, 10, 6), {}, (10,)),
    "TwoWayDenseBlock": ("TwoWayDenseBlock", (2, 10, 6), {"bottleneck_width": 2}, (10,)),
    "Transition": ("Transition", (10, 6), {}, (10,)),
    "ConcatConv": ("ConcatConv", ([10, 6], 9), {}, (10, 6)),
    "ConcatConv, fork": ("ConcatConv", ([10], [4, 6]), {"act": "silu"}, (10,)),
    "PartialTransition": ("PartialTransition", (6, 10, 8, 12), {}, (6, 10)),
    "PartialTransition, last": ("PartialTransition", (6, 10, 8, 14), {"fusion": "last", "order": "pre"}, (6, 10)),
    "CSPDenseStage": ("CSPDenseStage", (12, 10, 2, 6), {}, (12,)),
    "CSPDenseStage, last": ("CSPDenseStage", (12, 10, 2, 6), {"layer": "post", "fusion": "last"}, (12,)),
    "CSPDenseStage, two-way": ("CSPDenseStage", (12, 10, 2, 6), {"layer": "two_way", "bn_size": 2}, (12,)),
}
HALVES = [torch.bfloat16, torch.float16]


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The layer and its plain twin with the same parameters, whose biases keep every ReLU away from zero."""
    kind, arguments, options, _ = LAYERS[name]
    naive_options = {key: value for key, value in options.items() if (kind, key) != ("DenseBlock", "recompute")}
    ours, naive = getattr(csp, kind)(*arguments, **options), getattr(csp.reference, kind)(*arguments, **naive_options)
    with torch.no_grad():
        for norm in norms(ours):
            norm.weight.uniform_(0.25, 0.75)
            norm.bias.copy_(torch.where(torch.arange(len(norm.bias)) % 4 == 0, -4.0, 4.0))
    naive.load_state_dict(ours.state_dict())
    return ours, naive


def images(name: str) -> list[Tensor]:
    n, h, w = SIZE
    return [torch.randn(n, c, h, w) for c in LAYERS[name][3]]


def call(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return outputs(module, [list(inputs)] if isinstance(module, csp.reference.ConcatConv) else inputs)


Results = dict[str, Tensor]


def step(module: nn.Module, inputs: Sequence[Tensor], forward: Callable[..., list[Tensor]] = call) -> Results:
    """Outputs, gradients and running statistics of one step."""
    module, leaves = copy.deepcopy(module), [x.detach().clone().requires_grad_() for x in inputs]
    results = forward(module, leaves)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
    torch.autograd.backward(results, given)
    named = {f"y{i}": y.detach() for i, y in enumerate(results)}
    named |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    named |= {f"grad x{i}": x.grad for i, x in enumerate(leaves)}
    return named | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def autocast(dtype: torch.dtype) -> Callable[..., list[Tensor]]:
    def forward(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return call(module, inputs)

    return forward


def pooled(got: Results, exact: Results, prefix: str) -> float:
    """Error of all tensors of this kind together."""
    names = [name for name in exact if name.startswith(prefix)]
    scale = sum(exact[name].double().square().sum() for name in names).sqrt().item()
    return sum(error(got[name], exact[name], scale) ** 2 for name in names) ** 0.5


def check_accuracy(runs: Sequence[tuple[Results, Results, Results]], dtype: torch.dtype) -> None:
    """(ours, naive, exact) of several seeds: as near to float64 as plain PyTorch in the same precision."""
    for prefix in ("y", "grad", ""):
        ours, naive = (statistics.median(pooled(run[i], run[2], prefix) for run in runs) for i in (0, 1))
        assert ours <= limit(naive, dtype, REDUCTION), f"{prefix or 'all'}: error {ours:.1e}, naive {naive:.1e}"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name: str, training: bool, dtype: torch.dtype) -> None:
    """The output has autocast's dtype, whatever x has; gradients and statistics stay float32. As accurate as plain."""
    runs = []
    for seed in range(3):
        torch.manual_seed(seed)
        (ours, naive), inputs = twins(name), images(name)
        ours.train(training), naive.train(training)
        got, plain = (step(module, inputs, autocast(dtype)) for module in (ours, naive))
        exact = step(naive.double(), [x.double() for x in inputs])
        for key, value in got.items():
            assert value.dtype == (dtype if key.startswith("y") else torch.float32), key
            assert value.isfinite().all(), key
        runs.append((got, plain, exact))
    check_accuracy(runs, dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_reference_backend_returns_the_same_dtypes(name: str) -> None:
    """The choice of a backend changes no dtype."""
    (ours, _), inputs = twins(name), images(name)
    native = step(ours, inputs, autocast(torch.bfloat16))
    csp.use_backend("reference")
    assert {k: v.dtype for k, v in step(ours, inputs, autocast(torch.bfloat16)).items()} == {
        k: v.dtype for k, v in native.items()
    }


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_off_inside_autocast(name: str) -> None:
    """Bit for bit what runs without autocast; float64 is left alone."""
    (ours, _), inputs = twins(name), images(name)

    def disabled(module: nn.Module, given: Sequence[Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
            return call(module, given)

    plain, got = step(ours, inputs), step(ours, inputs, disabled)
    assert plain["y0"].dtype == torch.float32
    assert all(torch.equal(got[key], value) for key, value in plain.items())
    if name != "Transition":  # made of PyTorch's own operators: their rule
        wide = step(ours.double(), [x.double() for x in inputs], autocast(torch.bfloat16))
        assert all(value.dtype == torch.float64 for value in wide.values())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAYERS)
def test_half_modules(name: str, dtype: torch.dtype) -> None:
    """module.half() and module.bfloat16(): every dtype follows, as accurate as the plain module in that dtype."""
    runs = []
    for seed in range(3):
        torch.manual_seed(seed)
        (ours, naive), inputs = twins(name), images(name)
        low = [x.to(dtype) for x in inputs]
        got, plain = (step(module.to(dtype), low) for module in (ours, naive))
        exact = step(naive.double(), [x.double() for x in low])
        assert all(value.dtype == dtype and value.isfinite().all() for value in got.values())
        runs.append((got, plain, exact))
    check_accuracy(runs, dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_grad_scaler(name: str) -> None:
    """float16 under a GradScaler: unscaled gradients are those without; an overflow skips the step and backs off."""
    (module, _), inputs = twins(name), images(name)
    expected = step(module, inputs, autocast(torch.float16))
    optimizer, scaler = torch.optim.SGD(module.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)

    def backward(scale: float) -> None:
        results = autocast(torch.float16)(module, inputs)
        generator = torch.Generator().manual_seed(1)
        losses = [(y.float() * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in results]
        scaler.scale(sum(losses) * scale).backward()

    backward(1.0)
    scaler.unscale_(optimizer)
    grads = {f"grad {key}": p.grad for key, p in module.named_parameters()}
    assert pooled(grads, {key: expected[key] for key in grads}, "grad") < limit(0, torch.float16, REDUCTION)
    before = copy.deepcopy(list(module.parameters()))
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    optimizer.zero_grad()
    before = copy.deepcopy(list(module.parameters()))
    backward(1e6)  # 64e6 is beyond float16
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
