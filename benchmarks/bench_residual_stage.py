"""Stages of CSPDarkNet-53 and CSPResNet-50, and the blocks of YOLO, VoVNet, DLA and ResNet on the shapes that networks
have, against the same from plain modules.

python benchmarks/bench_residual_stage.py --only C2f
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from naive_stage import NaiveStage
from race import Case, main

import csp_kernels as csp
from csp_kernels.stage.c2f import c2f
from csp_kernels.stage.c3 import c3
from csp_kernels.stage.elan import elan
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.osa_block import osa_block
from csp_kernels.stage.residual_block import residual_block


def stage(name: str, batch: int, size: int, *arguments: int, **options: Any) -> Case:
    """A `csp.CSPStage` on images of its input's channels."""
    return Case(
        f"{name}, {size}x{size}",
        lambda: csp.CSPStage(*arguments, **options),
        lambda: csp.reference.CSPStage(*arguments, **options),
        [(batch, arguments[0], size, size)],
    )


def block(name: str, batch: int, size: int, graph: Graph) -> Case:
    shapes = [(batch, channels, size, size) for channels in graph.inputs]
    return Case(f"{name}, {size}x{size}", lambda: csp.Stage(graph), lambda: NaiveStage(graph), shapes)


def darknet(index: int, batch: int = 4) -> Case:
    """The stage of csp_darknet53 whose output is 2^index times smaller than a 224x224 image."""
    out, depth = 32 * 2**index, (1, 2, 8, 8, 4)[index - 1]
    width, mid = (out // 2, out // 2) if index > 1 else (out, out // 2)
    options = {"down_channels": out, "width": width, "mid_channels": mid, "block": "dark"}
    return stage(f"csp_darknet53 stage {index}", batch, 224 >> (index - 1), out // 2, out, depth, **options)


CASES = [
    *(darknet(i) for i in (1, 2, 3, 4, 5)),
    stage("csp_resnet50 stage 2", 4, 56, 128, 256, 3, width=256, mid_channels=128),
    stage("csp_resnext50 stage 3", 4, 28, 512, 1024, 5, width=512, mid_channels=512, groups=32),
    block("C2f, yolov8n 16 wide", 4, 160, c2f(32, 32, 1, True)),
    block("C2f, yolov8n 32 wide", 4, 80, c2f(64, 64, 2, True)),
    block("C2f, yolov8n 64 wide", 4, 40, c2f(128, 128, 2, True)),
    block("C2f, yolov8m 96 wide", 2, 80, c2f(192, 192, 4, True)),
    block("C2f, yolov8m 192 wide", 2, 40, c2f(384, 384, 4, True)),
    block("C3, yolov5s 64 wide", 4, 40, c3(128, 128, 2)),
    block("C3, yolov5s 128 wide", 4, 20, c3(256, 256, 3)),
    block("OSA, ese_vovnet39b stage 1", 2, 56, osa_block(64, 128, 256)),
    block("OSA, ese_vovnet39b stage 2", 2, 28, osa_block(256, 160, 512)),
    block("ELAN, yolov7 stage 1", 2, 80, elan(128, 256, 64, 64)),
    block("ELAN, yolov7 stage 2", 2, 40, elan(256, 512, 128, 128)),
    block("dark, darknet53 128 wide", 4, 28, residual_block(256, 256, 128, block="dark", act="leaky_relu", slope=0.1)),
    block("basic, dla34 and resnet18", 4, 56, residual_block(64, 64, 64, block="basic")),
    block("bottleneck, resnet50", 4, 28, residual_block(512, 512, 128)),
]

if __name__ == "__main__":
    sys.exit(main(CASES, "residual_stage", __doc__))
