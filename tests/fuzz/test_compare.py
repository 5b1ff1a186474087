"""2,000 random comparisons of the layers with their twins; tests/fuzz/compare.py says how, and runs more of them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from compare import LAYERS, LAYOUTS, compare, make_case, shift_invariant

PARTS = 20


@pytest.mark.parametrize("part", range(PARTS))
def test_layers_equal_their_twins(part: int) -> None:
    failures = compare(range(part, 2000, PARTS))
    assert not failures, "\n".join(failures)


def test_large_means() -> None:
    """Means of 1000 deviations and more in float32, where they cancel before anything is rounded."""
    seeds = [seed for seed in range(3000) if shift_invariant(make_case(seed))]
    assert len(seeds) > 20
    failures = compare(seeds)
    assert not failures, "\n".join(failures)


def test_cases_vary() -> None:
    """Layers, dtypes, layouts, frozen norms, missing gradients, threads; and a seed is always the same case."""
    cases = [make_case(seed) for seed in range(400)]
    assert {c.layer for c in cases} == {*LAYERS}
    assert len({c.dtype for c in cases}) == 4 and {c.layout for c in cases} == {*LAYOUTS}
    assert {c.gradient_layout for c in cases} == {*LAYOUTS}
    assert {c.threads for c in cases} == {1, 2, 3, 5} and {c.context for c in cases} == {"grad", "no_grad", "inference"}
    frozen = [sum(not norm["training"] for norm in c.norms) / len(c.norms) for c in cases]
    assert {0.0, 1.0} < {*frozen} and len({c.wanted for c in cases}) == 6
    random.seed(1)
    assert make_case(3) == make_case(3)
