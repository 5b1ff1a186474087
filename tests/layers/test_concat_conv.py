"""The module against its naive twin: running statistics, modes, fallbacks, compilation, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import modes
import pytest
import torch
from modes import MODES
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.vocabulary import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("native")


class Joined(nn.Module):
    """Takes its inputs one by one, for the shared checks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Any:
        return self.layer(inputs)


def pair(*arguments: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    return Joined(csp.ConcatConv(*arguments, **options)), Joined(csp.reference.ConcatConv(*arguments, **options))


def inputs(channels: Sequence[int] = (5, 12), dtype: torch.dtype = torch.float64) -> Callable[[int], list[Tensor]]:
    return lambda n: [torch.randn(n, c, 5, 4, dtype=dtype) * 2 + 1 for c in channels]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_three_steps_equal_the_naive_twin(mode: str, backend: str) -> None:
    csp.use_backend(backend)
    ours, naive = pair([5, 12], [9, 8])
    modes.twins(ours, naive, MODES[mode])
    modes.check_three_steps(ours, naive, inputs())


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    ours, naive = pair([5, 12], 17, act=act, negative_slope=0.1)
    modes.twins(ours, naive)
    modes.check_three_steps(ours, naive, inputs())


def test_one_tensor_and_one_or_several_outputs() -> None:
    x = torch.randn(2, 12, 5, 5)
    layer = csp.ConcatConv([12], 8).eval()
    assert torch.equal(layer(x), layer([x])) and torch.equal(csp.ConcatConv(12, 8).eval()(x).relu(), layer(x)) is False
    halves = csp.ConcatConv([12], [3, 5]).eval()
    halves.load_state_dict(layer.state_dict())
    first, second = halves(x)
    assert isinstance(halves(x), tuple) and first.shape[1] == 3
    torch.testing.assert_close(torch.cat((first, second), 1), layer(x))


@pytest.mark.parametrize("change", [None, "eval", "cumulative"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_equals_eager_for_any_batch_size(change: str | None, channels_last: bool) -> None:
    layer, naive = pair([5, 12], [9, 8], act="leaky_relu")
    changes: dict[str | None, Callable[[nn.Module], Any]] = {
        None: nn.Module.train,
        "eval": nn.Module.eval,
        "cumulative": MODES["momentum None"],
    }
    modes.twins(layer, naive, changes[change])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    modes.check_compiled(layer, lambda n: [t.contiguous(memory_format=layout) for t in inputs()(n)])


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool) -> None:
    ours, naive = pair([5, 12], 8)
    modes.twins(ours, naive, lambda module: module.train(training))
    for module in (ours, naive):
        module(*inputs()(0))
    modes.check_same_state(ours, naive)


def test_other_children_run_the_reference() -> None:
    for change, message in (
        (lambda layer: setattr(layer, "norm", nn.GroupNorm(2, 8)), "norm is a GroupNorm, not an nn.BatchNorm2d"),
        (lambda layer: setattr(layer, "conv", nn.Conv2d(17, 8, 1)), "conv is not a plain nn.Conv2d"),
    ):
        ours, naive = csp.ConcatConv([5, 12], 8), csp.reference.ConcatConv([5, 12], 8)
        for layer in (ours, naive):
            change(layer)
        naive.load_state_dict(ours.state_dict())
        modes.check_fallback(ours, naive, [inputs(dtype=torch.float32)(2)], message)
        csp.use_backend("native")


def test_bad_arguments() -> None:
    for arguments, message in (
        (([], 8), r"in_channels: got \[\], expected one or more sizes of at least 1"),
        (([5, 0], 8), r"in_channels: got \[5, 0\]"),
        (([5], 0), "out_channels: got 0"),
        (([5], []), r"out_channels: got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            csp.ConcatConv(*arguments)
    with pytest.raises(ValueError, match="act: got 'tanh', expected one of identity, relu, leaky_relu"):
        csp.ConcatConv([5], 8, act="tanh")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input_changes_no_statistics(backend: str) -> None:
    csp.use_backend(backend)
    layer, a, b = csp.ConcatConv([5, 12], 8), torch.zeros(2, 5, 4, 4), torch.zeros(2, 12, 4, 4)
    for given, error, message in (
        ([a], ValueError, r"inputs: got tensors of \[5\] channels, expected \[5, 12\]"),
        ([b, a], ValueError, r"inputs: got tensors of \[12, 5\] channels"),
        ([a, b[:1]], ValueError, r"inputs\[1\]: got shape"),
        ([a, b.double()], TypeError, r"inputs\[1\]: got torch.float64"),
        ([a.double(), b.double()], TypeError, "weight: got torch.float32, expected torch.float64"),
        ([a[:1, :, :1, :1], b[:1, :, :1, :1]], ValueError, "got one value per channel"),
        (3, TypeError, "inputs: got int"),
    ):
        modes.check_state_survives(layer, error, message, [given])
