"""csp.fuse on networks of timm and torchvision: in float64 they compute what they computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import csp_kernels as csp
from csp_kernels.fuse_command import build, difference

# name -> at least this part of its convolutions in stages
CORE = {
    "torchvision/densenet121": 0.99, "torchvision/resnet18": 0.9, "torchvision/googlenet": 0.95,
    "torchvision/squeezenet1_1": 0.9, "timm/densenet121": 0.99, "timm/cs3darknet_s": 0.99, "timm/dla34": 0.8,
    "timm/ese_vovnet19b_slim": 0.8, "timm/hgnetv2_b0": 0.2, "timm/res2net50_48w_2s": 0.95, "timm/mobilenetv2_050": 0.95,
}  # fmt: skip
MORE = [
    "torchvision/densenet161", "torchvision/densenet169", "torchvision/densenet201", "torchvision/resnet50",
    "torchvision/resnext50_32x4d", "torchvision/mobilenet_v2", "torchvision/regnet_y_400mf", "torchvision/vgg11_bn",
    "torchvision/shufflenet_v2_x0_5", "torchvision/mnasnet0_5",
    *(f"timm/{name}" for name in (
        "cs3darknet_focus_m", "cs3darknet_m", "cs3sedarknet_l", "cspdarknet53", "cspnext_s", "cspresnet50",
        "cspresnet50d", "cspresnet50w", "cspresnext50", "densenet169", "densenet201", "densenetblur121d", "dla46_c",
        "dla60", "dla60_res2net", "dla60x_c", "dla102", "eca_vovnet39b", "ese_vovnet19b_dw", "ese_vovnet39b",
        "hgnet_tiny", "hgnetv2_b2", "res2net50_26w_4s", "res2net50d", "selecsls42b", "selecsls60", "vovnet39a",
        "resnet26d", "darknet53", "rexnet_100", "ghostnet_100", "efficientnet_b0", "mixnet_s", "hardcorenas_a",
    )),
]  # fmt: skip


def check(name: str, coverage: float, bound: float = 1e-10) -> None:
    torch.manual_seed(0)
    model = build(name)
    if hasattr(model, "aux_logits"):
        model.aux_logits = False
        for aux in ("aux1", "aux2", "AuxLogits"):
            setattr(model, aux, None)
    for m in model.modules():  # trained networks have no equal norms
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    after = copy.deepcopy(model)
    report = csp.fuse(after)
    assert report.coverage >= coverage, str(report)
    assert difference(model, after, 3) < bound, str(report)


@pytest.mark.parametrize("name", CORE)
def test_core(name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    check(name, CORE[name])


@pytest.mark.verify
@pytest.mark.parametrize("name", MORE)
def test_more(name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    check(name, 0.0, 1e-9)  # of deep networks on small images, norms over few pixels magnify what rounding does


def test_memory_efficient_densenet() -> None:
    """torchvision's checkpoints, which need no kernels of ours, keep their own forward."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.densenet121(memory_efficient=True)
    report = csp.fuse(model)
    assert all(row.kind != "_DenseBlock" for row in report.fused)
