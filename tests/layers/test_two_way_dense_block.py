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
    return csp.TwoWayDenseBlock(layers, 12, 8, 1), csp.reference.TwoWayDenseBlock(layers, 12, 8, 1)


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


@pytest.mark.parametrize(
    ("channels", "width", "inter"),
    [(32, 1, [16, 16]), (128, 2, [32, 32]), (256, 4, [64, 64]), (24, 1, [12, 16]), (5, 1, [4, 16]), (64, 0.5, [8, 8])],
)
def test_bottleneck_widths_of_peleenet(channels: int, width: float, inter: list[int]) -> None:
    block = csp.TwoWayDenseBlock(2, channels, 32, width)
    assert [layer.branch1.conv1.out_channels for layer in block.children()] == inter
    assert [layer.branch2.conv1.out_channels for layer in block.children()] == inter
    assert [layer.branch2.conv3.out_channels for layer in block.children()] == [16, 16]


def test_bad_sizes() -> None:
    for arguments, message in (
        ((0, 8), "num_layers: got 0, expected at least 1"),
        ((2, 0), "in_channels: got 0"),
        ((2, 8, 0), "growth_rate: got 0"),
        ((2, 8, 5), "growth_rate: got 5, expected an even number"),
        ((2, 8, 4, 0), "bottleneck_width: got 0, expected more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            csp.TwoWayDenseBlock(*arguments)
