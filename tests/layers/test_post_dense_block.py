"""The module against its naive twin: running statistics, modes, fallbacks, compilation, errors."""

from __future__ import annotations

import modes
import pytest
import torch
from modes import MODES
from torch import Tensor, nn

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")


def pair(layers: int = 2) -> tuple[nn.Module, nn.Module]:
    return csp.PostDenseBlock(layers, 12, 8, 2), csp.reference.PostDenseBlock(layers, 12, 8, 2)


def inputs(n: int) -> list[Tensor]:
    return [torch.randn(n, 12, 5, 4, dtype=torch.float64) * 2 + 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_three_steps_equal_the_naive_twin(mode: str, backend: str) -> None:
    csp.use_backend(backend)
    ours, naive = pair()
    modes.twins(ours, naive, MODES[mode])
    modes.check_three_steps(ours, naive, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager_for_any_batch_size(training: bool) -> None:
    block, naive = pair()
    modes.twins(block, naive, lambda module: module.train(training))
    modes.check_compiled(block, inputs)


def test_other_children_run_the_reference() -> None:
    ours, naive = (block.double() for block in pair())
    path = next(name for name, m in reversed(list(ours.named_modules())) if isinstance(m, nn.BatchNorm2d))
    parent, _, name = path.rpartition(".")
    for block in (ours, naive):
        channels = block.get_submodule(path).num_features
        setattr(block.get_submodule(parent), name, nn.GroupNorm(1, channels).double())
    naive.load_state_dict(ours.state_dict())
    modes.check_fallback(ours, naive, inputs(2), f"{path} is a GroupNorm")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input_changes_no_statistics(backend: str) -> None:
    csp.use_backend(backend)
    block, _ = pair()
    modes.check_state_survives(block, ValueError, "x: got 11 channels", [torch.zeros(2, 11, 4, 4)])
    modes.check_state_survives(block, ValueError, "x: got one value per channel", [torch.zeros(1, 12, 1, 1)])


def test_bad_sizes() -> None:
    good = {"num_layers": 2, "in_channels": 8, "growth_rate": 4, "bn_size": 2}
    for name in good:
        with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
            csp.PostDenseBlock(**{**good, name: 0})
