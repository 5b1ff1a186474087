"""The bounds guard itself: what it must refuse, and what it must not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy(x, pitch, out, rows, columns, more_rows, more_columns, SIZE: tl.constexpr):
    """more: of what is stored."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    value = tl.load(x + i * pitch + j, mask=(i < rows) & (j < columns), other=0.0)
    tl.store(out + i * 8 + j, value, mask=(i < rows + more_rows) & (j < columns + more_columns))


@triton.jit
def _through(x, out, offset):
    tl.store(out, tl.load(x + offset))


@triton.jit
def _add(out, offset):
    tl.atomic_add(out + offset, 1.0)


def copy(rows: int, columns: int, more_rows: int = 0, more_columns: int = 0) -> None:
    """Between views [5, 6] of rows of 8."""
    x, out = (torch.zeros(7, 8)[1:-1, 1:7] for _ in range(2))
    _copy[(1,)](x, 8, out, rows, columns, more_rows, more_columns, SIZE=16)


def test_views_may_be_used_up():
    copy(5, 6)
    copy(0, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, 7), "load outside x"),  # a channel beside the slice, in the same memory
        ((6, 6), "load outside x"),
        ((5, 6, 1, 0), "store outside out"),
        ((5, 6, 0, 1), "store outside out"),
    ],
)
def test_beside_a_view(given, message):
    with pytest.raises(Exception, match=f"_copy: {message}"):
        copy(*given)


def test_in_the_memory_of_another_argument():
    both = torch.zeros(8)
    _through[(1,)](both[:4], both[4:], 3)
    for offset in (-1, 4):
        with pytest.raises(Exception, match="_through: load outside x"):
            _through[(1,)](both[:4], both[4:], offset)


def test_atomics():
    x = torch.zeros(8)
    _add[(1,)](x[:4], 3)
    with pytest.raises(Exception, match="_add: atomic outside out"):
        _add[(1,)](x[:4], 4)
