"""The exercise of a maintainer who adds a kind of stage: the graph is all that it takes."""

from __future__ import annotations

import inspect

import pytest
import torch
from stage_cases import csp_stage_of_3x3

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_its_reference(dtype: torch.dtype) -> None:
    """By the kernels on the CPU; tests/kernels/test_stage.py has the same graph on a GPU's."""
    stage = csp.Stage(csp_stage_of_3x3()).to(dtype)
    assert not csp.explain(stage, torch.randn(2, 12, 9, 10, dtype=dtype)).unsupported
    verdict = csp.check(stage, torch.randn(2, 12, 9, 10, dtype=dtype))
    assert verdict, str(verdict)


def test_takes_25_lines() -> None:
    assert len(inspect.getsource(csp_stage_of_3x3).splitlines()) <= 25
