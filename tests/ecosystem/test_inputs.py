"""Inputs that are no dense batch of real images: one sentence that names the argument, what came and what helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import csp_kernels as csp

X = torch.zeros(2, 4, 4, 4)

INPUTS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "numpy": (TypeError, r"got ndarray, expected a Tensor .*torch.as_tensor", lambda: X.numpy()),
    "unbatched": (ValueError, r"got 3 dimensions .*unsqueeze\(0\)", lambda: X[0]),
    "sparse": (TypeError, r"got a tensor of layout sparse_coo, expected a dense one; .*to_dense\(\)", X.to_sparse),
    "csr": (TypeError, r"got a tensor of layout sparse_csr, expected a dense one", lambda: X[0, 0].to_sparse_csr()),
    "mkldnn": (TypeError, r"got a tensor of layout mkldnn, expected a dense one; .*to_dense\(\)", X.to_mkldnn),
    "nested": (
        TypeError,
        "got a nested tensor, expected images of one size",
        lambda: torch.nested.nested_tensor([X[0]] * 2),
    ),
    "jagged": (
        TypeError,
        "got a nested tensor, expected images of one size",
        lambda: torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged),
    ),
    "quantised": (
        TypeError,
        r"got torch.quint8, expected float32.*dequantize\(\)",
        lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
    ),
    "complex": (TypeError, r"got torch.complex64, expected float32.*view_as_real", X.cfloat),
    "integers": (TypeError, r"got torch.int32, expected float32.*float\(\)", X.int),
    "bool": (TypeError, r"got torch.bool, expected float32.*float\(\)", X.bool),
    "float8": (TypeError, r"got torch.float8_e4m3fn, expected float32", lambda: X.to(torch.float8_e4m3fn)),
}


def layer(name: str, x: Any) -> Any:
    if name == "dense_block":
        return csp.DenseBlock(1, 4, 2, 2)(x)
    if name == "post_dense_block":
        return csp.PostDenseBlock(1, 4, 2, 2)(x)
    if name == "two_way_dense_block":
        return csp.TwoWayDenseBlock(1, 4, 4)(x)
    if name == "concat_conv":
        return csp.ops.concat_conv([X, x], torch.zeros(3, 8, 1, 1), None, None)
    if name == "partial_transition":
        weights = [None, None, torch.zeros(3, 4, 1, 1), None, None, torch.zeros(3, 7, 1, 1)]
        return csp.ops.partial_transition(x, X, weights)
    params = [*csp.DenseBlock(1, 2, 2, 2).parameters(), None, None, torch.zeros(3, 4, 1, 1)]
    return csp.ops.csp_stage(x, params, part_channels=2, fusion="last")


ARGUMENTS = {
    "dense_block": "x",
    "post_dense_block": "x",
    "two_way_dense_block": "x",
    "concat_conv": r"inputs\[1\]",
    "partial_transition": "part",
    "csp_stage": "x",
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore")
def test_refused_in_one_sentence(name: str, kind: str) -> None:
    error, message, make = INPUTS[kind]
    with pytest.raises(error, match=f"^{ARGUMENTS[name]}: {message}") as caught:
        layer(name, make())
    assert kind != "complex" or "float()" not in str(caught.value)


def test_sparse_parameters() -> None:
    params: list[Tensor] = [p.detach() for p in csp.DenseBlock(1, 4, 2, 2).parameters()]
    params[2] = params[2].to_sparse()
    with pytest.raises(TypeError, match=r"conv1.weight: got a tensor of layout sparse_coo, expected a dense one"):
        csp.ops.dense_block(X, params)
