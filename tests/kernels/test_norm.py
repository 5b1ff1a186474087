"""What norms take from the gradient of a value, in float32 around a mean that float32 does not have."""

from __future__ import annotations

import pytest
import torch

from csp_kernels.kernels.norm import due


@pytest.mark.parametrize("added", [False, True], ids=["taken off", "added"])
def test_what_is_due_keeps_what_float32_loses_of_the_mean(added: bool) -> None:
    n = 5
    mean = torch.full((n,), 1000 + 1 / 3, dtype=torch.float64)
    owed = torch.stack([torch.rand(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64) * 1e4 + 1e4])
    correction = due(owed, mean, torch.empty(0, dtype=torch.float32), added)
    lost = mean - correction.mean
    got = correction.offset.double() + lost * correction.slope  # at the mean itself
    expected = -owed[0] if added else owed[0]
    assert (lost.abs() * owed[1] > 0.1).all()
    assert ((got - expected).abs() <= 1e-6).all()
