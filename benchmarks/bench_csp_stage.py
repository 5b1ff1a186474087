"""CSPDenseStage, part_ratio .25, .5 and .75, against the naive stage.

python benchmarks/bench_csp_stage.py --only pre
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import Case, main

import csp_kernels as csp

# in and out channels, layers, width, size
SHAPES = {"pre": (128, 256, 12, 4, 28), "two_way": (128, 256, 4, 2, 28)}


def case(layer: str, part_ratio: float) -> Case:
    channels, out, layers, width, size = SHAPES[layer]
    return Case(
        f"{layer}, part_ratio {part_ratio}, {channels} to {out}, {layers} layers, {size}x{size}",
        lambda: csp.CSPDenseStage(channels, out, layers, 32, width, part_ratio=part_ratio, layer=layer),
        lambda: csp.reference.CSPDenseStage(channels, out, layers, 32, width, part_ratio=part_ratio, layer=layer),
        [(16, channels, size, size)],
    )


CASES = [case(layer, ratio) for layer in SHAPES for ratio in (0.25, 0.5, 0.75)]

if __name__ == "__main__":
    sys.exit(main(CASES, "csp_stage", __doc__))
