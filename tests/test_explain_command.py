"""`python -m csp_kernels explain`, and the calls of a network that it explains."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels import models
from csp_kernels.__main__ import main
from csp_kernels.programs import calls

STAGE1 = ("features.stage1", (2, 32, 28, 28))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 1
    out, error = capsys.readouterr()
    assert not out
    return error


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_a_layer_of_a_network(capsys: pytest.CaptureFixture[str], recompute: str) -> None:
    """As csp.explain has it for the layer and its input, whose size the network decides."""
    name, shape = STAGE1
    layer = models.csp_peleenet_digits(recompute=recompute).get_submodule(name)
    x = torch.empty(shape, device="meta", requires_grad=True)
    options = ["--recompute", recompute] if recompute != "none" else []
    assert printed(capsys, "csp_peleenet_digits", "--layer", name, "--batch", "2", *options) == (
        f"{csp.explain(layer, x)}\n"
    )
    with torch.no_grad():
        said = printed(capsys, "csp_peleenet_digits", "--layer", name, "--batch", "2", "--eval", *options)
        assert said == f"{csp.explain(layer.eval(), x)}\n"


def test_the_size_of_the_network_s_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert "inputs [8, 32, 56, 56] float32" in printed(capsys, "csp_peleenet", "--layer", "features.stage1")
    assert "inputs [3, 32, 8, 8] float32" in printed(
        capsys, "csp_peleenet", "--layer", "features.stage1", "--size", "32", "--batch", "3"
    )


def test_the_list_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = printed(capsys, "csp_peleenet", "--size", "64", "--batch", "4").splitlines()
    assert re.split(r"\s{2,}", head) == ["layer", "kind", "instructions", "kept MiB", "MFLOPs forward", "backward"]
    rows = [line.split() for line in lines]
    assert [row[:2] for row in rows] == [[f"features.stage{i}", "CSPDenseStage"] for i in range(1, 5)]
    layer = models.csp_peleenet().get_submodule("features.stage2")
    found = csp.explain(layer, torch.empty(4, 128, 8, 8, requires_grad=True))
    flops = (f"{total.flops / 1e6:,.1f}" for total in (found.forward_total, found.backward_total))
    assert rows[1][2:] == [str(len(found.forward + found.backward)), f"{found.kept_bytes / 2**20:.1f}", *flops]
    assert all(row[3] == "0.0" and row[5] == "0.0" for row in map(str.split, inference(capsys)))


def inference(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = printed(capsys, "csp_peleenet", "--size", "64", "--eval").splitlines()[1:]
    assert len(lines) == 4
    return lines


def test_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "densenet_digits", "--layer", "features.2")
    layers = ", ".join(
        f"features.{name}" for name in ("denseblock1", "transition1", "denseblock2", "transition2", "denseblock3")
    )
    assert said == f"explain: --layer: got 'features.2', expected one of {layers}\n"
    assert refused(capsys, "resnet50") == "explain: resnet50 has no fused layer\n"
    assert refused(capsys, "csp_resnet50", "--recompute", "bottleneck") == (
        "explain: --recompute: csp_resnet50 has no layer with that choice\n"
    )
    assert refused(capsys, "peleenet", "--size", "9").startswith("explain: ")
    for arguments in (["lenet"], ["peleenet", "--batch", "0"], ["densenet121", "--recompute", "all"]):
        with pytest.raises(SystemExit):
            main(["explain", *arguments])


# --- the calls of a network ---


class Twice(nn.Module):
    """A stage between two convolutions, the first one frozen, and a join that is called twice, once by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1).requires_grad_(False)
        self.stage = csp.CSPDenseStage(16, 8, 2, 4, 2, pool=None)
        self.join = csp.ConcatConv([16, 8], 8)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        y = self.stage(x)
        return self.join(inputs=(x, self.join([x, y])))


def test_calls_of_the_outermost_layers() -> None:
    """In order, with their inputs on the meta device, which require gradients where something before them wants one;
    the network stays as it is."""
    model = Twice()
    found = calls(model, torch.randn(2, 3, 8, 6))
    assert [(call.name, call.layer) for call in found] == [
        ("stage", model.stage), ("join", model.join), ("join", model.join)
    ]  # fmt: skip
    assert found[0].inputs[0].requires_grad is False
    for _, _, (images,) in found[1:]:
        assert [(tuple(t.shape), t.device.type, t.requires_grad, t.grad_fn) for t in images] == [
            ((2, 16, 4, 3), "meta", False, None), ((2, 8, 4, 3), "meta", True, None)
        ]  # fmt: skip
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training and not next(model.parameters()).is_meta
    (call,) = calls(model.stage, torch.randn(2, 16, 8, 6))
    assert (call.name, call.layer) == ("", model.stage)


def test_calls_inside_a_layer_that_runs_as_the_reference() -> None:
    """A hook on one of its layers makes the stage call its children: the transition is fused, the block is not."""
    model = Twice()
    model.stage.get_submodule("dense.denselayer1").register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="denselayer1 has a forward hook"):
        model.stage(torch.randn(2, 16, 8, 6))
    names = [call.name for call in calls(model, torch.randn(2, 3, 8, 6))]
    assert names == ["stage.transition", "join", "join"]
