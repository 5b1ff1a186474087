"""The joined 1x1 convolution against its naive twin in float64: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, ConcatConvCase
from torch import Tensor

import csp_kernels as csp
from csp_kernels.vocabulary import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("native")
Case = ConcatConvCase
SHAPES = {
    "basic": Case(),
    "one input": Case(channels=(17,)),
    "three inputs": Case(channels=(5, 48, 12), out=5),
    "1x1 maps": Case(size=(8, 1, 1)),
    "one image": Case(size=(1, 7, 5)),
    "odd": Case(channels=(17, 5), out=12, size=(2, 9, 13)),
    "wide": Case(channels=(64, 48), out=48, size=(2, 16, 16)),
    "two outputs": Case(out=48, options={"splits": [17, 31]}),
    "three outputs": Case(channels=(48,), out=22, options={"splits": [5, 12, 5]}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_training(shape: str, dtype: torch.dtype) -> None:
    cases.compare(replace(SHAPES[shape], dtype=dtype))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("frozen", [(), (True,)], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(act: str, frozen: tuple[bool, ...], dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, frozen=frozen, options={"act": act, "negative_slope": 0.1})
    cases.compare(case)
    cases.compare(replace(case, kinks=False))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ["relu", "mish"])
def test_inference(shape: str, act: str) -> None:
    case = SHAPES[shape]
    for dtype in DTYPES:
        cases.check_inference(replace(case, dtype=dtype, frozen=(True,), options={**case.options, "act": act}))


def test_one_value_per_channel_with_running_statistics() -> None:
    cases.compare(Case(size=(1, 1, 1), frozen=(True,), dtype=torch.float64))


def test_large_mean() -> None:
    cases.compare(Case(mean=1000.0, std=0.01, size=(4, 14, 14)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits", [None, [5, 12]])
def test_layouts(layout: str, splits: list[int] | None) -> None:
    cases.check_layout(Case(dtype=torch.float64, options={"splits": splits}), layout)


def test_inputs_of_different_layouts_and_slices_of_one_tensor() -> None:
    """The memory format is the first input's."""
    case = Case(channels=(12, 12), dtype=torch.float64)
    leaves = case.leaves()
    joined = torch.cat([leaves["inputs.0"], leaves["inputs.1"]], 1)
    (plain,), _ = case(csp.ops, leaves, [])
    for layout in (torch.contiguous_format, torch.channels_last):
        both = joined.contiguous(memory_format=layout)
        mixed = {**leaves, "inputs.0": both[:, :12], "inputs.1": joined[:, 12:]}
        (y,), _ = case(csp.ops, mixed, [])
        torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
        assert y.is_contiguous(memory_format=layout)


def test_expanded() -> None:
    cases.check_expanded(Case(dtype=torch.float64, options={"act": "silu"}))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("frozen", [(), (True,)], ids=["train", "frozen"])
def test_gradcheck(act: str, frozen: tuple[bool, ...]) -> None:
    options = {"act": act, "splits": [2, 3]}
    cases.check_gradients(
        Case(channels=(3, 2), out=5, size=(2, 3, 2), dtype=torch.float64, frozen=frozen, options=options)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bitwise(dtype: torch.dtype) -> None:
    cases.check_repeats(Case(size=(5, 9, 9), dtype=dtype, options={"act": "mish", "splits": [5, 12]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_the_storage_dtype(dtype: torch.dtype) -> None:
    cases.check_storage_dtype(Case(dtype=dtype))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast(backend: str) -> None:
    cases.check_autocast(Case(), backend)


@pytest.mark.parametrize("frozen", [(), (True,)], ids=["train", "frozen"])
def test_empty_batch(frozen: tuple[bool, ...]) -> None:
    cases.check_empty(Case(size=(0, 7, 5), frozen=frozen, options={"splits": [5, 12]}))


def test_norm_without_affine_parameters() -> None:
    leaves = Case().leaves()
    *inputs, weight, gamma, beta = leaves.values()
    (bare,), _ = csp.ops.concat_conv(inputs, weight, None, None)
    (filled,), _ = csp.ops.concat_conv(inputs, weight, torch.ones_like(gamma), torch.zeros_like(beta))
    assert torch.equal(bare, filled)


def test_epsilon() -> None:
    cases.compare(Case(options={"eps": 0.5}))


def test_gradient_of_one_input_or_output_alone() -> None:
    case = Case(dtype=torch.float64, options={"splits": [5, 12]})
    leaves = case.leaves()
    outputs, _ = case(csp.ops, leaves, [])
    zero = [torch.randn_like(outputs[0]), torch.zeros_like(outputs[1])]
    whole = cases.run(case, csp.ops, leaves, [], zero)
    leaf = leaves["inputs.1"].clone().requires_grad_()
    outputs, _ = case(csp.ops, {**leaves, "inputs.1": leaf}, [])
    (gradient,) = torch.autograd.grad(outputs[0], leaf, zero[0])
    torch.testing.assert_close(gradient, whole["grad inputs.1"], rtol=1e-12, atol=1e-12)


# --- bad input ---

GOOD = Case(channels=(12, 5), out=8)


def arguments() -> dict[str, Any]:
    a, b, *rest = GOOD.leaves().values()
    return {"inputs": [a, b], **dict(zip(("weight", "norm_weight", "norm_bias"), rest, strict=True))}


def with_input(index: int, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    inputs: list[Any] = arguments()["inputs"]
    inputs[index] = change(inputs[index])
    return {"inputs": inputs}


BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "one tensor": (TypeError, "inputs: got Tensor, expected a sequence", lambda: {"inputs": torch.zeros(3, 17, 7, 5)}),
    "not a sequence": (TypeError, "inputs: got int", lambda: {"inputs": 3}),
    "no input": (ValueError, "inputs: got no tensor", lambda: {"inputs": []}),
    "not a tensor": (TypeError, r"inputs\[1\]: got list", lambda: with_input(1, lambda t: [1.0])),
    "3-D": (ValueError, r"inputs\[0\]: got 3 dimensions", lambda: with_input(0, lambda t: t[0])),
    "integers": (TypeError, r"inputs\[1\]: got torch.int64", lambda: with_input(1, Tensor.long)),
    "no rows": (ValueError, r"inputs\[0\]: got shape \[3, 12, 0, 5\]", lambda: with_input(0, lambda t: t[:, :, :0])),
    "channels": (
        ValueError,
        r"inputs: got 12 \+ 4 = 16 channels, expected 17, the input channels of weight",
        lambda: with_input(1, lambda t: t[:, :4]),
    ),
    "batch": (ValueError, r"inputs\[1\]: got shape .* expected \[3, c", lambda: with_input(1, lambda t: t[:2])),
    "height": (ValueError, r"inputs\[1\]: got shape \[3, 5, 6, 5\]", lambda: with_input(1, lambda t: t[:, :, 1:])),
    "dtypes": (
        TypeError,
        r"inputs\[1\]: got torch.float64, expected torch.float32",
        lambda: with_input(1, Tensor.double),
    ),
    "devices": (
        ValueError,
        r"inputs\[1\]: got .* on meta, expected cpu",
        lambda: with_input(1, lambda t: t.to("meta")),
    ),
    "one value": (
        ValueError,
        r"inputs\[0\]: got one value per channel",
        lambda: {"inputs": [t[:1, :, :1, :1] for t in arguments()["inputs"]]},
    ),
    "weight": (TypeError, "weight: got NoneType", lambda: {"weight": None}),
    "weight 2-D": (ValueError, r"weight: got shape \[8, 17\]", lambda: {"weight": torch.zeros(8, 17)}),
    "weight 3x3": (ValueError, "weight: got shape", lambda: {"weight": torch.zeros(8, 17, 3, 3)}),
    "weight dtype": (TypeError, "weight: got torch.bfloat16", lambda: {"weight": arguments()["weight"].bfloat16()}),
    "norm_weight": (
        ValueError,
        r"norm_weight: got shape \[7\], expected \[8\]",
        lambda: {"norm_weight": torch.zeros(7)},
    ),
    "norm_bias": (ValueError, "norm_bias: got .* meta", lambda: {"norm_bias": torch.zeros(8, device="meta")}),
    "running": (ValueError, "running: got 0 tensors, expected 2", lambda: {"frozen": True}),
    "running extra": (ValueError, "running: got 1 tensors, expected 0", lambda: {"running": [torch.zeros(8)]}),
    "running var": (
        ValueError,
        "running: norm var: got shape",
        lambda: {"frozen": True, "running": [torch.zeros(8), torch.zeros(7)]},
    ),
    "frozen": (TypeError, "frozen: got list", lambda: {"frozen": [False]}),
    "eps": (ValueError, "eps: got -1", lambda: {"eps": -1.0}),
    "eps list": (TypeError, "eps: got list", lambda: {"eps": [1e-5]}),
    "act": (
        ValueError,
        "act: got 'tanh', expected one of identity, relu, leaky_relu, silu, mish",
        lambda: {"act": "tanh"},
    ),
    "slope": (ValueError, "negative_slope: got nan", lambda: {"negative_slope": float("nan")}),
    "splits sum": (ValueError, r"splits: got \[3, 4\], .* add up to 8", lambda: {"splits": [3, 4]}),
    "splits zero": (ValueError, r"splits: got \[8, 0\]", lambda: {"splits": [8, 0]}),
    "splits empty": (ValueError, r"splits: got \[\]", lambda: {"splits": []}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(name: str, backend: str) -> None:
    kind, message, change = BAD[name]
    csp.use_backend(backend)
    with pytest.raises(kind, match=message):
        csp.ops.concat_conv(**{**arguments(), **change()})


def test_native_refuses_other_devices() -> None:
    meta = {k: [t.to("meta") for t in v] if k == "inputs" else v.to("meta") for k, v in arguments().items()}
    with pytest.raises(RuntimeError, match="backend 'native': got tensors on 'meta'"):
        csp.ops.concat_conv(**meta)
