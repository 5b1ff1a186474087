"""FLOPs of torch.ops.csp_kernels.*, for torch.utils.flop_counter.FlopCounterMode and the compiler's memory budget.

Counted as torch counts a convolution: 2 per multiplication of the direct form, norms and activations nothing. What is
counted is what the program of a call runs: a product behind a 2x2 average sees a quarter of the pixels, what backward
computes again counts again, and gradients that nobody wants are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from csp_kernels import native
from csp_kernels.stage.cost import costs
from csp_kernels.stage.text import decode

Shape = Sequence[int]
Formula = Callable[[Any], int]  # arguments by their names in the operator's schema, shapes in place of tensors


def _products(pixels: int, params: Sequence[Shape]) -> int:
    """Of all convolutions among the parameters, each over these pixels."""
    return 2 * pixels * sum(math.prod(p) for p in params if len(p) == 4)


def _program(a: Any, backward: bool) -> int:
    """From the program that runs: see stage/cost.py."""
    n, _, height, width = a.inputs[0]
    return sum(step.flops for step in costs(decode(a.program), n, height, width)[backward])


FORMULAS: dict[str, Formula] = {
    "stage": lambda a: _program(a, False),
    "stage_inference": lambda a: _program(a, False),
    "stage_backward": lambda a: _program(a, True),
    # Parts of operators on a GPU, views [pixels, channels]; inside an operator the counter sees the operator alone.
    "conv3x3_forward": lambda a: _products(a.z[0], [a.weight]),
    "conv3x3_dgrad": lambda a: _products(a.z[0], [a.weight]),
    "conv3x3_wgrad": lambda a: _products(a.z[0], [a.weight]),
    "dense_layer": lambda a: _products(a.features[0], [a.weight1, a.weight2]),
}


def _register(name: str, formula: Formula) -> None:
    op = getattr(torch.ops.csp_kernels, name)
    names = [argument.name for argument in op.default._schema.arguments]

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(SimpleNamespace(**dict(zip(names, args, strict=False)), **kwargs))

    register_flop_formula(op)(flops)


if native.available():
    for _name, _formula in FORMULAS.items():
        _register(_name, _formula)
