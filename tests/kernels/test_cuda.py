"""Whole operators as a GPU with CUDA C++ runs them: the 3x3 of csrc/cuda, emulated, and everything else in Triton,
interpreted. Against the reference in float64."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_dense_block as block
import torch
from test_dense_block import Case, arguments, errors, image, kernels, reference, triton
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import cuda
from csp_kernels.kernels.launch import Geometry
from csp_kernels.ops import _node as node

pytestmark = pytest.mark.usefixtures("native")
PASSES = ("forward", "dgrad", "wgrad")


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels, for the rest of the process."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
    import operators

    if not torch._C._dispatch_has_kernel_for_dispatch_key("csp_kernels::conv3x3_forward", "CPU"):
        torch.ops.load_library(str(operators.build(tmp_path_factory.mktemp("operators"))))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each pass ran in CUDA C++."""
    counted: Counter[str] = Counter()
    for name in PASSES:
        launch = getattr(cuda, name)

        def count(*given: Any, name: str = name, launch: Any = launch) -> Any:
            counted[name] += 1
            return launch(*given)

        monkeypatch.setattr(cuda, name, count)
    yield counted


WIDE = Case(channels=16, growth=16, width=32, size=(2, 9, 10), dtype=torch.bfloat16)
CASES = {
    "bfloat16": WIDE,
    "float16": replace(WIDE, dtype=torch.float16, layers=3),
    "growth 8": replace(WIDE, growth=8, width=24, size=(3, 7, 5)),
    "growth 48": replace(WIDE, growth=48, width=192, size=(1, 4, 7)),
    "recompute": replace(WIDE, keep=False),
    "frozen": replace(WIDE, frozen=(True,), dtype=torch.float16),
    "some frozen": replace(WIDE, frozen=(False, False, True), layers=3),
    "one pixel": replace(WIDE, size=(32, 1, 1)),
    "large mean": replace(WIDE, mean=30.0, dtype=torch.float16),
    "float32": replace(WIDE, dtype=torch.float32),
    "float32, growth 12": replace(WIDE, dtype=torch.float32, channels=20, growth=12, width=28),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, calls: Counter[str]) -> None:
    """Within twice the error of the naive form in the same dtype, by the median of three seeds."""
    case, runs = CASES[name], []
    for seed in range(3):
        torch.manual_seed(seed)
        given = case, arguments(case), image(case.total, case)
        mine, exact, naive = triton(*given), reference(*given, wide=True), reference(*given)
        runs.append((errors(mine._replace(z=[]), exact, case), errors(naive, exact, case)))
    assert calls == dict.fromkeys(PASSES, 3 * case.layers)
    ours, others = ([statistics.median(e) for e in zip(*r, strict=True)] for r in zip(*runs, strict=True))
    for i, (got, other) in enumerate(zip(ours, others, strict=True)):
        bound = limit(other, case.dtype, max(9 * case.width, case.total))
        assert got <= bound, f"tensor {i}: error {got:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_against_triton_alone(name: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's mask too, and the layout of everything."""
    case = replace(CASES[name], drop_rate=0.3 if name == "recompute" else 0.0)
    given = case, arguments(case), image(case.total, case)
    mine = triton(*given)
    assert set(calls) == set(PASSES)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["csp_kernels.backends"], "_selected", "triton")  # as CSP_KERNELS_BACKEND=triton
        calls.clear()
        theirs = triton(*given)
    assert not calls
    got, expected = ([r.y, *r.z, r.stats, *r.gradients] for r in (mine, theirs))
    for t, u in zip(got, expected, strict=True):
        assert t.shape == u.shape and t.dtype == u.dtype and t.stride() == u.stride()
    assert all(e <= block.CLOSE[case.dtype] for e in errors(mine, theirs, case))


UNFIT = {
    "growth 12": replace(WIDE, growth=12),
    "bottleneck 20": replace(WIDE, width=20),
    "channels 12: slices are not aligned": replace(WIDE, channels=12),
    "float64": replace(WIDE, dtype=torch.float64),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_runs_in_triton(name: str, calls: Counter[str]) -> None:
    case = UNFIT[name]
    given = case, arguments(case), image(case.total, case)
    mine, exact = triton(*given), reference(*given, wide=True)
    assert not calls
    assert error(mine.y, exact.y) <= block.CLOSE[case.dtype]


def test_tf32(calls: Counter[str]) -> None:
    """In the 3x3 as if its inputs had 10 bits; the interpreter's products in Triton keep all of float32's."""
    case = CASES["float32"]
    given = arguments(case)._replace(winograd=4), image(case.total, case)
    mine, exact = triton(case, *given), reference(case, *given, wide=True)
    assert calls == dict.fromkeys(PASSES, case.layers)
    assert 1e-5 < error(mine.y, exact.y) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inference_in_one_kernel_a_layer(
    dtype: torch.dtype, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the estimate says that two are faster, as for images so small."""
    case, layers = replace(WIDE, dtype=dtype, frozen=(True,), layers=3), []
    a, grad, one = arguments(case), image(case.total, case), cuda.layer
    monkeypatch.setattr(cuda, "takes_layer", lambda *_: True)
    monkeypatch.setattr(cuda, "layer", lambda *given: layers.append(one(*given)))
    y = kernels.inference(a.x, a.params, a.running, a.eps, a.winograd)
    assert len(layers) == case.layers and not calls
    exact, naive = reference(case, a, grad, wide=True).y, reference(case, a, grad).y
    assert error(y, exact) <= limit(error(naive, exact), dtype, case.total)


def test_which_layers_one_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(n: int, channels: int, growth: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        features = torch.empty(n * 56 * 56, channels + growth, dtype=dtype)
        split = features[:, :channels], torch.empty(growth, 128, 3, 3), features[:, channels:]
        return cuda.takes_layer(*split, Geometry(n, 56, 56))

    assert takes(64, 128, 32)
    assert not takes(64, 128, 32, torch.float32) and not takes(64, 132, 32) and not takes(64, 128, 12)
    monkeypatch.setattr(sys.modules["csp_kernels.backends"], "_selected", "triton")
    assert not takes(64, 128, 32)


def test_a_gradient_at_any_offset(calls: Counter[str]) -> None:
    """The caller's gradient is a slice whose pixels are 3 channels too far apart."""
    case = WIDE
    a, grad = arguments(case), image(case.total, case)
    wide = torch.full((2, case.total + 3, 9, 10), torch.nan, dtype=case.dtype).to(memory_format=torch.channels_last)
    wide[:, 1 : 1 + case.total] = grad
    first, second = (triton(case, a, g) for g in (grad, wide[:, 1 : 1 + case.total]))
    assert calls["dgrad"] == calls["wgrad"] == 2 * case.layers
    for t, u in zip(first.gradients, second.gradients, strict=True):
        assert torch.equal(t, u)


def test_a_gradient_of_one_pixel_at_any_offset() -> None:
    """A single row counts as contiguous wherever it begins."""
    case = replace(WIDE, size=(1, 1, 1), frozen=(True,))
    a, grad = arguments(case), image(case.total, case)
    wide = torch.full((1, case.total + 3, 1, 1), torch.nan, dtype=case.dtype)
    wide[:, 1 : 1 + case.total] = grad
    first, second = (triton(case, a, g) for g in (grad, wide[:, 1 : 1 + case.total]))
    assert all(torch.equal(t, u) for t, u in zip(first.gradients, second.gradients, strict=True))


@pytest.mark.parametrize("name", ["features", "gradient", "z", "out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_misaligned_views_are_refused(name: str, dtype: torch.dtype) -> None:
    """On a GPU they would end the process' use of it."""
    pixels, b, g = 12, 16, 8

    def view(channels: int, mine: str) -> Tensor:
        return torch.zeros(pixels, channels + 32, dtype=dtype)[:, (1 if mine == name else 8) :][:, :channels]

    features, gradient, z, out = view(g, "features"), view(g, "gradient"), view(b, "z"), view(b, "out")
    vectors, weight = [[torch.zeros(n)] * 3 for n in (g, b)], torch.zeros(g, b, 3, 3)
    given = features, gradient, vectors[0], weight, z, vectors[1], out, [1, 3, 4], None, 0, 0, 1.0, False
    with pytest.raises(RuntimeError, match=f"conv3x3: {name}: not 16-byte aligned"):
        torch.ops.csp_kernels.conv3x3_dgrad(*given)


@pytest.fixture(name="step")
def operators_of_the_block(library: None) -> Iterator[None]:
    """torch.ops.csp_kernels.dense_block* run by the launchers, also on CPU tensors."""
    with torch.library._scoped_library("csp_kernels", "IMPL") as scope:
        for suffix in ("", "_backward", "_inference"):
            launcher = getattr(kernels, suffix.removeprefix("_") or "forward")
            scope.impl(f"dense_block{suffix}", launcher, "CPU", allow_override=True)
        yield


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_backward_runs_where_forward_did(chosen: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is chosen by then: the masks of the two differ in their last bits."""
    backends, ops = (sys.modules[f"csp_kernels.{name}"] for name in ("backends", "ops.dense_block"))
    case = replace(WIDE, layers=1)
    a = arguments(case)
    x = a.x.requires_grad_()
    monkeypatch.setattr(backends, "_selected", chosen)
    y, *_ = node.call(torch.ops.csp_kernels.dense_block.default, ops._FORMULA, (x, *a[1:]))
    monkeypatch.setattr(backends, "_selected", "triton" if chosen == "native" else "native")
    y.backward(image(case.total, case))
    assert calls == (dict.fromkeys(PASSES, 1) if chosen == "native" else {}) and x.grad is not None


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_training_steps(recompute: str, calls: Counter[str]) -> None:
    """Three steps of a layer with an optimizer: parameters and running statistics against the same in float64."""

    def train(layer: torch.nn.Module, wide: bool = False) -> list[Tensor]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
        for x, target in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
                y = layer(x.double() if wide else x)
            (y.double() - target).square().mean().backward()
            optimizer.step()
        return [*layer.parameters(), *layer.buffers()]

    batches = [(torch.randn(2, 16, 8, 8).bfloat16(), torch.randn(2, 48, 8, 8)) for _ in range(3)]
    layer = csp.DenseBlock(2, 16, growth_rate=16, bn_size=2, recompute=recompute)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    exact, naive = (csp.reference.DenseBlock(2, 16, growth_rate=16, bn_size=2) for _ in range(2))
    exact.load_state_dict(state), naive.load_state_dict(state)
    mine = train(layer)
    assert calls == dict.fromkeys(PASSES, 3 * 2)
    expected, other = train(exact.double(), wide=True), train(naive)
    for i, (t, u, v) in enumerate(zip(mine, expected, other, strict=True)):
        bound = limit(error(v, u), torch.bfloat16, 9 * 32)
        assert error(t, u) <= bound, f"tensor {i}: error {error(t, u):.2e}, allowed {bound:.2e}"
