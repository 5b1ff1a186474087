"""Autograd beyond one backward: checkpoints, hooks on saved tensors, second derivatives, changes in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ecosystem_layers import CHANNELS, LAYERS, WHERE, Fused, assert_same, every_layer, image, pair
from modes import norms
from torch import Tensor, nn
from torch.utils import checkpoint as ckpt

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")


def step(module: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Output, then the gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    y = run(module, x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    module.zero_grad()
    (y.sin() * weights).sum().backward()  # not grad(): a reentrant checkpoint refuses it
    leaves = [x, *module.parameters()]
    assert all(t.grad is not None for t in leaves)
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


# --- checkpoints ---


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return ckpt.checkpoint(module, x, use_reentrant=False)


def to_the_end(module: nn.Module, x: Tensor) -> Tensor:
    with ckpt.set_checkpoint_early_stop(False):
        return checkpointed(module, x)


def reentrant(module: nn.Module, x: Tensor) -> Tensor:
    return ckpt.checkpoint(module, x, use_reentrant=True)


def nested(module: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(lambda t: checkpointed(module[1], module[0](t)), x)


def selective(policy: ckpt.CheckpointPolicy, ops: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Policy for the ops whose name begins so, recomputing the rest, or the other way round."""
    other = ckpt.CheckpointPolicy.PREFER_RECOMPUTE

    def choose(ctx: Any, op: Any, *arguments: Any, **options: Any) -> ckpt.CheckpointPolicy:
        return policy if str(op).startswith(ops) else other

    def run(module: nn.Module, x: Tensor) -> Tensor:
        def contexts() -> Any:
            return ckpt.create_selective_checkpoint_contexts(choose)

        return ckpt.checkpoint(module, x, use_reentrant=False, context_fn=contexts)

    return run


CHECKPOINTS = {
    "early stop": checkpointed,
    "to the end": to_the_end,
    "reentrant": reentrant,
    "nested": nested,
    "save ours": selective(ckpt.CheckpointPolicy.MUST_SAVE, "csp_kernels"),
    "save convolutions": selective(ckpt.CheckpointPolicy.MUST_SAVE, "aten.conv"),
    "save all": selective(ckpt.CheckpointPolicy.PREFER_SAVE, ""),
    "recompute ours": selective(ckpt.CheckpointPolicy.MUST_RECOMPUTE, "csp_kernels"),
}


@every_layer
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpoints(name: str, how: str) -> None:
    ours, _ = pair(name)
    x = image()
    expected = step(copy.deepcopy(ours), x, plain)
    assert_same(step(ours, x, CHECKPOINTS[how]), expected, 1e-12)


@every_layer
@pytest.mark.parametrize("how", ["to the end", "reentrant"])
def test_recomputed_forward_advances_running_statistics_as_plain_norms_do(name: str, how: str) -> None:
    ours, naive = pair(name)
    x = image()
    for module in (ours, naive):
        step(module, x, CHECKPOINTS[how])
    assert_same(list(ours.state_dict().values()), list(naive.state_dict().values()))
    assert all(norm.num_batches_tracked == 2 for norm in norms(ours))


@pytest.mark.parametrize("how", ["early stop", "to the end", "reentrant", "save ours"])
def test_checkpoints_with_dropout(how: str) -> None:
    """The recomputation drops what forward dropped."""
    module = nn.Sequential(nn.Conv2d(3, 6, 1), csp.DenseBlock(2, 6, 4, 2, drop_rate=0.5)).double()
    x, results = image(), []
    for run in (plain, CHECKPOINTS[how]):
        torch.manual_seed(3)
        results.append(step(module, x, run))
    assert_same(results[1], results[0], 1e-12)


@pytest.mark.parametrize("name", ["csp_peleenet_digits", "densenet_digits"])
@pytest.mark.parametrize("segments", [2, 3])
def test_checkpoint_sequential_over_networks(name: str, segments: int) -> None:
    net = getattr(csp.models, name)().double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    children = nn.Sequential(*net.features.children()) if hasattr(net.features, "children") else nn.Sequential(net)
    expected = step(copy.deepcopy(children), x, plain)
    got = step(children, x, lambda m, t: ckpt.checkpoint_sequential(m, segments, t, use_reentrant=False))
    assert_same(got, expected, 1e-10)


# --- hooks on saved tensors ---


def through_numpy(t: Tensor) -> Any:
    return np.array(t.detach().numpy(), order="C")


def column_major(t: Tensor) -> Tensor:
    """Every stride as it never is."""
    return t.detach().permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def strided(t: Tensor) -> Tensor:
    """Every second element of a buffer of NaN."""
    wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype) if t.is_floating_point() else t.new_ones(*t.shape, 2)
    wide[..., 0] = t.detach()
    return wide[..., 0]


HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "numpy": (through_numpy, torch.from_numpy),
    "fresh memory": (lambda t: t.detach(), lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t)),
    "column-major": (column_major, lambda t: t),
    "strided": (strided, lambda t: t),
    "clone": (lambda t: t.detach().clone(), lambda t: t),
}


@every_layer
@pytest.mark.parametrize("kind", HOOKS)
def test_saved_tensors_with_other_strides(name: str, kind: str) -> None:
    ours, _ = pair(name, lambda m: [n.eval() for i, n in enumerate(norms(m)) if i % 2])
    x = image().to(memory_format=torch.channels_last)

    def hooked(module: nn.Module, t: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(*HOOKS[kind]):
            return module(t)

    assert_same(step(ours, x, hooked), step(ours, x, plain), 1e-13)


# --- second derivatives ---


def partly_frozen(module: nn.Module) -> None:
    for i, norm in enumerate(norms(module)):
        norm.train(bool(i % 2))


MODES: dict[str, Callable[[nn.Module], Any]] = {
    "train": nn.Module.train,
    "eval": nn.Module.eval,
    "mixed": partly_frozen,
}


def penalty(module: nn.Module, x: Tensor) -> list[Tensor]:
    """A step of WGAN-GP and R1: gradients of the output's mean plus the gradient's norm."""
    x = x.detach().requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    loss = y.square().mean() + (gradient.flatten(1).norm(dim=1) - 1).square().sum() + gradient.square().sum()
    return [gradient.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]


@every_layer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_gradient_penalty(name: str, mode: str, memory_format: torch.memory_format) -> None:
    ours, naive = pair(name, MODES[mode])
    x = image().to(memory_format=memory_format)
    assert_same(penalty(ours, x), penalty(naive, x))
    assert_same(list(ours.state_dict().values()), list(naive.state_dict().values()))


@every_layer
def test_second_derivatives_of_inputs_and_parameters(name: str) -> None:
    """gradgradcheck of x, every parameter and the output's gradient."""
    module = Fused(LAYERS[name](csp)).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, *params: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, params, strict=True)), x)

    x = torch.randn(2, CHANNELS, 2, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(v.detach().clone().requires_grad_() for v in values)]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_drop_what_forward_dropped(recompute: str, dtype: torch.dtype) -> None:
    """The mask is read off the output: a 3x3 whose features are 1 everywhere."""
    params = [
        torch.ones(4),
        torch.ones(4),
        torch.zeros(3, 4, 1, 1),
        torch.ones(3),
        torch.ones(3),
        torch.zeros(5, 3, 3, 3),
    ]
    params[5][:, 0, 1, 1] = 1.0  # features: relu(norm(0)) = the norm's bias, 1
    params = [p.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_() for p in params]
    x = torch.randn(3, 4, 7, 6, dtype=dtype, requires_grad=True)
    torch.manual_seed(11)
    y, _ = csp.ops.dense_block(x, params, drop_rate=0.4, recompute=recompute)
    mask = y[:, 4:].detach()
    assert 0 < (mask == 0).sum() < mask.numel()
    gradient = torch.randn_like(y)
    torch.manual_seed(0)  # nothing may depend on the generator now
    first = torch.autograd.grad(y, params[5], gradient, retain_graph=True)[0]
    again = torch.autograd.grad(y, params[5], gradient, create_graph=True)[0]
    assert again.requires_grad
    bound = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(again.detach(), first, rtol=bound, atol=bound * first.abs().max().item())


def test_dropout_twice_differentiable() -> None:
    params = [p.detach().double().requires_grad_() for p in csp.DenseBlock(2, 3, 2, 2).parameters()]
    order = [params[i] for i in range(len(params))]

    def function(x: Tensor, *p: Tensor) -> Tensor:
        torch.manual_seed(5)
        return csp.ops.dense_block(x, p, drop_rate=0.5)[0]

    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, [x, *order], fast_mode=True)
    assert torch.autograd.gradgradcheck(function, [x, *order], fast_mode=True)


def test_a_parameter_computed_from_the_input_counts_once() -> None:
    """Partial derivatives of both: not the path from one argument through the other."""
    results = []
    for where in WHERE:
        torch.manual_seed(1)
        x = image(channels=4).requires_grad_()
        weight = (x.mean((0, 2, 3)).outer(torch.ones(4).double()) + torch.randn(4, 4).double()).view(4, 4, 1, 1)
        y = where.ops.concat_conv([x], weight, None, None)[0][0] if where is csp else None
        y = where.concat_conv([x], weight, None, None)[0][0] if y is None else y
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        results.append([g, *torch.autograd.grad(g.square().sum(), x)])
    assert_same(*results)


@pytest.mark.parametrize("name", ["dense", "post", "join", "csp, post", "stage pre"])
def test_second_derivatives_under_autocast(name: str) -> None:
    """The penalty step inside autocast: the fused layer's dtype, and gradients as near as the twin's."""
    ours, naive = (m.float() for m in pair(name))
    exact = copy.deepcopy(naive).double()
    x = image(4, size=6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = penalty(ours, x), penalty(naive, x)
    truth = penalty(exact, x.double())

    def distance(values: list[Tensor]) -> float:
        pairs = zip(values, truth, strict=True)
        return sum((v.double() - t).square().sum().item() for v, t in pairs) ** 0.5

    assert distance(mine) <= 3 * distance(theirs)


@every_layer
def test_batched_gradients(name: str) -> None:
    """torch.autograd.grad(is_grads_batched=True), as jacobian(vectorize=True) calls it."""
    ours, naive = pair(name)
    results = []
    for module in (ours, naive):
        torch.manual_seed(2)
        x = image().requires_grad_()
        y = module(x)
        grads = torch.randn(3, *y.shape, dtype=y.dtype)
        results.append(torch.autograd.grad(y, [x, *module.parameters()], grads, is_grads_batched=True))
    assert_same(*results)


def test_hessian_vector_products() -> None:
    ours, naive = pair("dense")
    x, v = image(), image()
    for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        assert_same(*[function(lambda t, m=m: m(t).sin().sum(), x, v)[1:] for m in (ours, naive)])
    given = [torch.autograd.functional.jvp(m, x, v)[1:] for m in (ours, naive)]
    assert_same(*given)


def test_first_derivatives_stay() -> None:
    """Twice with retain_graph, a third time an error; unused inputs; anomaly mode."""
    ours, _ = pair("dense")
    x = image().requires_grad_()
    y = ours(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    with torch.autograd.detect_anomaly(check_nan=True):
        assert torch.equal(torch.autograd.grad(y, x)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)
    unused = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(ours(x).sum(), [x, unused], allow_unused=True)[1] is None


# --- changes in place ---


FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda y: y.add_(1),
    "relu": lambda y: F.relu(y, inplace=True),
    "a slice": lambda y: y[:, 7:].mul_(2),
    "detached": lambda y: y.detach().zero_(),
}


@FORMATS
@pytest.mark.parametrize("change", CHANGES)
def test_a_dense_blocks_output_must_stay(memory_format: torch.memory_format, change: str) -> None:
    x = image(channels=CHANNELS).to(memory_format=memory_format).requires_grad_()
    y = LAYERS["dense"](csp).double()(x)
    CHANGES[change](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@FORMATS
@pytest.mark.parametrize("name", ["post", "two_way", "join", "csp, post", "stage pre"])
def test_what_other_layers_read_must_stay(name: str, memory_format: torch.memory_format) -> None:
    """Inputs that backward reads again; their outputs may change."""
    module = Fused(LAYERS[name](csp)).double()
    for changes_input in (True, False):
        leaf = image(channels=CHANNELS).to(memory_format=memory_format).requires_grad_()
        x = leaf * 1
        y = module(x)
        if changes_input:
            x.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.add_(1).sum().backward()
            assert leaf.grad is not None


@FORMATS
def test_a_dense_blocks_input_may_change(memory_format: torch.memory_format) -> None:
    module = LAYERS["dense"](csp).double()
    leaf = image(channels=CHANNELS).to(memory_format=memory_format).requires_grad_()
    gradients = []
    for change in (False, True):
        x = leaf * 1
        y = module(x)
        if change:
            x.add_(1)
        gradients.append(torch.autograd.grad(y.sin().sum(), leaf)[0])
    assert torch.equal(*gradients)


@every_layer
def test_training_between_forward_and_backward_of_eval(name: str) -> None:
    """Gradients are those of the running statistics that forward saw (plain norms take the later ones in silence)."""
    ours, _ = pair(name, nn.Module.eval)
    x = image()
    expected = step(copy.deepcopy(ours), x, plain)

    def interrupted(module: nn.Module, t: Tensor) -> Tensor:
        y = module(t)
        module.train()(image(3))
        return y

    assert_same(step(ours, x, interrupted), expected, 1e-13)
