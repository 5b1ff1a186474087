"""torch.func, vmap and forward-mode derivatives of fused layers: the reference's, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem_layers import LAYERS, Fused, assert_same, every_layer, image, pair
from torch import Tensor, nn
from torch.autograd import forward_ad

import csp_kernels as csp


def loss(module: nn.Module) -> Callable[..., Tensor]:
    def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers = dict(module.named_buffers())
        return torch.func.functional_call(module, (params, buffers), (x,)).sin().sum()

    return function


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def assert_same_trees(ours: Any, naive: Any) -> None:
    assert_same(*(torch.utils._pytree.tree_leaves(tree) for tree in (ours, naive)))


@every_layer
def test_grad_with_respect_to_parameters(name: str) -> None:
    ours, naive = pair(name, nn.Module.eval)
    x = image()
    assert_same_trees(*(torch.func.grad(loss(m))(weights(m), x) for m in (ours, naive)))


@every_layer
@pytest.mark.parametrize("requires_grad", [False, True])
def test_jvp(name: str, requires_grad: bool) -> None:
    """Tangents of inputs and of parameters, eval mode, whether or not parameters require gradients."""
    ours, naive = pair(name, nn.Module.eval)
    x, t = image(), image()
    for module in (ours, naive):
        module.requires_grad_(requires_grad)
    assert_same_trees(*(torch.func.jvp(m, (x,), (t,)) for m in (ours, naive)))
    tangents = {name: torch.randn_like(p) for name, p in weights(ours).items()}
    results = [torch.func.jvp(lambda p, m=m: loss(m)(p, x), (weights(m),), (tangents,)) for m in (ours, naive)]
    assert_same_trees(*results)
    assert results[0][1].abs() > 0


@every_layer
@pytest.mark.parametrize("mode", [nn.Module.eval, nn.Module.train], ids=["eval", "train"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors(name: str, mode: Callable[[nn.Module], Any], requires_grad: bool) -> None:
    ours, naive = pair(name, mode)
    x, t, results = image(), image(), []
    for module in (ours, naive):
        module.requires_grad_(requires_grad)
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(module(forward_ad.make_dual(x, t)))
        assert y.tangent is not None
        results.append([y.primal, y.tangent])
    assert_same(*results)


def test_dual_parameters() -> None:
    """A tangent of one parameter alone."""
    results = []
    for where in (csp, csp.reference):
        torch.manual_seed(0)
        x, weight, tangent = image(channels=4), image(5, 4, 1), image(5, 4, 1)
        operator = where.ops.concat_conv if where is csp else where.concat_conv
        with forward_ad.dual_level():
            y = operator([x], forward_ad.make_dual(weight, tangent), None, None)[0][0]
            results.append(list(forward_ad.unpack_dual(y)))
    assert_same(*results)


@every_layer
def test_tangents_of_gradients(name: str) -> None:
    """Forward over reverse: the tangent arrives in backward."""
    ours, naive = pair(name)
    x = image()

    def tangents(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
            return list(forward_ad.unpack_dual(torch.autograd.grad(y, leaf, grad)[0]))

    if name in ("join", "fork"):  # silu_backward and mish_backward have no forward derivative in torch: both say so
        for module in (ours, naive):
            with pytest.raises(NotImplementedError, match="forward AD"):
                tangents(module)
    else:
        assert_same(tangents(ours), tangents(naive))


@pytest.mark.parametrize(
    "transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("name", ["dense", "post", "join", "stage two_way"])
def test_jacobians(name: str, transform: Any) -> None:
    ours, naive = pair(name, nn.Module.eval)
    x = image(1, size=2) if transform is torch.func.hessian else image(size=2)
    summed = transform is torch.func.hessian
    assert_same(*([transform(lambda t, m=m: m(t).sin().sum() if summed else m(t))(x)] for m in (ours, naive)))


def test_vjp_in_train_mode_of_operators() -> None:
    """Batch statistics: the operator, which leaves running statistics to the caller."""
    x = image(channels=4)
    params = [p.detach().double() for p in csp.DenseBlock(2, 4, 3, 2).parameters()]
    results = []
    for operator in (csp.ops.dense_block, csp.reference.dense_block):
        y, vjp = torch.func.vjp(lambda t, *p, f=operator: f(t, p)[0], x, *params)
        results.append([y, *vjp(torch.ones_like(y))])
    assert_same(*results)


@every_layer
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_vmap_over_batches(name: str, memory_format: torch.memory_format) -> None:
    ours, _ = pair(name, nn.Module.eval)
    batches = torch.stack([image().to(memory_format=memory_format) for _ in range(3)])
    with torch.no_grad():
        assert_same([torch.vmap(ours)(batches)], [torch.stack([ours(x) for x in batches])])


@every_layer
def test_ensembles(name: str) -> None:
    models = [pair(name, nn.Module.eval)[0] for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = image()

    def run(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (p, b), (x,))

    assert_same([torch.vmap(run)(params, buffers)], [torch.stack([m(x) for m in models])])


@every_layer
def test_per_sample_gradients(name: str) -> None:
    ours, _ = pair(name, nn.Module.eval)
    x = image(3)
    per_sample = torch.vmap(torch.func.grad(loss(ours)), in_dims=(None, 0))(weights(ours), x.unsqueeze(1))
    for i in range(3):
        one = torch.func.grad(loss(ours))(weights(ours), x[i : i + 1])
        assert_same([t[i] for t in per_sample.values()], list(one.values()))


@pytest.mark.parametrize("name", ["dense", "two_way", "fork", "csp, post", "stage pre"])
def test_gradcheck_forward_and_batched(name: str) -> None:
    module = Fused(LAYERS[name](csp)).double().eval()
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(module, x, fast_mode=True, **options)
    assert torch.autograd.gradgradcheck(module, x, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(strategy: str) -> None:
    ours, naive = pair("dense", nn.Module.eval)
    x = image(1, size=2)
    options = {"vectorize": True, "strategy": strategy}
    assert_same(*([torch.autograd.functional.jacobian(m, x, **options)] for m in (ours, naive)))


def test_native_is_refused_in_one_sentence() -> None:
    block = csp.DenseBlock(1, 3, 2, 2).eval()
    x = torch.randn(2, 3, 4, 4)
    csp.use_backend("native")
    for call in (
        lambda: torch.func.jvp(block, (x,), (x,)),
        lambda: torch.vmap(block)(x.unsqueeze(0)),
        lambda: torch.func.grad(lambda t: block(t).sum())(x),
    ):
        with pytest.raises(RuntimeError, match=r"backend 'native': .*use_backend\('reference'\)"):
            call()
    with forward_ad.dual_level():
        block(x)  # no tangent comes in
        with pytest.raises(RuntimeError, match=r"backend 'native': .*use_backend\('reference'\)"):
            block(forward_ad.make_dual(x, x))


def test_networks() -> None:
    """A whole network under grad, jvp and vmap, in eval mode."""
    net = csp.models.csp_peleenet_digits().double().eval()
    x, t = (torch.randn(2, 1, 28, 28, dtype=torch.float64) for _ in range(2))
    results = []
    for backend in ("auto", "reference"):
        csp.use_backend(backend)
        results.append([torch.func.grad(lambda i: net(i).sin().sum())(x), *torch.func.jvp(net, (x,), (t,))])
    assert_same(*results)
    csp.use_backend("auto")
    assert_same([torch.vmap(net)(x.unsqueeze(1)).squeeze(1)], [net(x)])
