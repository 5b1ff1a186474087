"""The joined 1x1 convolution in Triton, interpreted on CPU tensors: called in place of the compiled operator, against
the reference in float64, and beside the compiled operator on the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import ConcatConvCase
from tolerances import error
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import concat_conv as kernels
from csp_kernels.ops._node import padded
from csp_kernels.ops.concat_conv import _CODES as CODES

OPS = torch.ops.csp_kernels
# of two good implementations, relative in the 2-norm
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
pytestmark = pytest.mark.usefixtures("native")


def Case(**given: Any) -> ConcatConvCase:
    return ConcatConvCase(**{"size": (2, 5, 7), **given})


TWO = {"splits": [5, 12], "act": "silu"}
CASES = {
    "two inputs": Case(),
    "one input": Case(channels=(17,)),
    "three inputs, two outputs": Case(channels=(5, 21, 12), out=17, options=TWO),
    "16 channels": Case(channels=(16, 32), out=32, size=(1, 3, 4), options={"splits": [16, 16]}),
    "three outputs": Case(channels=(48,), out=22, options={"splits": [5, 12, 5]}),
    "1x1 maps": Case(size=(128, 1, 1)),
    "many pixels": Case(channels=(3, 2), out=4, size=(1, 19, 17)),
    "frozen": Case(frozen=(True,), options={"act": "mish"}),
    "frozen, two outputs": Case(frozen=(True,), options=TWO),
}
names = pytest.mark.parametrize("name", CASES)
acts = pytest.mark.parametrize("act", CODES)


def check(case: ConcatConvCase) -> None:
    """Against the reference, by one seed where that leaves no doubt."""
    if case.dtype.itemsize == 2 or cases.too_large(case, cases.measure(case, [0])):
        cases.compare(case)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_the_reference(name: str, dtype: torch.dtype, triton: None) -> None:
    check(replace(CASES[name], dtype=dtype))


@acts
@pytest.mark.parametrize("splits", [None, [5, 12]], ids=["one output", "two"])
def test_activations(act: str, splits: list[int] | None, triton: None) -> None:
    options = {"act": act, "negative_slope": 0.1, "splits": splits}
    check(Case(options=options))
    check(Case(options=options, dtype=torch.float16, size=(1, 5, 4)))


def test_large_mean(triton: None) -> None:
    for options in ({}, TWO):
        check(Case(mean=1000.0, std=0.01, size=(2, 9, 8), options=options))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(name: str, dtype: torch.dtype, triton: None) -> None:
    cases.check_inference(replace(CASES[name], dtype=dtype, frozen=(True,)))


@acts
def test_inference_of_activations(act: str, triton: None) -> None:
    cases.check_inference(Case(frozen=(True,), options={"act": act, "negative_slope": 0.1}))


Arguments = list[Any]  # of the operator, in its order


def arguments(case: ConcatConvCase) -> Arguments:
    leaves = list(case.leaves().values())
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in leaves[: len(case.channels)]]
    running = case.running() or [None, None]
    act, splits = CODES[case.options.get("act", "relu")], case.options.get("splits") or [case.out]
    return [inputs, *leaves[len(case.channels) :], *running, 1e-3, act, 0.1, splits]


def run(forward: Any, backward: Any, a: Arguments, wanted: Sequence[int] | None = None) -> list[Tensor]:
    """Outputs, statistics, gradients of inputs and parameters."""
    generator = torch.Generator().manual_seed(1)
    y, raw, stats = forward(*a)
    assert raw.shape == (y[0].numel() // y[0].shape[1], sum(padded(c) for c in a[-1]))
    if forward is kernels.forward:
        raw[:, a[1].shape[0] :] = torch.nan  # not used
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in y]
    grads = [t.contiguous(memory_format=torch.channels_last) for t in grads]
    read = [t.clone() for t in (raw.nan_to_num(), stats, *grads, *a[0])]
    gradients = backward(grads, *a[:6], raw, stats, *a[6:], list(wanted or [1] * len(a[0])))
    assert all(map(torch.equal, read, (raw.nan_to_num(), stats, *grads, *a[0])))
    return [*y, stats, *gradients]


def triton_run(a: Arguments, **options: Any) -> list[Tensor]:
    return run(kernels.forward, kernels.backward, a, **options)


@names
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_against_the_compiled_operator(name: str, dtype: torch.dtype) -> None:
    """On the same arguments; and the layout of everything. In 16 bits with no ReLU that changes sides by rounding."""
    case = replace(CASES[name], dtype=dtype, kinks=dtype.itemsize > 2)
    a = arguments(case)
    mine, theirs = triton_run(a), run(OPS.concat_conv, OPS.concat_conv_backward, a)
    for t, u in zip(mine, theirs, strict=True):
        assert t.shape == u.shape and t.dtype == u.dtype and t.stride() == u.stride()
    names = [*(f"y{i}" for i in range(len(a[-1]))), "stats", *case.inputs, *case.shapes]
    scales = cases.scales(dict(zip(names, theirs, strict=True)))
    errors = {k: error(t, u, scales[k]) for k, t, u in zip(names, mine, theirs, strict=True)}
    if any(case.flags):
        del errors["stats"]
    assert all(e <= CLOSE[dtype] for e in errors.values()), errors


@acts
@pytest.mark.parametrize("splits", [None, [5, 12]], ids=["one output", "two"])
def test_activations_against_the_compiled_operator(act: str, splits: list[int] | None) -> None:
    a = arguments(Case(dtype=torch.float64, options={"act": act, "splits": splits}))
    mine, theirs = triton_run(a), run(OPS.concat_conv, OPS.concat_conv_backward, a)
    assert all(error(t, u) <= CLOSE[torch.float64] for t, u in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("splits", [[17], [5, 12]], ids=["one output", "two"])
def test_unwanted_gradients(splits: list[int]) -> None:
    """Come back empty; the others as ever."""
    a = arguments(Case(channels=(5, 12, 8), options={"splits": splits}))
    full, some = triton_run(a), triton_run(a, wanted=[0, 1, 0])
    at = len(splits) + 1
    assert some[at].shape == some[at + 2].shape == (0,)
    for i, (t, u) in enumerate(zip(some, full, strict=True)):
        assert i in (at, at + 2) or torch.equal(t, u)


def test_a_missing_gradient_counts_as_zero(triton: None) -> None:
    """Of an output that the loss does not read."""
    case = Case(dtype=torch.float64, options=TWO)
    leaves = {name: t.requires_grad_() for name, t in case.leaves().items()}
    results = []
    for where in (csp.ops, csp.reference):
        (_, y), _ = case(where, leaves, [])
        results.append(torch.autograd.grad(y.square().sum(), list(leaves.values())))
    assert all(error(t, u) <= 1e-12 for t, u in zip(*results, strict=True))


@pytest.mark.parametrize("act", ["silu", "mish", "hardswish", "leaky_relu"])
@pytest.mark.parametrize("splits", [None, [1, 2]], ids=["one output", "two"])
def test_gradcheck(act: str, splits: list[int] | None, triton: None) -> None:
    case = Case(channels=(3, 2), out=3, size=(2, 2, 3), dtype=torch.float64, options={"act": act, "splits": splits})
    leaves, running = case.leaves(), case.running()

    def function(*tensors: Tensor) -> Any:
        return tuple(case(csp.ops, dict(zip(leaves, tensors, strict=True)), running)[0])

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves.values()], fast_mode=True)


@pytest.mark.parametrize("splits", [None, [5, 12]], ids=["one output", "two"])
def test_layouts(splits: list[int] | None, triton: None) -> None:
    cases.check_layout(Case(dtype=torch.float64, options={"splits": splits}), "slice of NHWC")


@pytest.mark.parametrize("inference", [False, True])
def test_channels_last_weights(inference: bool) -> None:
    """A weight with its strides as channels_last models have them."""
    a = arguments(Case(frozen=(True,)))
    turned = [a[0], a[1].contiguous(memory_format=torch.channels_last), *a[2:]]
    if inference:
        return torch.testing.assert_close(kernels.inference(*turned), kernels.inference(*a), rtol=0, atol=0)
    first, second = triton_run(a), triton_run(turned)
    assert all(map(torch.equal, first, second)) and second[4].stride() == turned[1].stride()


@names
def test_repeats_bitwise(name: str) -> None:
    a = arguments(replace(CASES[name], dtype=torch.bfloat16))
    assert all(map(torch.equal, triton_run(a), triton_run(a)))


def test_empty_batch() -> None:
    a = arguments(Case(size=(0, 5, 4), options=TWO))
    first, second, stats, *gradients = triton_run(a)
    assert first.shape == (0, 5, 5, 4) and second.shape == (0, 12, 5, 4)
    assert not stats.any() and not any(g.any() for g in gradients)
    assert [y.shape for y in kernels.inference(*a)] == [first.shape, second.shape]


@pytest.mark.parametrize("setting, expected", [("highest", "ieee"), ("high", "tf32")])
def test_precision(setting: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 where less than float32's precision was asked for."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        launch = getattr(kernels.mix, name)

        def record(*given: Any, launch: Any = launch, **options: Any) -> Any:
            seen.extend(a for a in given if isinstance(a, str))
            return launch(*given, **options)

        monkeypatch.setattr(kernels.mix, name, record)
    torch.set_float32_matmul_precision(setting)
    a = arguments(Case(frozen=(True,)))
    triton_run(a)
    kernels.inference(*a)
    assert seen == [expected] * 3
