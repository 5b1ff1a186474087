"""What kernels move, counted, against what their algorithm must move."""

from __future__ import annotations

import pytest
from traffic import CASES


@pytest.mark.parametrize("name", CASES)
def test_images_are_moved_once_a_pass(name):
    case = CASES[name]
    got = case.count()
    assert case.floor * 0.99 <= got.unique <= case.floor * 1.1, (
        f"{got.unique:.0f} bytes a pixel, floor {case.floor:.0f}"
    )
