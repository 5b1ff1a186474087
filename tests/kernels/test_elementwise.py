"""Sums of terms, interpreted: against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_activate import ACTIVATIONS, CLOSE
from tolerances import error
from torch import Tensor

from csp_kernels.kernels import elementwise
from csp_kernels.kernels.elementwise import After, Term
from csp_kernels.kernels.launch import Correction, Norm

PIXELS, CHANNELS = 150, 21  # several programs, the last one with fewer pixels
# Of each term: its activation, a capital letter for a norm in front of it.
CASES = {
    "two": (["identity", "identity"], "identity"),
    "residual": (["identity", "Identity"], "relu"),
    "activated": (["Relu", "silu"], "leaky_relu"),
    "three": (["Mish", "identity", "hardswish"], "silu"),
    "five": (["identity", "Relu", "relu", "Identity", "identity"], "mish"),
}
cases = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)


def vectors(dtype: torch.dtype) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(CHANNELS, dtype=wide) for _ in range(3)]


def draw(name: str, dtype: torch.dtype, buffers: Any) -> tuple[list[Term], str]:
    acts, act = CASES[name]
    terms = []
    for one in acts:
        x = buffers.put(torch.randn(PIXELS, CHANNELS).to(dtype))
        norm = Norm(*vectors(dtype)) if one[0].isupper() else None
        terms.append(Term(x, norm, ACTIVATIONS[one.lower()][0]))
    return terms, act


def exact(terms: list[Term], acts: Sequence[str]) -> Tensor:
    """The sum in float64."""
    total = torch.zeros(PIXELS, CHANNELS, dtype=torch.float64)
    for term, act in zip(terms, acts, strict=True):
        x = term.x.double()
        if term.norm is not None:
            x = (x - term.norm.mean.double()) * term.norm.scale.double() + term.norm.shift.double()
        total += ACTIVATIONS[act.lower()][1](x)
    return total


@cases
@dtypes
def test_add(name: str, dtype: torch.dtype, buffers: Any) -> None:
    terms, act = draw(name, dtype, buffers)
    out, stats = buffers.empty(PIXELS, CHANNELS, dtype), torch.full((2, CHANNELS), torch.nan, dtype=torch.float64)
    elementwise.add(terms, ACTIVATIONS[act][0], out, stats)
    assert error(out, ACTIVATIONS[act][1](exact(terms, CASES[name][0]))) <= CLOSE[dtype]
    torch.testing.assert_close(stats[0], out.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats[1], out.double().var(0, correction=0), rtol=1e-5, atol=1e-12)
    again = buffers.empty(PIXELS, CHANNELS, dtype)
    elementwise.add(terms, ACTIVATIONS[act][0], again)
    assert torch.equal(out, again)


@cases
@dtypes
@pytest.mark.parametrize("owes", [False, True])
def test_backward(name: str, dtype: torch.dtype, owes: bool, buffers: Any) -> None:
    terms, act = draw(name, dtype, buffers)
    d, y = (buffers.put(torch.randn(PIXELS, CHANNELS).to(dtype)) for _ in range(2))
    correction = Correction(*vectors(dtype)) if owes else None
    out = buffers.empty(PIXELS, CHANNELS, dtype)
    elementwise.backward(d, y if owes else None, correction, terms, ACTIVATIONS[act][0], out)
    given = d.double()
    if correction is not None:
        mean, slope, offset = (v.double() for v in (correction.mean, correction.slope, correction.offset))
        given = given - ((y.double() - mean) * slope + offset)
    total = exact(terms, CASES[name][0]).requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[act][1](total), total, given)
    assert error(out, expected) <= CLOSE[dtype]


@dtypes
def test_one_term_is_copied(dtype: torch.dtype, buffers: Any) -> None:
    x, out = buffers.put(torch.randn(PIXELS, CHANNELS).to(dtype)), buffers.empty(PIXELS, CHANNELS, dtype)
    stats = torch.full((2, CHANNELS), torch.nan, dtype=torch.float64)
    elementwise.add([Term(x)], ACTIVATIONS["identity"][0], out, stats)
    assert torch.equal(out, x)
    torch.testing.assert_close(stats[0], x.double().mean(0), rtol=1e-6, atol=1e-6)


@dtypes
def test_what_follows_a_product(dtype: torch.dtype, buffers: Any) -> None:
    """Applied to what lies in memory."""
    x, y = (torch.randn(PIXELS, CHANNELS).to(dtype) for _ in range(2))
    norm, other = Norm(*vectors(dtype)), Norm(*vectors(dtype))
    out = buffers.put(x)
    elementwise.apply_after(out, None)
    assert torch.equal(out, x)
    elementwise.apply_after(out, After(norm, ACTIVATIONS["silu"][0], Term(buffers.put(y), other)))
    expected = exact([Term(x, norm, ACTIVATIONS["silu"][0]), Term(y, other)], ["silu", "identity"])
    assert error(out, expected) <= CLOSE[dtype]


def test_what_owes_nothing_is_not_seen() -> None:
    """NaN in a channel of y whose slope is 0."""
    d, y = torch.ones(2, 2), torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    out, correction = torch.empty(2, 2), Correction(torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.0]))
    elementwise.backward(d, y, correction, [], ACTIVATIONS["identity"][0], out)
    assert torch.equal(out, torch.tensor([[0.75, 0.0], [0.75, 0.0]]))


def test_refuses_wrong_arguments() -> None:
    x, out, act = torch.zeros(4, 3), torch.zeros(4, 3), ACTIVATIONS["relu"][0]
    with pytest.raises(ValueError, match=r"terms: got \(4, 2\), expected \(4, 3\)"):
        elementwise.add([Term(x), Term(x[:, :2])], act, out)
    with pytest.raises(ValueError, match="go together"):
        elementwise.backward(x, x, None, [Term(x)], act, out)
    with pytest.raises(ValueError, match="statistics"):
        elementwise.add([Term(x)], act, out, torch.zeros(2, 2, dtype=torch.float64))
