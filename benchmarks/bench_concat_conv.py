"""ConcatConv of 2, 4 and 8 inputs against cat + conv + BN + act.

python benchmarks/bench_concat_conv.py --mode infer
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import Case, main

import csp_kernels as csp

# inputs, channels of each, out channels, size
SHAPES = ((2, 128, 256, 28), (4, 64, 128, 28), (8, 32, 128, 28), (2, 64, 64, 56), (2, 256, 256, 14))


def case(count: int, each: int, out: int, size: int, act: str = "relu") -> Case:
    channels = [each] * count
    return Case(
        f"{count} inputs of {each} to {out}, {size}x{size}, {act}",
        lambda: csp.ConcatConv(channels, out, act=act),
        lambda: csp.reference.ConcatConv(channels, out, act=act),
        [(16, each, size, size)] * count,
        as_list=True,
    )


CASES = [*(case(*shape) for shape in SHAPES), case(4, 64, 128, 28, "mish")]

if __name__ == "__main__":
    sys.exit(main(CASES, "concat_conv", __doc__))
