"""PartialTransition, all fusions and both orders, against concatenation.

python benchmarks/bench_partial_transition.py --only csp
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import Case, main

import csp_kernels as csp

# bypass, dense, mid and out channels, size: CSPDenseNet and CSPPeleeNet stages at part_ratio .5
SHAPES = {"pre": (64, 448, 224, 256, 28), "post": (64, 192, 192, 256, 28)}


def case(order: str, fusion: str) -> Case:
    part, dense, mid, out, size = SHAPES[order]
    out = part + mid if fusion == "last" else out
    return Case(
        f"{order} {fusion}, {part} + {dense} to {out}, {size}x{size}",
        lambda: csp.PartialTransition(part, dense, mid, out, fusion=fusion, order=order),
        lambda: csp.reference.PartialTransition(part, dense, mid, out, fusion=fusion, order=order),
        [(16, part, size, size), (16, dense, size, size)],
    )


CASES = [case(order, fusion) for order in SHAPES for fusion in ("csp", "first", "last")]

if __name__ == "__main__":
    sys.exit(main(CASES, "partial_transition", __doc__))
