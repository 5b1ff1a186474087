"""csp.fuse on networks of libraries that tests do not install: `pip install csp_kernels[libraries]`, `make verify`.

Each is checked as those of timm and torchvision are (test_libraries.py); a library that is missing is skipped by name.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import csp_kernels as csp
from csp_kernels.fuse_command import difference

pytestmark = pytest.mark.verify


class Network(NamedTuple):
    """coverage: at least this part of its convolutions is in stages. size: height and width of the images."""

    package: str
    make: Callable[[Any], nn.Module]
    coverage: float
    channels: int = 3
    size: int = 96


def segmentation(architecture: str, encoder: str) -> Callable[[Any], nn.Module]:
    return lambda smp: getattr(smp, architecture)(encoder, encoder_weights=None)


def pytorchcv(name: str, coverage: float, size: int = 224) -> Network:
    return Network("pytorchcv.model_provider", lambda provider: provider.get_model(name), coverage, size=size)


def ultralytics(name: str, coverage: float) -> Network:
    return Network("ultralytics.nn.tasks", lambda tasks: tasks.DetectionModel(f"{name}.yaml", verbose=False), coverage)


NETWORKS = {
    "MONAI DenseNet121": Network("monai.networks.nets", lambda nets: nets.DenseNet121(2, 1, 5), 0.99, 1),
    "MONAI DenseNet169": Network("monai.networks.nets", lambda nets: nets.DenseNet169(2, 3, 5), 0.99),
    "MONAI BasicUNet": Network("monai.networks.nets", lambda nets: nets.BasicUNet(2, 1, 2, norm="batch"), 0.9, 1),
    "xrv DenseNet": Network("torchxrayvision.models", lambda models: models.DenseNet(weights=None), 0.99, 1, 224),
    "smp Unet densenet121": Network("segmentation_models_pytorch", segmentation("Unet", "densenet121"), 0.95),
    "smp FPN densenet169": Network("segmentation_models_pytorch", segmentation("FPN", "densenet169"), 0.9),
    "smp Unet dpn68": Network("segmentation_models_pytorch", segmentation("Unet", "dpn68"), 0.95),
    "pytorchcv densenet121": pytorchcv("densenet121", 0.95),
    "pytorchcv densenet40": pytorchcv("densenet40_k12_cifar10", 0.9, 32),
    "pytorchcv peleenet": pytorchcv("peleenet", 0.9),
    "pytorchcv darknet53": pytorchcv("darknet53", 0.95),
    "pytorchcv dla34": pytorchcv("dla34", 0.7),
    "pytorchcv vovnet39": pytorchcv("vovnet39", 0.8),
    **{
        f"ultralytics {name}": ultralytics(name, coverage)
        for name, coverage in {
            "yolov5n": 0.5, "yolov8n": 0.5, "yolov9t": 0.3, "yolov10n": 0.3, "yolo11n": 0.3, "yolo12n": 0.1,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_same_as_before(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    network = NETWORKS[name]
    monkeypatch.setitem(os.environ, "YOLO_CONFIG_DIR", str(tmp_path))  # ultralytics writes its settings there
    pytest.importorskip(network.package.partition(".")[0], reason="pip install csp_kernels[libraries]")
    torch.manual_seed(0)
    model = network.make(importlib.import_module(network.package))
    for m in model.modules():  # trained networks have no equal norms
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    after = copy.deepcopy(model)
    report = csp.fuse(after)
    assert report.coverage >= network.coverage, str(report)
    assert difference(model, after, network.channels, network.size) < 1e-10, str(report)
