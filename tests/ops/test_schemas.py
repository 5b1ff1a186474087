"""opcheck's four tests (schema, fake kernel, autograd registration, AOT dispatch) on the programs of every operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from csp_kernels.ops.stage import parameter_shapes
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph, without_dropout
from csp_kernels.stage.partial_transition import partial_transition
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.program import Wanted
from csp_kernels.stage.text import encode
from csp_kernels.stage.two_way_dense_block import two_way_dense_block

OPS = torch.ops.csp_kernels
SMALL = (2, 4, 6)  # N, H, W

pytestmark = pytest.mark.usefixtures("native")

# What is kept has multiples of 16 channels here: opcheck compares two runs, and nobody writes to padding.
GRAPHS: dict[str, Callable[[], Graph]] = {
    "dense_block": partial(dense_block, 2, 5, 4, 16, 0.5),
    "post_dense_block": partial(post_dense_block, 5, 16, [16, 16]),
    "two_way_dense_block": partial(two_way_dense_block, 5, 32, [16, 32]),
    "concat_conv": partial(concat_conv, [5, 16], [16, 16]),
    "concat_conv mish": partial(concat_conv, [5, 16], [7, 9], "mish"),
}
for fusion in ("csp", "first", "last"):
    for order in ("pre", "post"):
        GRAPHS[f"partial_transition {order} {fusion}"] = partial(
            partial_transition, 3, 8, 16, 32, fusion=fusion, order=order
        )
    for layer in ("pre", "post", "two_way"):
        part = 3 if layer != "pre" else 16
        GRAPHS[f"csp_stage {layer} {fusion}"] = partial(
            csp_stage, 16 + part, part, 32, [16, 16], 16, 32, layer=layer, fusion=fusion
        )


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """opcheck compares what two runs left in scratch outputs: no poison here."""


def image(channels: int) -> Tensor:
    n, h, w = SMALL
    return torch.randn(n, channels, h, w).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_training(name: str, frozen: bool, recompute: str) -> None:
    graph = GRAPHS[name]()
    inputs, params, rest = arguments(graph, frozen, Wanted.all(graph), recompute)
    for t in (*inputs, *params):
        t.requires_grad_()
    torch.library.opcheck(OPS.stage.default, (inputs, params, *rest))
    inputs, params = [t.detach() for t in inputs], [t.detach() for t in params]
    outputs, kept, stats = OPS.stage.default(inputs, params, *rest)
    grads = [torch.randn_like(t) for t in outputs]
    torch.library.opcheck(OPS.stage_backward.default, (grads, inputs, outputs, kept, stats, params, *rest))


@pytest.mark.parametrize("name", GRAPHS)
def test_inference(name: str) -> None:
    inputs, params, rest = arguments(without_dropout(GRAPHS[name]()), True, None, "none")
    torch.library.opcheck(OPS.stage.default, (inputs, params, *rest))


def test_the_backward_operator_itself_refuses_gradients() -> None:
    """What is left to say it under torch.compile."""
    graph = GRAPHS["concat_conv"]()
    inputs, params, rest = arguments(graph, False, Wanted.all(graph), "none")
    outputs, kept, stats = OPS.stage.default(inputs, params, *rest)
    params = [p.requires_grad_() for p in params]
    grads = [torch.randn_like(t) for t in outputs]
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        OPS.stage_backward.default(grads, inputs, outputs, kept, stats, params, *rest)[0].sum().backward()


def arguments(
    graph: Graph, frozen: bool, wanted: Wanted | None, recompute: str
) -> tuple[list[Tensor], list[Tensor], tuple[object, ...]]:
    """Inputs, parameters, and what the operator takes behind them."""
    params = [torch.rand(shape) + 0.1 for shape in parameter_shapes(graph)[1]]
    running = [torch.rand(c) + 0.5 for c in graph.norms for _ in range(2) if frozen]
    program = encode(compile_stage(graph, (frozen,) * len(graph.norms), wanted, recompute))
    seed = None if graph == without_dropout(graph) else torch.tensor([3])
    return [image(c) for c in graph.inputs], params, (running, seed, program, [1e-5] * len(graph.norms), 2)
