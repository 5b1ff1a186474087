"""The module against its naive twin: running statistics, modes, fallbacks, compilation, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import modes
import pytest
import torch
from modes import MODES
from torch import Tensor, nn

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
LAYERS = ["pre", "post", "two_way"]
FUSIONS = ["csp", "first", "last"]


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    sizes = 17, 22, 2, 8, 2
    return csp.CSPDenseStage(*sizes, **options), csp.reference.CSPDenseStage(*sizes, **options)


def inputs(layout: torch.memory_format = torch.contiguous_format) -> Callable[[int], list[Tensor]]:
    return lambda n: [(torch.randn(n, 17, 5, 6, dtype=torch.float64) * 2 + 1).contiguous(memory_format=layout)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_three_steps_equal_the_naive_twin(mode: str, layer: str, recompute: str) -> None:
    ours, naive = pair(layer=layer, recompute=recompute)
    modes.twins(ours, naive, MODES[mode])
    modes.check_three_steps(ours, naive, inputs())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pool", ["avg", None])
@pytest.mark.parametrize("part_ratio", [0, 0.25, 0.75])
def test_every_kind(layer: str, fusion: str, pool: str | None, part_ratio: float) -> None:
    for backend in ("native", "reference"):
        csp.use_backend(backend)
        ours, naive = pair(layer=layer, fusion=fusion, pool=pool, part_ratio=part_ratio)
        modes.twins(ours, naive)
        modes.check_three_steps(ours, naive, inputs())


@pytest.mark.parametrize(
    ("layer", "fusion"), [("pre", "csp"), ("pre", "first"), ("pre", "last"), ("post", "csp"), ("two_way", "csp")]
)
def test_compiled_equals_eager_for_any_batch_size(layer: str, fusion: str) -> None:
    stage, naive = pair(layer=layer, fusion=fusion)
    modes.twins(stage, naive)
    modes.check_compiled(stage, inputs(torch.channels_last))


@pytest.mark.parametrize("layer", LAYERS)
def test_compiled_eval(layer: str) -> None:
    stage, naive = pair(layer=layer, part_ratio=0, pool=None)
    modes.twins(stage, naive, nn.Module.eval)
    modes.check_compiled(stage, inputs())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(layer: str, training: bool) -> None:
    ours, naive = pair(layer=layer)
    modes.twins(ours, naive, lambda module: module.train(training))
    for module in (ours, naive):
        (y,) = modes.outputs(module, inputs()(0))
        assert y.shape == (0, 22, 2, 3)
    modes.check_same_state(ours, naive)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_statistics(layer: str, dtype: torch.dtype) -> None:
    """Without gradients; parameters and buffers in the dtype of x."""
    ours, naive = pair(layer=layer)
    modes.twins(ours, naive)
    bound = 16 * torch.finfo(dtype).eps
    with torch.no_grad():
        for module in (ours.to(dtype), naive.to(dtype)):
            torch.manual_seed(1)
            for _ in range(3):
                module(torch.randn(4, 17, 5, 6).to(dtype))
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=bound, atol=bound, msg=name)


def test_block_and_transition_are_the_stage() -> None:
    for layer in LAYERS:
        stage, _ = pair(layer=layer)
        other = copy.deepcopy(stage)
        x = torch.randn(2, 17, 6, 6)
        part = stage.part_channels
        expected = other.transition(x[:, :part], other.dense(x[:, part:]))
        torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)
        for name, value in other.state_dict().items():
            torch.testing.assert_close(stage.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "fusion", "mid"),
    [
        ("pre", "csp", (24 + 16) // 2),
        ("post", "csp", 40),
        ("two_way", "csp", 40),
        ("pre", "last", 24),
        ("post", "last", 24),
    ],
)
def test_default_widths(layer: str, fusion: str, mid: int) -> None:
    stage = csp.CSPDenseStage(32, 32, 2, 8, 2, part_ratio=0.25, layer=layer, fusion=fusion)
    assert stage.part_channels == 8 and stage.transition.t.conv.weight.shape == (mid, 40, 1, 1)
    assert stage.transition.order == ("pre" if layer == "pre" else "post")
    blocks = {"pre": csp.DenseBlock, "post": csp.PostDenseBlock, "two_way": csp.TwoWayDenseBlock}
    assert type(stage.dense) is blocks[layer] and type(stage.transition) is csp.PartialTransition
    given = csp.CSPDenseStage(32, 32, 2, 8, mid_channels=13, layer=layer)
    assert given.transition.t.conv.out_channels == 13


def test_split_is_rounded_and_the_bypass_first() -> None:
    assert [csp.CSPDenseStage(10, 8, 1, 4, part_ratio=r).part_channels for r in (0, 0.24, 0.26, 0.5, 0.75)] == [
        0,
        2,
        3,
        5,
        8,
    ]
    stage = csp.CSPDenseStage(8, 12, 1, 4, fusion="last", pool=None)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(stage(x)[:, :4], x[:, :4])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dense.denselayer2.norm2", "dense.denselayer2.norm2 is a GroupNorm"),
        ("transition.u.norm", "transition.u.norm is a GroupNorm"),
    ],
)
def test_other_children_run_the_reference(path: str, message: str) -> None:
    ours, naive = pair()
    parent, _, name = path.rpartition(".")
    for stage in (ours, naive):
        norm = stage.get_submodule(path)
        setattr(stage.get_submodule(parent), name, nn.GroupNorm(1, norm.num_features))
    for stage in (ours, naive):
        stage.double()
    naive.load_state_dict(ours.state_dict())
    modes.check_fallback(ours, naive, inputs()(2), message)


def test_sync_norms_in_eval_run_the_reference() -> None:
    ours, naive = (nn.SyncBatchNorm.convert_sync_batchnorm(stage).eval() for stage in pair())
    naive.load_state_dict(ours.state_dict())
    csp.use_backend("auto")
    x = torch.randn(2, 17, 6, 6)
    with pytest.warns(RuntimeWarning, match="dense.denselayer1.norm1 is a SyncBatchNorm"):
        y = ours(x)
    torch.testing.assert_close(y, naive(x), rtol=1e-4, atol=1e-5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ratio 1": ({"part_ratio": 1.0}, "part_ratio: got 1.0, expected 0 <= part_ratio < 1"),
    "ratio -0.1": ({"part_ratio": -0.1}, "part_ratio: got -0.1"),
    "ratio nan": ({"part_ratio": float("nan")}, "part_ratio: got nan"),
    "no dense part": ({"part_ratio": 0.99}, "part_ratio: got 0.99, which gives 17 of 17 channels to the bypass"),
    "no bypass": ({"part_ratio": 0.01}, "part_ratio: got 0.01, which gives 0 of 17 channels .*0 for no bypass"),
    "layer": ({"layer": "mid"}, "layer: got 'mid', expected one of pre, post, two_way"),
    "fusion": ({"fusion": "none"}, "fusion: got 'none', expected one of csp, first, last"),
    "pool": ({"pool": "max"}, "pool: got 'max', expected one of avg, None"),
    "recompute": ({"recompute": "all"}, "recompute: got 'all', expected one of none, bottleneck"),
    "mid": ({"mid_channels": 0}, "mid_channels: got 0"),
    "mid of first": ({"mid_channels": 8, "fusion": "first"}, "mid_channels: got 8, expected None for fusion 'first'"),
    "mid of last": ({"mid_channels": 8, "fusion": "last"}, "out_channels: got 22, expected 16"),
    "in_channels": ({"in_channels": 0}, "in_channels: got 0"),
    "out_channels": ({"out_channels": 0}, "out_channels: got 0"),
    "out of last": (
        {"out_channels": 8, "fusion": "last"},
        "out_channels: got 8, expected more than the 8 of the bypass",
    ),
    "layers": ({"num_layers": 0}, "num_layers: got 0"),
    "odd growth": ({"growth_rate": 5, "layer": "two_way"}, "growth_rate: got 5, expected an even number"),
    "bottleneck": ({"bn_size": 0, "layer": "two_way"}, "bottleneck_width: got 0"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("module", [csp, csp.reference], ids=["csp", "reference"])
def test_bad_arguments(name: str, module: Any) -> None:
    change, message = BAD[name]
    good = {"in_channels": 17, "out_channels": 22, "num_layers": 2, "growth_rate": 8, "bn_size": 2}
    with pytest.raises(ValueError, match=message):
        module.CSPDenseStage(**{**good, **change})


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layer", LAYERS)
def test_bad_input_changes_no_statistics(layer: str, backend: str) -> None:
    csp.use_backend(backend)
    stage, _ = pair(layer=layer)
    x = torch.zeros(2, 17, 4, 4)
    for given, error, message in (
        ([1.0], TypeError, "x: got list"),
        (x[0], ValueError, "x: got 3 dimensions"),
        (x[:, 1:], ValueError, "x: got 16 channels .*, expected 17"),
        (x.double(), TypeError, "got torch.float32, expected torch.float64"),
        (x[:, :, :1], ValueError, "x: got size 1x4, expected at least 2x2"),
        (x[:1, :, :1, :1], ValueError, "x: got"),
    ):
        modes.check_state_survives(stage, error, message, [given])
