"""Packed weights that calls of inference share: whatever changes a parameter, the next call takes what it is now."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modes import random_norms
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import csp_kernels as csp
from csp_kernels.ops import _packed
from csp_kernels.stage.build import Builder, conv_norm, through_norm

pytestmark = pytest.mark.usefixtures("native")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: csp.DenseBlock(2, 8, 4, 2),
    "join": lambda: csp.ConcatConv([8], 6, act="silu"),
    "residual": lambda: csp.CSPStage(8, 12, 2, stride=1),
    "C2f": lambda: csp.C2f(8, 8, 1, True),
    "groups": lambda: grouped(),
    "stride 2": lambda: strided(),
}


def grouped() -> csp.Stage:
    """A 1x1, a 3x3 in two wide groups, whose weights are packed apart, and one in narrow groups."""
    build = Builder(8)
    read = build.read(0)
    for channels, kernel, groups in ((64, 1, 1), (128, 3, 2), (128, 3, 32)):
        read = conv_norm(build, [read], channels, kernel, groups=groups)
    build.write([read])
    return csp.Stage(build.graph())


def strided() -> csp.Stage:
    build = Builder(8)
    read = conv_norm(build, [build.read(0)], 32)
    build.write(through_norm(build, [build.read(build.conv([read], 32, 3, stride=2))]))
    return csp.Stage(build.graph())


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    csp.empty_cache()


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    module = MODULES[name]()
    random_norms(module)
    return module.to(dtype).eval(), torch.randn(2, 8, 7, 6, dtype=dtype)


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
    return y


def kept() -> int:
    """Bytes."""
    return sum(t.nbytes for known in _packed._known.values() for t in known.packed or ())


def keep(module: nn.Module, x: Tensor) -> Tensor:
    """Calls until weights are kept."""
    results = [run(module, x) for _ in range(3)]
    assert kept() and torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    return results[0]


def check_current(module: nn.Module, x: Tensor) -> Tensor:
    """Several calls give what a copy gives, which has nothing kept."""
    expected = run(copy.deepcopy(module), x)
    for _ in range(3):
        assert torch.equal(run(module, x), expected)
    return expected


def weights(module: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]


def by_an_optimizer(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def by_load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in module.state_dict().items()})


def by_assignment(module: nn.Module) -> None:
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


@torch.no_grad()
def one_element(module: nn.Module) -> None:
    weights(module)[0].view(-1)[5] += 1


def behind_autograd(module: nn.Module) -> None:
    for w in weights(module):
        w.data.mul_(0.9)


def one_element_behind_autograd_and_eval(module: nn.Module) -> None:
    weights(module)[0].data.view(-1)[5] += 1
    module.eval()


def another_tensor(module: nn.Module) -> None:
    for w in weights(module):
        w.data = w.data.flip(0).contiguous()


def there_and_back(module: nn.Module) -> None:
    module.double()
    behind_autograd(module)
    module.float()


def running_statistics(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.add_(0.25)
            m.running_var.data.mul_(2)


def parameters_of_norms(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.mul_(2)
            m.bias.data.add_(1)


def eps_of_norms(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.5


def a_training_step(module: nn.Module) -> None:
    module.train()
    module(torch.randn(2, 8, 7, 6)).sum().backward()
    module.eval()


CHANGES = [
    by_an_optimizer, by_load_state_dict, by_assignment, one_element, behind_autograd, another_tensor, there_and_back,
    one_element_behind_autograd_and_eval, running_statistics, parameters_of_norms, eps_of_norms, a_training_step,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_changes_are_seen(name: str, change: Callable[[nn.Module], None]) -> None:
    module, x = made(name)
    before = keep(module, x)
    change(module)
    assert not torch.allclose(check_current(module, x), before)


@pytest.mark.parametrize("name", MODULES)
def test_one_weight_for_two_modules(name: str) -> None:
    """Of which one has another second convolution or other norms."""
    module, x = made(name)
    other, _ = made(name)
    weights(other)[0].data = weights(module)[0].data
    first = next(m for m in other.modules() if isinstance(m, nn.Conv2d))
    first.weight = weights(module)[0]
    expected = [run(copy.deepcopy(m), x) for m in (module, other)]
    for _ in range(3):
        for m, y in zip((module, other), expected, strict=True):
            assert torch.equal(run(m, x), y) and torch.equal(run(m, x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """16-bit images with parameters in float32, as under autocast, keep theirs."""
    module, x = made("residual", torch.float64 if dtype == torch.float64 else torch.float32)
    keep(module, x.to(dtype))
    check_current(module, x.to(dtype))
    keep(module, torch.randn(1, 8, 9, 4).to(dtype))


@pytest.mark.parametrize("name", ["C2f", "stride 2"])
def test_sizes_and_precisions(name: str) -> None:
    """With "high" the tiles depend on the size of the image, with stride 2 the form of the product."""
    module, _ = made(name)
    images = [torch.randn(1, 8, n, n) for n in (4, 16, 5, 24, 64, 17)]
    with csp.use_backend("native"):
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("highest", "high", "highest"):
                torch.set_float32_matmul_precision(precision)
                for x in images:
                    torch.testing.assert_close(run(module, x), run(copy.deepcopy(module), x), rtol=0, atol=0)
                    keep(module, x)
        finally:
            torch.set_float32_matmul_precision(before)


def test_lives_as_long_as_the_weights() -> None:
    module, x = made("C2f")
    keep(module, x)
    del module
    gc.collect()
    assert not _packed._known


def test_training_gives_it_back() -> None:
    module, x = made("residual")
    keep(module, x)
    module(x).sum().backward()
    assert not kept()


def test_empty_cache_says_how_much() -> None:
    module, x = made("dense")
    keep(module, x)
    held = kept()
    assert csp.empty_cache() >= held > 0 and not kept()
    check_current(module, x)


def test_tensors_of_one_call_are_not_kept() -> None:
    module, x = made("join")
    for _ in range(3):
        torch.func.functional_call(module, {k: v.clone() for k, v in module.state_dict().items()}, (x,))
        run(module, x.half().float())
        csp.ops.concat_conv([x], module.conv.weight.detach().clone(), None, None)
    gc.collect()
    assert len(_packed._known) <= 1


def test_counters_see_the_operator() -> None:
    module, x = made("C2f")
    keep(module, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 0


def test_inference_mode() -> None:
    module, x = made("C2f")
    expected = run(module, x)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(module(x), expected)
        inner = copy.deepcopy(module)  # its parameters have no versions
        for _ in range(3):
            assert torch.equal(inner(x), expected)


def test_threads() -> None:
    """One module in several threads at once, from the first call on; each result is the right one."""
    module, x = made("residual")
    expected = run(copy.deepcopy(module), x)
    csp.empty_cache()
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(40):
            try:
                if not torch.equal(run(module, x), expected):
                    wrong.append("differs")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and kept()
