"""What a norm takes from the gradient of its input, in float32 around a mean that float32 does not have."""

from __future__ import annotations

import torch

from csp_kernels.kernels.norm import BatchNorm


def test_correction_keeps_what_float32_loses_of_the_mean() -> None:
    pixels, n = 64, 5
    mean = torch.full((n,), 1000 + 1 / 3, dtype=torch.float64)
    norm = BatchNorm(mean, torch.full((n,), 1e-4, dtype=torch.float64), torch.ones(n), torch.zeros(n), 0.0, False)
    sums = torch.stack([torch.rand(n), torch.rand(n) + 1])
    _, _, correction = norm.settle(sums, pixels)
    assert correction is not None
    # at the mean itself only the sum of dn is taken: gamma * rstd * sum / P
    lost = mean - correction.mean
    got = correction.offset.double() + lost * correction.slope
    expected = -100 * sums[0].double() / pixels
    assert (lost != 0).all() and ((got - expected).abs() <= 1e-6 * expected.abs().max()).all()
