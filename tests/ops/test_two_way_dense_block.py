"""The two-way dense block against its naive twin in float64: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, BlockCase

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
BASIC = BlockCase(layer="two_way")
SHAPES = {
    "basic": BASIC,
    "1x1 maps": replace(BASIC, size=(128, 1, 1)),  # fewer values leave two 3x3s in a row badly conditioned
    "one image": replace(BASIC, size=(1, 7, 5)),
    "odd widths": replace(BASIC, channels=17, growth=10, width=5, layers=3, size=(2, 9, 13)),
    "48": replace(BASIC, channels=48, growth=48, width=48, size=(2, 8, 8)),
    "one layer": replace(BASIC, channels=5, layers=1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_training(shape: str, dtype: torch.dtype) -> None:
    case = replace(SHAPES[shape], dtype=dtype)
    cases.compare(case)
    cases.compare(replace(case, kinks=False))


@pytest.mark.parametrize("frozen", [(True,), (True, False, False), (False, True)], ids=["all", "third", "second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_norms(frozen: tuple[bool, ...], dtype: torch.dtype) -> None:
    cases.compare(replace(BASIC, dtype=dtype, frozen=frozen))


@pytest.mark.parametrize("shape", SHAPES)
def test_inference(shape: str) -> None:
    for dtype in DTYPES:
        cases.check_inference(replace(SHAPES[shape], dtype=dtype, frozen=(True,)))


def test_large_mean() -> None:
    cases.compare(replace(BASIC, mean=1000.0, std=0.01, size=(4, 14, 14)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    cases.check_layout(replace(BASIC, dtype=torch.float64), layout)


def test_expanded_empty_and_storage_dtypes() -> None:
    cases.check_expanded(replace(BASIC, dtype=torch.float64))
    cases.check_empty(replace(BASIC, size=(0, 7, 5)))
    cases.check_storage_dtype(replace(BASIC, dtype=torch.bfloat16))
    for backend in ("native", "reference"):
        cases.check_autocast(BASIC, backend)


@pytest.mark.parametrize("frozen", [(), (True,), (True, False, False)], ids=["train", "frozen", "mixed"])
def test_gradcheck(frozen: tuple[bool, ...]) -> None:
    small = {"channels": 3, "growth": 2, "width": 3, "layers": 2, "size": (2, 3, 2), "dtype": torch.float64}
    cases.check_gradients(replace(BASIC, **small, frozen=frozen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bitwise(dtype: torch.dtype) -> None:
    cases.check_repeats(replace(BASIC, size=(5, 9, 9), dtype=dtype))


def test_first_channels_are_the_input() -> None:
    case = replace(BASIC, dtype=torch.bfloat16)
    leaves = case.leaves()
    (y,), _ = case(csp.ops, leaves, [])
    assert torch.equal(y[:, : case.channels], leaves["x"])


# --- bad input ---

X, *PARAMS = BASIC.leaves().values()
NORMS = len(BASIC.norms)
BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "not a tensor": (TypeError, "x: got list", lambda: {"x": [1.0]}),
    "channels": (ValueError, "x: got 23 channels .* expected 24, the input channels of", lambda: {"x": X[:, 1:]}),
    "dtype": (TypeError, "conv1.weight: got torch.float32, expected torch.float64", lambda: {"x": X.double()}),
    "one value": (ValueError, "x: got one value per channel", lambda: {"x": X[:1, :, :1, :1]}),
    "count": (ValueError, f"params: got {len(PARAMS) - 1}, expected", lambda: {"params": PARAMS[1:]}),
    "none": (ValueError, "params: got 0", lambda: {"params": []}),
    "weight": (TypeError, "layer 0 .*conv1.weight: got NoneType", lambda: {"params": [None, *PARAMS[1:]]}),
    "norm": (ValueError, "layer 1 .*bias: got shape", lambda: {"params": [*PARAMS[:-1], torch.zeros(5)]}),
    "frozen": (ValueError, f"frozen: got 1 flags, expected {NORMS}", lambda: {"frozen": [True]}),
    "running": (ValueError, "running: got 0 tensors", lambda: {"frozen": [True] * NORMS}),
    "eps": (ValueError, "eps: got 0", lambda: {"eps": 0.0}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(name: str, backend: str) -> None:
    kind, message, change = BAD[name]
    csp.use_backend(backend)
    with pytest.raises(kind, match=message):
        csp.ops.two_way_dense_block(**{"x": X, "params": PARAMS, **change()})
