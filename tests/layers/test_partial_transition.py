"""The module against its naive twin: running statistics, modes, fallbacks, compilation, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modes
import pytest
import torch
from modes import MODES
from torch import Tensor, nn

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
KINDS: dict[str, dict[str, Any]] = {
    f"{fusion}, {order}, {pool}": {"fusion": fusion, "order": order, "pool": pool}
    for fusion in ("csp", "first", "last")
    for order in ("post", "pre")
    for pool in ("avg", None)
}


def pair(part: int = 5, **kind: Any) -> tuple[csp.PartialTransition, csp.reference.PartialTransition]:
    sizes = part, 12, 9, part + 9
    return csp.PartialTransition(*sizes, **kind), csp.reference.PartialTransition(*sizes, **kind)


def inputs(part: int = 5, layout: torch.memory_format = torch.contiguous_format) -> Callable[[int], list[Any]]:
    def make(n: int) -> list[Tensor | None]:
        x = (torch.randn(n, part + 12, 5, 6, dtype=torch.float64) * 2 + 1).contiguous(memory_format=layout)
        return [x[:, :part] if part else None, x[:, part:]]

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_equal_the_naive_twin(mode: str, kind: str) -> None:
    """With pooling u's norm sees another number of values than t's."""
    ours, naive = pair(**KINDS[kind])
    modes.twins(ours, naive, MODES[mode])
    modes.check_three_steps(ours, naive, inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_without_bypass_and_on_the_reference(kind: str) -> None:
    for part, backend in ((0, "native"), (0, "reference"), (5, "reference")):
        csp.use_backend(backend)
        ours, naive = pair(part, **KINDS[kind])
        modes.twins(ours, naive)
        modes.check_three_steps(ours, naive, inputs(part))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "avg" in kind])
def test_compiled_equals_eager_for_any_batch_size(kind: str) -> None:
    layer, naive = pair(**KINDS[kind])
    modes.twins(layer, naive)
    modes.check_compiled(layer, inputs(layout=torch.channels_last))


def test_compiled_eval() -> None:
    for part in (0, 5):
        layer, naive = pair(part)
        modes.twins(layer, naive, nn.Module.eval)
        modes.check_compiled(layer, inputs(part))


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool) -> None:
    for kind in KINDS.values():
        ours, naive = pair(**kind)
        modes.twins(ours, naive, lambda module: module.train(training))
        for module in (ours, naive):
            module(*inputs()(0))
        modes.check_same_state(ours, naive)


def test_children() -> None:
    keys = {kind: {name for name, _ in pair(fusion=kind)[0].named_children()} for kind in ("csp", "first", "last")}
    assert keys == {"csp": {"t", "u"}, "first": {"u"}, "last": {"t"}}
    layer, _ = pair(order="pre", pool=None)
    assert (layer.t.norm.num_features, layer.u.norm.num_features) == (12, 14)
    assert "fusion='csp', pool=None, order='pre'" in repr(layer)


@pytest.mark.parametrize(("child", "message"), [("t", "t.norm is a GroupNorm"), ("u", "u.norm is a GroupNorm")])
def test_other_children_run_the_reference(child: str, message: str) -> None:
    ours, naive = (layer.double() for layer in pair())
    for layer in (ours, naive):
        unit = layer.get_submodule(child)
        unit.norm = nn.GroupNorm(1, unit.norm.num_features).double()
    naive.load_state_dict(ours.state_dict())
    modes.check_fallback(ours, naive, inputs()(2), message)


def test_bad_arguments() -> None:
    good = {"part_channels": 5, "dense_channels": 12, "mid_channels": 9, "out_channels": 14}
    for name, value, message in (
        ("part_channels", -1, "part_channels: got -1, expected at least 0"),
        ("dense_channels", 0, "dense_channels: got 0, expected at least 1"),
        ("mid_channels", 0, "mid_channels: got 0"),
        ("out_channels", -2, "out_channels: got -2"),
        ("fusion", "none", "fusion: got 'none', expected one of csp, first, last"),
        ("pool", "max", "pool: got 'max', expected one of avg, None"),
        ("order", "mid", "order: got 'mid', expected one of post, pre"),
    ):
        with pytest.raises(ValueError, match=message):
            csp.PartialTransition(**{**good, name: value})
    with pytest.raises(ValueError, match=r"out_channels: got 15, expected 14, part_channels \+ mid_channels"):
        csp.PartialTransition(5, 12, 9, 15, fusion="last")
    csp.PartialTransition(5, 12, 0, 15, fusion="first")  # no first transition


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input_changes_no_statistics(backend: str) -> None:
    csp.use_backend(backend)
    layer, _ = pair()
    part, dense = torch.zeros(2, 5, 4, 4), torch.zeros(2, 12, 4, 4)
    for arguments, error, message in (
        ([None, dense], ValueError, r"part: got None, expected a Tensor \[N, 5, H, W\]"),
        ([part[:, 1:], dense], ValueError, "part: got 4 channels .*, expected 5"),
        ([part, dense[:, 1:]], ValueError, "dense: got 11 channels .*, expected 12"),
        ([part, [1.0]], TypeError, "dense: got list"),
        ([part[:1], dense], ValueError, "part: got shape"),
        ([part.double(), dense.double()], TypeError, "t.norm.weight: got torch.float32, expected torch.float64"),
        ([part[:, :, :1], dense[:, :, :1]], ValueError, "dense: got size 1x4"),
        ([part[:1, :, :2, :2], dense[:1, :, :2, :2]], ValueError, "one value per channel after pooling"),
    ):
        modes.check_state_survives(layer, error, message, arguments)
    none, _ = pair(0)
    modes.check_state_survives(
        none, ValueError, "part: got 5 channels .* expected None: part_channels is 0", [part, dense]
    )
