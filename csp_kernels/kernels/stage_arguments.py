"""What the operators of a stage are given, checked against the program before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csp_kernels.kernels.launch import Argument, check, check_count, check_params, sum_dtype
from csp_kernels.ops._node import padded
from csp_kernels.stage.cost import side
from csp_kernels.stage.program import Bottleneck, Product, ProductBackward, Program


def check_call(
    program: Program, inputs: Sequence[Tensor], params: Sequence[Tensor], running: Sequence[Tensor],
    seed: Tensor | None, eps: Sequence[float],
) -> None:  # fmt: skip
    """Of both operators. TypeError or ValueError, which names the argument, for what a program cannot run with."""
    _check_products(program)
    buffers = [b for b in program.buffers if b.kind == "input"]
    check_count("inputs", inputs, len(buffers))
    x = inputs[0]
    if x.dim() != 4:
        raise ValueError(f"inputs[0]: got shape {list(x.shape)}, expected [N, C, H, W]")
    n, _, h, w = x.shape
    check(x, [(f"inputs[{b.index}]", inputs[b.index], (n, b.channels, h, w), x.dtype) for b in buffers])
    check_params(x, params, _shapes(program))
    channels = {k.running: k.channels for k in program.norms if k.running is not None}
    check_count("running", running, 2 * len(channels))
    wide = sum_dtype(x.dtype)
    check(x, [(f"running[{i + k}]", running[i + k], (c,), wide) for i, c in channels.items() for k in (0, 1)])
    check_count("eps", eps, len(program.norms))
    if seed is not None:
        check(x, [("seed", seed, (1,), torch.int64)])
    elif any(isinstance(step, (Product, Bottleneck)) and _drops(step) for step in program.forward):
        raise ValueError("seed: got none, expected int64 [1]: the program drops values")


def check_backward(
    program: Program, grads: Sequence[Tensor], inputs: Sequence[Tensor], outputs: Sequence[Tensor],
    kept: Sequence[Tensor], stats: Tensor,
) -> None:  # fmt: skip
    """What forward returned, and the gradients of its outputs."""
    x = inputs[0]
    n, _, h, w = x.shape
    arguments: list[Argument] = [("stats", stats, (2, program.statistics), torch.float64)]
    made = [b for b in program.buffers if b.kind == "output"]
    for name, images in (("grads", grads), ("outputs", outputs)):
        check_count(name, images, len(made))
        for b in made:
            shape = n, b.channels, side(b.size, h), side(b.size, w)
            arguments.append((f"{name}[{b.index}]", images[b.index], shape, x.dtype))
    buffers = [b for b in program.buffers if b.kind == "kept"]
    check_count("kept", kept, len(buffers))
    for b in buffers:
        rows = n * side(b.size, h) * side(b.size, w)
        arguments.append((f"kept[{b.index}]", kept[b.index], (rows, padded(b.channels)), x.dtype))
    check(x, arguments)


def _check_products(program: Program) -> None:
    """None that the reference alone runs (ops/stage.py: unsupported)."""
    for step in (*program.forward, *program.backward):
        for product in (step.reduce, step.conv) if isinstance(step, Bottleneck) else (step,):
            if not isinstance(product, (Product, ProductBackward)):
                continue
            conv, drops = product.conv, product.drop is not None
            if (conv.groups > 1 and (conv.kernel == 1 or drops)) or (conv.stride > 1 and (conv.pool or drops)):
                raise ValueError("program: got groups of a 1x1, or dropout behind groups or a stride, expected none")


def _drops(step: Product | Bottleneck) -> bool:
    return (step.conv.drop if isinstance(step, Bottleneck) else step.drop) is not None


def _shapes(program: Program) -> list[tuple[int, ...]]:
    """Of the parameters, in order."""
    shapes: dict[int, tuple[int, ...]] = {}
    for weight in program.weights:
        if weight is not None:
            size = weight.kernel, weight.kernel
            shapes[weight.position] = weight.out_channels, weight.in_channels, *size
            if weight.bias:
                shapes[weight.position + 1] = (weight.out_channels,)
    for norm in program.norms:
        shapes |= dict.fromkeys((norm.position, norm.position + 1), (norm.channels,))
    return [shapes[i] for i in range(len(shapes))]
