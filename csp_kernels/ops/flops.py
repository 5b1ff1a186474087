"""FLOPs of torch.ops.csp_kernels.*, for torch.utils.flop_counter.FlopCounterMode and the compiler's memory budget.

Counted as torch counts a convolution: 2 per multiplication of the direct form, norms and activations nothing. What is
counted is what the operators run: a product behind a 2x2 average sees a quarter of the pixels, a bottleneck that
backward computes again counts again, and so do gradients of frozen parameters and of an x that wants none, which come
with the others. `concat_conv` leaves out the gradients of inputs that nobody wants, `stage` all that nobody wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from csp_kernels import native
from csp_kernels.ops.csp_stage import LAYERS
from csp_kernels.ops.partial_transition import FUSIONS, count
from csp_kernels.stage.cost import costs
from csp_kernels.stage.text import decode

Shape = Sequence[int]
Formula = Callable[[Any], int]  # arguments by their names in the operator's schema, shapes in place of tensors

# of a layer's parameters: the weights whose products backward runs again where it finds no z
_AGAIN = {"pre": (2,), "post": (0,), "two_way": (0, 6, 9)}


def _pixels(x: Shape, pool: bool = False) -> int:
    n, _, h, w = x
    return n * (h // 2) * (w // 2) if pool else n * h * w


def _products(pixels: int, params: Sequence[Shape]) -> int:
    """Of all convolutions among the parameters, each over these pixels."""
    return 2 * pixels * sum(math.prod(p) for p in params if len(p) == 4)


def _layers_backward(x: Shape, params: Sequence[Shape], z: Sequence[Shape], kind: str) -> int:
    """A product for the input's gradient, one for the weight's, and what is computed again."""
    each = len(LAYERS[kind].names)
    again = [] if z else [p for i, p in enumerate(params) if i % each in _AGAIN[kind]]
    return 2 * _products(_pixels(x), params) + _products(_pixels(x), again)


def _transition(x: Shape, params: Sequence[Shape], fusion: int, post: bool, pool: bool) -> int:
    """u reads averages; t only where it is the last product and nothing nonlinear follows it."""
    t, u = {"csp": (params[:3], params[3:]), "first": ([], params), "last": (params, [])}[FUSIONS[fusion]]
    return _products(_pixels(x, pool and not u and not post), t) + _products(_pixels(x, pool), u)


# --- of each operator ---


def _block(a: Any) -> int:
    return _products(_pixels(a.x), a.params)


def _dense_block_backward(a: Any) -> int:
    return _layers_backward(a.y, a.params, a.z, "pre")


def _post_dense_block_backward(a: Any) -> int:
    return _layers_backward(a.x, a.params, a.z, "two_way" if a.two_way else "post")


def _concat_conv(a: Any) -> int:
    return _products(_pixels(a.inputs[0]), [a.weight])


def _concat_conv_backward(a: Any) -> int:
    wanted = sum(x[1] for x, flag in zip(a.inputs, a.wanted, strict=True) if flag)
    return _products(_pixels(a.inputs[0]), [a.weight, (a.weight[0], wanted, 1, 1)])


def _partial_transition(a: Any) -> int:
    return _transition(a.dense, a.params, a.fusion, a.post, a.pool)


def _csp_stage_parts(a: Any) -> tuple[list[Shape], str, int]:
    """The parameters of the dense layers, their kind, and the transition's FLOPs."""
    kind, last = list(LAYERS)[a.layer], count(FUSIONS[a.fusion])
    return a.params[:-last], kind, _transition(a.x, a.params[-last:], a.fusion, kind != "pre", a.pool)


def _csp_stage(a: Any) -> int:
    params, _, transition = _csp_stage_parts(a)
    return _products(_pixels(a.x), params) + transition


def _csp_stage_backward(a: Any) -> int:
    params, kind, transition = _csp_stage_parts(a)
    return _layers_backward(a.x, params, a.z, kind) + 2 * transition


def _program(a: Any, backward: bool) -> int:
    """From the program that runs: see stage/cost.py."""
    n, _, height, width = a.inputs[0]
    return sum(step.flops for step in costs(decode(a.program), n, height, width)[backward])


FORMULAS: dict[str, Formula] = {
    "stage": lambda a: _program(a, False),
    "stage_backward": lambda a: _program(a, True),
    "dense_block": _block,
    "dense_block_backward": _dense_block_backward,
    "dense_block_inference": _block,
    "post_dense_block": _block,
    "post_dense_block_backward": _post_dense_block_backward,
    "concat_conv": _concat_conv,
    "concat_conv_backward": _concat_conv_backward,
    "concat_conv_inference": _concat_conv,
    "partial_transition": _partial_transition,
    "partial_transition_backward": lambda a: 2 * _partial_transition(a),
    "csp_stage": _csp_stage,
    "csp_stage_backward": _csp_stage_backward,
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
