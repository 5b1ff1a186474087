"""What autograd keeps for backward, counted from sizes: numbers an image, of operations as they are and as a stage."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from csp_kernels.fusion.trace import Operation, Shape
from csp_kernels.ops._node import padded
from csp_kernels.ops._program import read_again, wanted_gradients
from csp_kernels.ops.stage import parameter_shapes
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.cost import side
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.text import encode

_BY_OUTPUT = ("relu", "leaky_relu")  # activations whose derivative PyTorch takes from what they gave


def kept_as_they_are(operations: Sequence[Operation], shapes: Sequence[Shape]) -> int:
    """Convolutions, norms, pools and most activations keep what they read, maxima also where they were (64 bits each);
    what several keep counts once."""
    values: set[int] = set()
    more = 0
    for op in operations:
        act = op.options.get("act", "identity")
        if op.kind in ("conv", "norm", "max_pool", "avg_pool") or (op.kind == "act" and act not in _BY_OUTPUT):
            values.update(op.inputs)
        if op.kind in ("act", "norm") and act in _BY_OUTPUT:
            values.update(op.outputs)
        elif op.kind == "norm" and act != "identity":  # what the activation of a norm reads
            more += _numbers(shapes[op.outputs[0]])
        if op.kind == "max_pool":
            more += 2 * _numbers(shapes[op.outputs[0]])
    return sum(_numbers(shapes[v]) for v in values) + more


def kept_as_a_stage(graph: Graph, height: int, width: int) -> int:
    """Of its program in training, with gradients of everything."""
    wanted = wanted_gradients(graph, [True] * (len(graph.inputs) + len(parameter_shapes(graph)[0])))
    program = compile_stage(graph, (False,) * len(graph.norms), wanted)
    again = read_again(encode(program))
    kept = 0
    for i, buffer in enumerate(program.buffers):
        if buffer.kind == "kept" or i in again:
            channels = padded(buffer.channels) if buffer.kind == "kept" else buffer.channels
            kept += channels * side(buffer.size, height) * side(buffer.size, width)
    return kept


def _numbers(shape: Shape) -> int:
    """Of an image."""
    return prod(shape[1:])
