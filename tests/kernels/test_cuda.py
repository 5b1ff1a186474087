"""Stages as a GPU with CUDA C++ runs them: the 3x3 of csrc/cuda, emulated, and everything else in Triton, interpreted.
Against the reference in float64."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stage_cases as cases
import torch
from stage_cases import Case, Result, arguments, errors, packed, sliced, twin
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import cuda
from csp_kernels.kernels import stage as kernels
from csp_kernels.kernels.launch import Geometry
from csp_kernels.ops._node import TRITON_ALONE
from csp_kernels.stage.build import Builder
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.post_dense_block import post_dense_block

pytestmark = pytest.mark.usefixtures("native")
PASSES = ("forward", "dgrad", "wgrad")
TRITON = cases.Operators(kernels.forward, kernels.backward)
# of two good implementations, relative in the 2-norm
CLOSE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def triton(case: Case, a: cases.Arguments, winograd: int = 2) -> Result:
    return cases.run(TRITON, case, a, winograd)


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


def shared() -> Graph:
    """A 3x3 whose input another node reads first in backward: its gradient is added to what is there."""
    build = Builder(16)
    z = build.conv([build.read(0)], 16)
    through = build.read(z, build.norm(16), "relu")
    grown = build.conv([through], 16, 3)
    build.write([build.read(build.sum([build.read(grown), through]))])
    return build.graph()


WIDE = Case(dense_block(2, 16, 16, 32), dtype=torch.bfloat16, size=(2, 9, 10))
CASES = {
    "bfloat16": WIDE,
    "float16": replace(WIDE, graph=dense_block(3, 16, 16, 32), dtype=torch.float16),
    "growth 8": replace(WIDE, graph=dense_block(2, 16, 8, 24), size=(3, 7, 5)),
    "growth 48": replace(WIDE, graph=dense_block(2, 16, 48, 192), size=(1, 4, 7)),
    "dropout, recompute": replace(WIDE, graph=dense_block(2, 16, 16, 32, 0.3), recompute="bottleneck"),
    "frozen": replace(WIDE, frozen=(True,), dtype=torch.float16),
    "some frozen": replace(WIDE, graph=dense_block(3, 16, 16, 32), frozen=(False, False, True)),
    "one pixel": replace(WIDE, size=(32, 1, 1)),
    "large mean": replace(WIDE, mean=30.0, dtype=torch.float16),
    "float32": replace(WIDE, dtype=torch.float32),
    "float32, growth 12": replace(WIDE, graph=dense_block(2, 20, 12, 28), dtype=torch.float32),
    "post": replace(WIDE, graph=post_dense_block(16, 16, [32, 32])),
    "shared": replace(WIDE, graph=shared(), dtype=torch.float32),
}


def convolutions(case: Case) -> int:
    """Of 3x3."""
    return sum(weight is not None and weight.kernel == 3 for weight in case.program.weights)


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, calls: Counter[str]) -> None:
    """By the median of three seeds."""
    failures = cases.too_large(TRITON, CASES[name], range(3))
    assert not failures, failures
    assert calls == dict.fromkeys(PASSES, 3 * convolutions(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_against_triton_alone(name: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's mask too."""
    case = CASES[name]
    a = arguments(case)
    mine = triton(case, a)
    assert set(calls) == set(PASSES)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["csp_kernels.backends"], "_selected", "triton")  # as CSP_KERNELS_BACKEND=triton
        calls.clear()
        theirs = triton(case, a)
    assert not calls
    assert all(e <= CLOSE[case.dtype] for e in errors(mine, theirs, case))


def test_the_call_says_that_it_is_tritons_alone(calls: Counter[str]) -> None:
    """As where "auto" has found that Triton wins: whatever is chosen, forward and backward."""
    a = arguments(WIDE)
    assert triton(WIDE, a, winograd=4 + TRITON_ALONE).outputs and not calls
    assert triton(WIDE, a, winograd=4).outputs and set(calls) == set(PASSES)


UNFIT = {
    "growth 12": replace(WIDE, graph=dense_block(2, 16, 12, 32)),
    "bottleneck 20": replace(WIDE, graph=dense_block(2, 16, 16, 20)),
    "channels 12: slices are not aligned": replace(WIDE, graph=dense_block(2, 12, 16, 32)),
    "float64": replace(WIDE, dtype=torch.float64),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_runs_in_triton(name: str, calls: Counter[str]) -> None:
    case = UNFIT[name]
    a = arguments(case)
    mine, exact = triton(case, a), twin(case, a, True)
    assert not calls
    assert error(mine.outputs[0], exact.outputs[0]) <= CLOSE[case.dtype]


def test_tf32(calls: Counter[str]) -> None:
    """In the 3x3 as if its inputs had 10 bits; the interpreter's products in Triton keep all of float32's."""
    case = CASES["float32"]
    a = arguments(case)
    mine, exact = triton(case, a, winograd=4), twin(case, a, True)
    assert calls == dict.fromkeys(PASSES, 2)
    assert 1e-5 < error(mine.outputs[0], exact.outputs[0]) < 2e-3


def test_inference(calls: Counter[str]) -> None:
    """CUDA C++ reads through a ReLU what a product's own ReLU has left."""
    cases.compare_inference(TRITON, replace(CASES["post"], frozen=(True,)))
    assert calls == {"forward": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inference_in_one_kernel_a_layer(
    dtype: torch.dtype, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the estimate says that two are faster, as for images so small."""
    case, layers = replace(CASES["frozen"], dtype=dtype), []
    one = cuda.layer
    monkeypatch.setattr(cuda, "takes_layer", lambda *_: True)
    monkeypatch.setattr(cuda, "layer", lambda *given: layers.append(one(*given)))
    cases.compare_inference(TRITON, case)
    assert len(layers) == 2 and not calls


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
    """The caller's gradient is a slice whose pixels are 7 channels too far apart."""
    a = arguments(WIDE)
    first, second = (triton(WIDE, b) for b in (a, replace(a, grads=[sliced(g) for g in a.grads])))
    assert calls["dgrad"] == calls["wgrad"] == 2 * 2
    assert all(map(torch.equal, first.gradients, second.gradients))


def test_a_gradient_of_one_pixel_at_any_offset() -> None:
    """A single row counts as contiguous wherever it begins."""
    case = replace(WIDE, size=(1, 1, 1), frozen=(True,))
    a = arguments(case)
    first, second = (triton(case, b) for b in (a, replace(a, grads=[sliced(g) for g in a.grads])))
    assert all(map(torch.equal, first.gradients, second.gradients))


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


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("chosen", ["native", "triton"])
def test_backward_runs_where_forward_did(chosen: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is chosen by then: the masks of the two differ in their last bits."""
    backends, transforms = (sys.modules[f"csp_kernels.{name}"] for name in ("backends", "ops._transforms"))
    monkeypatch.setattr(transforms, "resolve", lambda _: chosen)  # on the CPU too
    case = replace(WIDE, graph=dense_block(1, 16, 16, 32))
    a = arguments(case)
    x = a.inputs[0].requires_grad_()
    monkeypatch.setattr(backends, "_selected", chosen)
    (y,), _ = csp.ops.stage(case.graph, [x], [p.requires_grad_() for p in a.params])
    monkeypatch.setattr(backends, "_selected", "triton" if chosen == "native" else "native")
    y.backward(packed(torch.randn(y.shape)).to(y.dtype))
    assert calls == (dict.fromkeys(PASSES, 1) if chosen == "native" else {}) and x.grad is not None


@pytest.mark.usefixtures("operators")
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
