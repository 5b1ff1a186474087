"""torch.ops.csp_kernels.stage* in Triton: a program (csp_kernels/stage/program.py), one instruction after the other,
each by the kernels that it takes. CUDA C++ takes the 3x3 where it can (kernels/cuda.py).

This file has the operators; stage_plan.py what is known of a program before it runs, stage_memory.py where values and
gradients lie, stage_norms.py the numbers of norms, stage_forward.py and stage_backward.py the instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from csp_kernels.backends import running as choice
from csp_kernels.backends import running_as
from csp_kernels.kernels.launch import laid_as, pixels_of, precision_of
from csp_kernels.kernels.stage_arguments import check_backward, check_call
from csp_kernels.kernels.stage_backward import BackwardPass
from csp_kernels.kernels.stage_forward import Forward
from csp_kernels.kernels.stage_memory import Memory
from csp_kernels.kernels.stage_norms import Norms
from csp_kernels.kernels.stage_plan import Plan, plan
from csp_kernels.ops._node import TRITON_ALONE, fake_statistics, padded
from csp_kernels.ops._node import fake_image as image
from csp_kernels.stage.cost import side
from csp_kernels.stage.program import Program


def forward(
    inputs: list[Tensor],
    params: list[Tensor],
    running: list[Tensor],
    seed: Tensor | None,
    program: str,
    eps: list[float],
    winograd: int,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs [N, C, H, W] channels_last, what is kept for backward [pixels, padded channels], and the statistics [2,
    columns] float64. Raises TypeError or ValueError for wrong arguments before anything is launched."""
    x, planned = _planned(inputs, program)
    p = planned.program
    check_call(p, inputs, params, running, seed, eps)
    n, _, h, w = x.shape
    sizes = [(side(b.size, h), side(b.size, w)) for b in p.buffers]
    outputs = [image(x, b.channels, *s) for b, s in zip(p.buffers, sizes, strict=True) if b.kind == "output"]
    kept = [
        x.new_empty((n * s[0] * s[1], padded(b.channels)))
        for b, s in zip(p.buffers, sizes, strict=True)
        if b.kind == "kept"
    ]
    stats = fake_statistics(x, p.statistics).zero_()
    if n * h * w > 0:
        norms = Norms(planned, params, running, eps, stats, x, backward=False)
        memory = Memory(p.buffers, x, _views(p, inputs, outputs, kept))
        with _as_called(winograd):
            Forward(p, memory, norms, params, seed, precision_of(x, winograd)).run(planned.forward)
    return outputs, kept, stats


def backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    outputs: list[Tensor],
    kept: list[Tensor],
    stats: Tensor,
    params: list[Tensor],
    running: list[Tensor],
    seed: Tensor | None,
    program: str,
    eps: list[float],
    winograd: int,
) -> list[Tensor]:
    """Gradients of the program's wanted inputs, then of wanted weights, then weight and bias of wanted norms. Raises as
    `forward`."""
    x, planned = _planned(inputs, program)
    p = planned.program
    check_call(p, inputs, params, running, seed, eps)
    check_backward(p, grads, inputs, outputs, kept, stats)
    images = [image(inputs[i], inputs[i].shape[1]) for i in p.wanted.inputs]
    if x.numel() == 0:
        return [*images, *(torch.zeros_like(params[i]) for i in _wanted_params(p))]
    norms = Norms(planned, params, running, eps, stats, x, backward=True)
    memory = Memory(p.buffers, x, _views(p, inputs, outputs, kept, planned.read))
    run = BackwardPass(p, memory, norms, params, seed, precision_of(x, winograd))
    given = {i: pixels_of(grads[b.index]) for i, b in enumerate(p.buffers) if b.kind == "output"}
    with _as_called(winograd):
        run.start(given, {i: pixels_of(g) for i, g in zip(p.wanted.inputs, images, strict=True)})
        run.run(planned.backward)
    weights = [laid_as(run.weight_gradients[node], _weight(p, params, node)) for node in p.wanted.nodes]
    return [*images, *weights, *_norm_gradients(p, norms, params)]


def _as_called(winograd: int) -> AbstractContextManager[None]:
    """Inside, `backends.running()` is "triton" if the call said so, whatever is chosen now."""
    return running_as("triton" if winograd & TRITON_ALONE else choice())


def _planned(inputs: Sequence[Tensor], program: str) -> tuple[Tensor, Plan]:
    """The first input, and the plan of the program where that is."""
    if not inputs:
        raise ValueError("inputs: got 0 items, expected one for each input of the program")
    return inputs[0], plan(program, inputs[0].device)


def _views(
    program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor], kept: Sequence[Tensor],
    read: frozenset[int] | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """[pixels, channels] of each buffer, None of scratch memory and of what is not read."""
    tensors = {"input": inputs, "output": outputs, "kept": kept}
    views: list[Tensor | None] = []
    for i, b in enumerate(program.buffers):
        if b.kind == "scratch" or (read is not None and i not in read):
            views.append(None)
        else:
            t = tensors[b.kind][b.index]
            views.append(t[:, : b.channels] if b.kind == "kept" else pixels_of(t))
    return views


def _weight(program: Program, params: Sequence[Tensor], node: int) -> Tensor:
    weight = program.weights[node]
    assert weight is not None, "a sum has no weight"
    return params[weight.position]


def _wanted_params(program: Program) -> list[int]:
    """In the order of the results."""
    weights = [program.weights[node] for node in program.wanted.nodes]
    norms = [program.norms[norm].position for norm in program.wanted.norms]
    return [*(w.position for w in weights if w is not None), *(p + k for p in norms for k in (0, 1))]


def _norm_gradients(program: Program, norms: Norms, params: Sequence[Tensor]) -> list[Tensor]:
    """Weight and bias of each that is wanted, each in memory of its own."""
    positions = [program.norms[norm].position for norm in program.wanted.norms]
    views = [
        view
        for norm, position in zip(program.wanted.norms, positions, strict=True)
        for view in norms.gradients_of(norm, params[position])
    ]
    gradients = [torch.empty_like(params[p + k]) for p in positions for k in (0, 1)]
    if gradients:
        torch._foreach_copy_(gradients, views)
    return gradients
