"""Costs against formulas, published figures and hand counts."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import analysis, models, profile_command
from csp_kernels.stage.build import Builder

SUMS = ("params", "weights", "flops", "pool_flops", "shortcut_flops", "cio", "dram_bytes_naive", "dram_bytes_fused")


class SingleConvBlock(nn.Module):
    """The dense block of the paper's formulas: m 3x3 convolutions of growth d over c channels, `part` bypassing."""

    def __init__(self, c: int, m: int, d: int, part: int = 0) -> None:
        super().__init__()
        self.part = part
        self.layers = nn.ModuleList(nn.Conv2d(c - part + i * d, d, 3, padding=1, bias=False) for i in range(m))

    def forward(self, x: Tensor) -> Tensor:
        bypass, x = x[:, : self.part], x[:, self.part :]
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return torch.cat([bypass, x], 1)


def test_formulas() -> None:
    """cm + (m^2 + m)d/2 and its partial form are what the convolutions read and write."""
    draw = random.Random(0)
    for _ in range(8):
        c, m, d = draw.randrange(2, 60), draw.randrange(1, 9), draw.randrange(1, 40)
        n, h, w = 2, 5, 3
        assert analysis.cio(SingleConvBlock(c, m, d), (n, c, h, w)) == n * h * w * analysis.cio_dense(c, m, d)
        for ratio in (0.25, 0.5, 0.75):
            block = SingleConvBlock(c, m, d, round(ratio * c))
            assert analysis.cio(block, (n, c, h, w)) == n * h * w * analysis.cio_partial(c, m, d, ratio)
    assert analysis.cio_partial(64, 6, 32) == (64 * 6 + (36 + 6) * 32) // 2  # the paper's half split


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnext50", "34.41"), ("csp_resnext50", "32.64"), ("darknet53", "24.97"), ("csp_darknet53", "35.85"),
     ("csp_resnet50", "23.69")],
)  # fmt: skip
def test_published_cio(name: str, millions: str) -> None:
    """The paper's 34.4 M and 32.6 M, and what its configurations give by the same rule."""
    with torch.device("meta"):
        model = getattr(models, name)()
    assert f"{analysis.cio(model, (1, 3, 256, 256)) / 1e6:.2f}" == millions


def test_fused_layers_show_their_convolutions() -> None:
    """A block's rows are its convolutions; FLOPs, largest layer and parameters by hand."""
    k, g, b, pixels = 12, 8, 16, 2 * 6 * 5
    total = analysis.profile(csp.DenseBlock(2, k, g, 2), (2, k, 6, 5)).total
    macs = [k * b, 9 * b * g, (k + g) * b, 9 * b * g]
    assert total["flops"] == 2 * pixels * sum(macs)
    assert total["max_layer_flops"] == 2 * pixels * max(macs)
    assert total["cio"] == pixels * (k + b + b + g + k + g + b + b + g)
    assert total["params"] == sum(macs) + 2 * (k + b + k + g + b)
    assert total["weights"] == sum(macs)


def test_traffic_of_a_dense_layer() -> None:
    """Bytes of a training step: naive 21K + 19b + 3g elements a pixel and the weights, fused 4K + 6b + 3g."""
    g, b, pixels = 32, 128, 4 * 7 * 9
    totals = [analysis.profile(csp.DenseBlock(m, 64, g, 4), (4, 64, 7, 9)).total for m in (2, 3)]
    naive, fused = (totals[1][f"dram_bytes_{kind}"] - totals[0][f"dram_bytes_{kind}"] for kind in ("naive", "fused"))
    k = 64 + 2 * g
    weights = 3 * (k * b + 9 * b * g)
    # the output's concatenation grows by g: 2 forward, 3 backward; the reference leaves it out of the layer's count
    assert naive == 4 * (pixels * (21 * k + 19 * b + 3 * g + 5 * g) + weights)
    # the gradient of the output is copied to where the layers add to it
    assert fused == 4 * pixels * (4 * k + 6 * b + 3 * g + 2 * g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_of_a_concat_conv(dtype: torch.dtype) -> None:
    """By hand, on the layer's own row: from k channels to b, forward k + b and 2b; backward 2b for the norm's sums,
    2k + 2b for the gradients, 2k where that of the input leaves."""
    k, b, pixels = 12, 10, 2 * 6 * 5
    model = nn.Sequential(nn.Conv2d(3, k, 1), csp.ConcatConv([k], b)).to(dtype)
    row = next(row for row in analysis.profile(model, (2, 3, 6, 5)).rows if row.name == "1")
    assert row.dram_bytes_fused == dtype.itemsize * pixels * (5 * k + 7 * b)
    row = next(row for row in analysis.profile(model.eval(), (2, 3, 6, 5)).rows if row.name == "1")
    assert row.dram_bytes_fused == dtype.itemsize * pixels * (k + b)  # norm and activation on the way out


@pytest.mark.parametrize("training", [True, False])
def test_traffic_of_fused_layers_is_that_of_their_programs(training: bool) -> None:
    """On their own rows and nowhere below; elsewhere it is the naive one. `recompute` and frozen norms count."""
    stage = csp.CSPDenseStage(16, 12, 2, 4, 2, recompute="bottleneck")
    model = nn.Sequential(nn.Conv2d(3, 16, 3), stage, csp.Transition(12, 8)).train(training)
    stage.dense.denselayer1.norm1.eval()
    found = analysis.profile(model, (2, 3, 10, 9))
    rows = {row.name: row for row in found.rows}
    for name, channels, size in (("1", 16, (8, 7)), ("2", 12, (4, 3))):
        with torch.set_grad_enabled(training):
            explanation = csp.explain(
                model[int(name)], torch.empty(2, channels, *size, device="meta", requires_grad=True)
            )
        totals = (explanation.forward_total, explanation.backward_total)
        assert rows[name].dram_bytes_fused == sum(total.bytes_read + total.bytes_written for total in totals)
    for name, row in rows.items():
        if name not in ("1", "2"):
            assert row.dram_bytes_fused == (row.dram_bytes_naive if name == "0" else 0)
    names = [row.name for row in found.rows]
    assert names.index("0") < names.index("1") < names.index("1.dense.denselayer1.norm1") < names.index("2.norm")


def test_traffic_of_a_stage_of_one_s_own() -> None:
    """A dense block's graph moves what the block does; one that the kernels cannot run, what plain PyTorch does."""
    block, shape = csp.DenseBlock(2, 12, 8, 2), (2, 12, 6, 5)
    stage = csp.Stage(block.graph)
    totals = [analysis.profile(module, shape).total for module in (stage, block)]
    assert totals[0]["dram_bytes_fused"] == totals[1]["dram_bytes_fused"] < totals[0]["dram_bytes_naive"]
    build = Builder(12)
    build.write([build.read(build.conv([build.read(0)], 12, groups=2))])
    total = analysis.profile(csp.Stage(build.graph()).eval(), shape).total
    assert total["dram_bytes_fused"] == total["dram_bytes_naive"] > 0


def test_layers_that_run_as_the_reference_move_what_plain_ones_do() -> None:
    block = csp.DenseBlock(2, 12, 8, 2)
    assert analysis.profile(block, (2, 12, 6, 5)).total["dram_bytes_fused"] > 0
    for plain in (nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)), csp.reference.DenseBlock(2, 12, 8, 2)):
        total = analysis.profile(plain.eval(), (2, 12, 6, 5)).total
        assert total["dram_bytes_fused"] == total["dram_bytes_naive"] > 0


@pytest.mark.parametrize("name", ["csp_peleenet", "densenet121", "csp_resnext50", "csp_densenet_digits"])
@pytest.mark.parametrize("training", [True, False])
def test_totals_are_the_sums_of_the_rows(name: str, training: bool) -> None:
    with torch.device("meta"):
        model = getattr(models, name)().train(training)
    shape = (2, 1, 28, 28) if "digits" in name else (2, 3, 64, 64)
    costs = analysis.profile(model, shape)
    for rows in (costs.rows, costs.grouped(1), costs.grouped(3)):
        for key in SUMS:
            assert sum(getattr(row, key) for row in rows) == costs.total[key]
        assert max(row.max_layer_flops for row in rows) == costs.total["max_layer_flops"]
    assert costs.total["params"] == sum(p.numel() for p in model.parameters())
    assert 0 < costs.total["dram_bytes_fused"] <= costs.total["dram_bytes_naive"]
    text = str(costs).splitlines()
    assert text[0].split()[0] == "module" and text[-2].split()[1] == f"{costs.total['params']:,}"


def test_agrees_with_the_counter_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = csp.reference.DenseBlock(2, 8, 4, 2)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 8, 6, 6))
    assert analysis.profile(model, (2, 8, 6, 6)).total["flops"] == counter.get_total_flops()


def test_leaves_the_model_alone() -> None:
    """Statistics, mode, class, hooks and the random state stay."""
    csp.use_backend("reference")
    model = models.csp_peleenet_digits(drop_rate=0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    analysis.profile(model, (2, 1, 28, 28))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and type(model.features.stage1) is csp.CSPDenseStage
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_saved_bytes() -> None:
    """Distinct storages, without parameters and input; the chosen backend's."""
    x, w = torch.randn(1000), torch.randn(1000, requires_grad=True)
    assert analysis.saved_bytes(lambda: (x * w) * x, [w]) == x.nbytes
    assert analysis.saved_bytes(lambda: (x * w) * x, [w, x]) == 0
    block, shape = csp.DenseBlock(4, 16, 8), (2, 16, 8, 8)
    with csp.use_backend("reference"):
        naive = analysis.profile(block, shape).total["saved_bytes"]
    with csp.use_backend("native"):
        fused = analysis.profile(block, shape).total["saved_bytes"]
    assert 0 < fused < 0.5 * naive
    features, bottlenecks = (16 + 4 * 8) * 2 * 64 * 4, 4 * 32 * 2 * 64 * 4
    assert fused == pytest.approx(features + bottlenecks, rel=0.1)


SAVING: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    # layers of 16 channels; channels whose batch statistics norms use; whether the output holds what backward reads
    "dense": (lambda: csp.DenseBlock(3, 16, 8, 2), 16 + 2 * 8 + 3 * 16, True),
    "bottleneck": (lambda: csp.DenseBlock(3, 16, 8, 2, recompute="bottleneck"), 16 + 2 * 8 + 3 * 16, True),
    "post": (lambda: csp.PostDenseBlock(2, 16, 8, 2), 2 * (16 + 8), False),
    "stage": (lambda: csp.CSPDenseStage(16, 24, 2, 8, 2, layer="post"), 2 * (16 + 8) + 24 + 24, False),
    "concat": (lambda: csp.ConcatConv([16], 12, act="silu"), 12, False),
}


@pytest.mark.parametrize("case", SAVING)
def test_saved_bytes_of_a_fused_layer_are_what_its_program_keeps(native: None, case: str) -> None:
    """Its kept buffers, outputs that backward reads, and mean and variance in float64 of each channel that a norm
    normalises with the batch's statistics."""
    make, channels, holds = SAVING[case]
    layer, x = make(), torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    explanation = csp.explain(layer, x)
    outputs = [memory.bytes for memory in explanation.read_again if memory.kind == "output"]
    assert outputs == ([layer(x).nbytes] if holds else [])
    measured = analysis.saved_bytes(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()])
    assert measured == explanation.kept_bytes + sum(outputs) + 16 * channels
    assert explanation.kept or case == "bottleneck"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csp.use_backend("reference")
    parser = argparse.ArgumentParser()
    profile_command.add_arguments(parser)
    out = tmp_path / "new" / "costs.png"
    assert profile_command.main(parser.parse_args(["csp_peleenet_digits", "--batch", "2", "--plot", str(out)])) == 0
    text = capsys.readouterr().out
    assert "features.stage1" in text and "saved for backward" in text
    assert out.read_bytes().startswith(b"\x89PNG")
    assert profile_command.main(parser.parse_args(["peleenet", "--size", "9"])) == 1
    assert "profile: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["lenet"])


def test_bad_shape() -> None:
    with pytest.raises(ValueError, match="shape: got \\(3, 8, 8\\), expected \\(N, C, H, W\\)"):
        analysis.profile(nn.Conv2d(3, 4, 1), (3, 8, 8))
