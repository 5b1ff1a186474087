"""The module against its naive twin and torchvision's: running statistics, modes, fallbacks, compilation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modes import MODES, norms, random_norms, set_norms, some_frozen
from torch import Tensor, nn
from torch._dynamo.utils import counters

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")


def twins(change: Callable[[nn.Module], Any] = lambda block: None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Fused and naive block in float64 with the same random parameters and statistics, both changed the same way."""
    ours, naive = csp.DenseBlock(3, 12, 8, 2, **options).double(), csp.reference.DenseBlock(3, 12, 8, 2).double()
    random_norms(ours)
    naive.load_state_dict(ours.state_dict())
    for block in (ours, naive):
        change(block)
    return ours, naive


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_three_steps_equal_the_naive_twin(mode: str, recompute: str, backend: str) -> None:
    """Outputs, gradients, running statistics and counters."""
    csp.use_backend(backend)
    ours, naive = twins(MODES[mode], recompute=recompute)
    for step in range(3):
        x = torch.randn(2 + step, 12, 5, 4, dtype=torch.float64) * 2 + 1
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, expected = ours(a), naive(b)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    for mine, other in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert list(ours.state_dict()) == list(naive.state_dict())
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_low_precision_statistics(dtype: torch.dtype, training: bool) -> None:
    """Without gradients; parameters and buffers in the dtype of x."""
    ours, naive = (block.to(dtype).train(training) for block in twins())
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, 12, 5, 4).to(dtype)
            y, expected = ours(x), naive(x)
            bound = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(y, expected, rtol=bound, atol=bound)
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=bound, atol=bound, msg=name)


def test_update_without_gradients_equals_update_with() -> None:
    first, _ = twins()
    second, x = copy.deepcopy(first), torch.randn(2, 12, 5, 4, dtype=torch.float64)
    first(x)
    with torch.no_grad():
        second(x)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_dropout_only_in_training() -> None:
    block = csp.DenseBlock(2, 12, 8, 2, drop_rate=0.5)
    x = torch.randn(2, 12, 8, 8)
    zeros = (block(x)[:, 12:] == 0).double().mean().item()
    assert 0.4 < zeros < 0.6
    block.eval()
    assert torch.equal(block(x), block(x)) and (block(x)[:, 12:] == 0).double().mean() < 0.01
    with csp.use_backend("reference"):
        zeros = (block.train()(x)[:, 12:] == 0).double().mean().item()
    assert 0.4 < zeros < 0.6


def test_eval_with_and_without_gradients_agree() -> None:
    block = csp.DenseBlock(3, 12, 8).eval()
    x = torch.randn(2, 12, 9, 9)
    with torch.no_grad():
        quick = block(x)
    torch.testing.assert_close(quick, block(x))
    assert not quick.requires_grad
    with torch.inference_mode():
        assert torch.equal(block(x), quick)


def test_channels_last_module_and_input() -> None:
    block = csp.DenseBlock(2, 12, 8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 12, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = block(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert block.denselayer1.conv2.weight.grad.shape == (8, 32, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool) -> None:
    ours, naive = (block.train(training) for block in twins())
    for block in (ours, naive):
        x = torch.zeros(0, 12, 5, 4, dtype=torch.float64, requires_grad=True)
        y = block(x)
        assert y.shape == (0, 36, 5, 4)
        y.sum().backward()
        assert x.grad is not None and all(not p.grad.any() for p in block.parameters())
    for name, value in naive.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


# --- compatibility ---


@pytest.mark.parametrize("training", [True, False])
def test_torchvision(training: bool) -> None:
    densenet = pytest.importorskip("torchvision.models.densenet")
    theirs = densenet._DenseBlock(3, 12, 2, 8, 0.0)
    ours = csp.DenseBlock(3, 12, 8, 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12, 6, 5)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())


def test_same_keys_as_the_naive_twin_and_plain_norms() -> None:
    ours, naive = csp.DenseBlock(2, 8, 4), csp.reference.DenseBlock(2, 8, 4)
    assert list(ours.state_dict()) == list(naive.state_dict())
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(ours)) and len(list(norms(ours))) == 4
    assert "recompute='none'" in repr(ours)


def sync_norms(block: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(block).eval()


def group_norm(block: nn.Module) -> nn.Module:
    block.denselayer2.norm2 = nn.GroupNorm(2, 16)
    return block


def dilated(block: nn.Module) -> nn.Module:
    conv = block.denselayer1.conv2
    conv.dilation = conv.padding = (2, 2)
    return block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sync_norms, "denselayer1.norm1 is a SyncBatchNorm, not an nn.BatchNorm2d"),
        (group_norm, "denselayer2.norm2 is a GroupNorm"),
        (dilated, "denselayer1.conv2 is not a plain nn.Conv2d"),
    ],
)
def test_other_children_run_the_reference(change: Callable[[nn.Module], nn.Module], message: str) -> None:
    ours = change(csp.DenseBlock(3, 12, 8, 2))
    naive = change(csp.reference.DenseBlock(3, 12, 8, 2))
    naive.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 6, 6)
    with pytest.raises(RuntimeError, match=f"backend 'native': {message}"):
        ours(x)
    csp.use_backend("auto")
    with pytest.warns(RuntimeWarning, match=message) as caught:
        y, *_ = [ours(x) for _ in range(3)]
    assert len(caught) == 1
    torch.testing.assert_close(y, naive(x))


def test_deep_copy_and_state_dict_round_trip() -> None:
    block = csp.DenseBlock(2, 8, 4, recompute="bottleneck")
    other = copy.deepcopy(block)
    assert other.recompute == "bottleneck"
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), other(x))


# --- compilation ---


COMPILED: dict[str, dict[str, Any]] = {
    "train": {},
    "recompute": {"recompute": "bottleneck"},
    "eval": {"change": lambda block: block.eval()},
    "some frozen": {"change": some_frozen},
    "cumulative": {"change": set_norms(momentum=None)},
    "no affine": {"change": set_norms(weight=None, bias=None)},
}


@pytest.mark.parametrize("mode", COMPILED)
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_equals_eager_for_any_batch_size(mode: str, channels_last: bool) -> None:
    """One graph, no recompilation; bitwise the same outputs, gradients and running statistics."""
    eager, _ = twins(**COMPILED[mode])
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    counters.clear()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for n in (3, 2, 5, 8):
        x = torch.randn(n, 12, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, expected = compiled(a), eager(b)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(a.grad, b.grad)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for mine, other in zip(block.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], value, rtol=1e-14, atol=1e-15, msg=name)


def test_compiled_inference() -> None:
    block = csp.DenseBlock(2, 12, 8).eval()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    counters.clear()
    with torch.no_grad():
        for n in (2, 4, 7):
            x = torch.randn(n, 12, 6, 6)
            assert torch.equal(compiled(x), block(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_dropout_and_autocast() -> None:
    block = csp.DenseBlock(2, 12, 8, drop_rate=0.5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 12, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = compiled(x), compiled(x)
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)
    first.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_compiled_follows_the_matmul_precision() -> None:
    block = csp.DenseBlock(1, 32, 32).eval()
    compiled, x = torch.compile(block, fullgraph=True, backend="aot_eager"), torch.randn(2, 32, 28, 28)
    results = []
    with torch.no_grad():
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(compiled(x), block(x))
            results.append(block(x))
    assert not torch.equal(*results)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.verify)])
def test_inductor(training: bool) -> None:
    """The default compiler, with neighbours that could change memory layouts."""
    block = csp.DenseBlock(2, 8, 4, 2).train(training)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block, csp.Transition(16, 4))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 3, 8, 8)
        y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        expected.square().sum().backward()
    for mine, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-3, atol=1e-4)


# --- bad input ---


def test_bad_sizes() -> None:
    good = {"num_layers": 2, "in_channels": 8, "growth_rate": 4, "bn_size": 2}
    for name in good:
        for value in (0, -3):
            with pytest.raises(ValueError, match=f"{name}: got {value}, expected at least 1"):
                csp.DenseBlock(**{**good, name: value})
    with pytest.raises(ValueError, match="drop_rate: got 1"):
        csp.DenseBlock(2, 8, drop_rate=1.0)
    with pytest.raises(ValueError, match="recompute: got 'all', expected one of none, bottleneck"):
        csp.DenseBlock(2, 8, recompute="all")


BAD: dict[str, tuple[type[Exception], str, Any]] = {
    "list": (TypeError, "x: got list", [torch.zeros(2, 12, 5, 4)]),
    "3-D": (ValueError, "x: got 3 dimensions", torch.zeros(12, 5, 4)),
    "channels": (ValueError, "x: got 11 channels", torch.zeros(2, 11, 5, 4)),
    "dtype": (TypeError, "norm1.weight: got torch.float32, expected torch.float64", torch.zeros(2, 12, 5, 4).double()),
    "integers": (TypeError, "x: got torch.int32", torch.zeros(2, 12, 5, 4, dtype=torch.int32)),
    "device": (ValueError, "expected meta", torch.zeros(2, 12, 5, 4, device="meta")),
    "one value": (ValueError, "x: got one value per channel", torch.zeros(1, 12, 1, 1)),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input_changes_no_statistics(name: str, backend: str) -> None:
    csp.use_backend(backend)
    kind, message, x = BAD[name]
    block = csp.DenseBlock(3, 12, 8, 2)
    before: dict[str, Tensor] = copy.deepcopy(block.state_dict())
    with pytest.raises(kind, match=message):
        block(x)
    for key, value in before.items():
        assert torch.equal(block.state_dict()[key], value), key


def test_one_value_per_channel_is_fine_in_eval() -> None:
    assert csp.DenseBlock(2, 8, 4).eval()(torch.randn(1, 8, 1, 1)).shape == (1, 16, 1, 1)


def test_no_warnings_in_ordinary_use() -> None:
    block = csp.DenseBlock(2, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(torch.randn(2, 8, 5, 5)).sum().backward()
