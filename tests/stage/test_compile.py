"""Programs of random graphs, run one instruction after the other, against autograd through the reference in float64."""

from __future__ import annotations

import random

import pytest
import torch
from interpreter import Interpreter
from random_graphs import RandomGraph, arguments, some
from torch import Tensor

from csp_kernels.reference.stage import stage
from csp_kernels.stage.build import Builder, through_norm
from csp_kernels.stage.check import sizes
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.program import Wanted
from csp_kernels.stage.two_way_dense_block import two_way_dense_block
from csp_kernels.vocabulary import RECOMPUTE


def check(graph: Graph, frozen: tuple[bool, ...], wanted: Wanted, recompute: str) -> None:
    inputs, params, running = arguments(graph, frozen)
    seed, eps = torch.tensor(5), [1e-5 * (i + 1) for i in range(len(graph.norms))]
    leaves = [t.requires_grad_() for t in (*inputs, *params)]
    exact, _ = stage(graph, inputs, params, running, frozen=frozen, eps=eps, seed=seed)
    given = [torch.randn_like(y) for y in exact]
    grads = torch.autograd.grad(exact, leaves, given, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    with torch.no_grad():
        program = compile_stage(graph, frozen, wanted, recompute)
        run = Interpreter(graph, program, inputs, params, running, frozen, eps, seed)
        outputs = run.forward()
        dinputs, dweights, dnorms = run.backward(given)
    for y, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    found: list[tuple[str, Tensor | None]] = [(f"input {i}", dinputs.get(i)) for i in range(len(inputs))]
    for item in graph.order:
        node = graph.nodes[item.index] if item.kind == "conv" else None
        if isinstance(node, Conv):
            parts = dweights.get(item.index, [None] * (1 + node.bias))
            found += [(f"conv {item.index} {part}", t) for part, t in zip(("weight", "bias"), parts, strict=False)]
        else:
            listed = dnorms[item.index] if item.index in wanted.norms else [None, None]
            found += [(f"norm {item.index} {part}", t) for part, t in zip(("weight", "bias"), listed, strict=True)]
    scale = max(1.0, *(g.abs().max().item() for g in grads))
    for (name, g), expected in zip(found, grads, strict=True):
        assert (g is not None) == is_wanted(name, wanted), name
        if g is not None:
            torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}")


def is_wanted(name: str, wanted: Wanted) -> bool:
    kind, index = name.split()[:2]
    return int(index) in {"input": wanted.inputs, "conv": wanted.nodes, "norm": wanted.norms}[kind]


@pytest.mark.parametrize("seed", range(200))
def test_random_graphs(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = RandomGraph(rng).graph
    frozen = tuple(rng.random() < 0.25 for _ in graph.norms)
    wanted = Wanted.all(graph)
    if rng.random() < 0.5:
        wanted = Wanted(some(rng, wanted.inputs), some(rng, wanted.nodes), some(rng, wanted.norms))
    check(graph, frozen, wanted, rng.choice(RECOMPUTE))


def two_outputs_of_one_input() -> Graph:
    """[x, a] and [x, b]: one of them can hold x as it is."""
    build = Builder(4)
    a, b = (build.conv(through_norm(build, [build.read(0)]), 3, 3) for _ in range(2))
    build.write([build.read(0), build.read(a)])
    build.write([build.read(0), build.read(b)])
    return build.graph()


def siblings() -> Graph:
    """1x1 convolutions of the same reads: the first two can be one, those with dropout, bias or pooling cannot."""
    build = Builder(4)
    reads = through_norm(build, [build.read(0)])
    plain = [build.conv(reads, c) for c in (3, 2)]
    others = [build.conv(reads, 3, drop_rate=0.3), build.conv(reads, 3, drop_rate=0.3), build.conv(reads, 2, bias=True)]
    build.write(through_norm(build, [build.read(v) for v in (*plain, *others)]))
    build.write([build.read(build.conv(reads, 2, pool=True)), build.read(build.conv(reads, 3, pool=True))])
    return build.graph()


def averaged_outputs() -> Graph:
    """Averaging can go in front of the first 1x1 and of the one with groups, not before dropout, nor twice."""
    build = Builder(4)
    reads = through_norm(build, [build.read(0)])
    plain, dropping = build.conv(reads, 3), build.conv(reads, 2, drop_rate=0.3)
    build.write([build.read(v) for v in (0, plain, dropping, build.conv(reads, 2, groups=2))], pool=True)
    build.write([build.read(build.conv(reads, 3, pool=True))], pool=True)
    return build.graph()


BLOCKS = {
    "averaged outputs": averaged_outputs(),
    "stage last pre": csp_stage(9, 4, 4, [6, 6], 7, 11, fusion="last"),
    "siblings": siblings(),
    "two outputs": two_outputs_of_one_input(),
    "pre": dense_block(3, 8, 4, 6, 0.2),
    "post": post_dense_block(8, 4, [6, 5]),
    "two_way": two_way_dense_block(8, 4, [6, 5]),
    **{f"stage {kind}": csp_stage(9, 4, 4, [6, 6], 7, 10, layer=kind) for kind in ("pre", "post", "two_way")},
    "stage last": csp_stage(9, 4, 4, [6, 6], 7, 11, fusion="last", layer="post"),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, recompute: str) -> None:
    graph = BLOCKS[name]
    check(graph, (False,) * len(graph.norms), Wanted.all(graph), recompute)


def kept(graph: Graph, recompute: str) -> list[int]:
    """Channels of the buffers that are kept beside inputs and outputs."""
    program = compile_stage(graph, (False,) * len(graph.norms), Wanted.all(graph), recompute)
    return [buffer.channels for buffer in program.buffers if buffer.kind == "kept"]


def test_what_is_kept() -> None:
    """A dense block's features lie in its output; the bottlenecks are all that is kept, or nothing."""
    assert [kept(BLOCKS["pre"], how) for how in RECOMPUTE] == [[6, 6, 6], [], []]
    assert [kept(BLOCKS["post"], how) for how in RECOMPUTE] == [[8, 6, 5], [8], []]
    graph = BLOCKS["pre"]
    kinds = {buffer.kind for buffer in compile_stage(graph, (False,) * len(graph.norms)).buffers}
    assert kinds == {"input", "output", "scratch"}


def test_neighbours_are_read_as_one() -> None:
    """The last layer reads x and the slices before it: in the output, or beside x with the norms of the slices."""
    steps = {
        name: str(compile_stage(BLOCKS[name], (False,) * len(BLOCKS[name].norms))).splitlines()
        for name in ("pre", "post", "two_way")
    }
    assert "  b4[0:6] = conv1x1 w4(relu(a0(b1[0:16]))) -> s28" in steps["pre"]
    assert "  b4[0:5] = conv1x1 w2(b0[0:8], relu(a0(b2[0:4]))) -> s14" in steps["post"]
    assert "  b3[0:10] = conv1x1 w5+w7(b0[0:8], relu(a0(b4[0:4]))) -> s12" in steps["two_way"]
    assert "  b1[0:16] = activate(b0[0:8], relu(a0(b4[0:8])))" in steps["two_way"]


def test_unwanted_gradients_are_left_out() -> None:
    """Nothing wanted is as without gradients: nothing is kept, no backward; without dx it ends at the first layer."""
    graph = BLOCKS["pre"]
    assert compile_stage(graph, (True,) * 6, Wanted((), (), ())) == compile_stage(graph, (True,) * 6)
    last = compile_stage(graph, (False,) * 6, Wanted((), (5,), ()))
    assert [type(step).__name__ for step in last.backward] == ["Fill", "ActivateBackward", "ProductBackward"]
    text = str(last).splitlines()
    assert text[-1] == "  dw5, relu(a48(b4[0:6])) <- conv3x3 drop0.2 w5 db1[16:20]"


def test_print() -> None:
    graph = dense_block(1, 8, 4, 6)
    program = compile_stage(graph, (False, True), Wanted.all(graph), "bottleneck")
    assert str(program).splitlines() == [
        "b0 = input0[8]",
        "b1 = output0[12]",
        "b2 = scratch0[6]",
        "forward:",
        "  fill norm1[0:6] a8 running",
        "  b1[0:8] = copy b0[0:8] -> s0",
        "  fill norm0[0:8] a0 s0",
        "  b2[0:6] = conv1x1 w0(relu(a0(b1[0:8])))",
        "  b1[8:12] = conv3x3 w1(relu(a8(b2[0:6])))",
        "backward:",
        "  fill norm0[0:8] a0 s0, norm1[0:6] a8 running",
        "  b1[0:12]<write> <- db1[0:12]",
        "  b2[0:6] = conv1x1 w0(relu(a0(b1[0:8])))",
        "  dw1, relu(a8(b2[0:6]))<write sums> <- conv3x3 w1 db1[8:12]",
        "  settle norm1[0:6] a8 running",
        "  dw0, relu(a0(b1[0:8]))<add sums> <- conv1x1 w0 db2[0:6]",
        "  settle norm0[0:8] a0 s0",
        "  dinput0 = db1[0:8] - owed s0",
    ]


def test_bad_arguments() -> None:
    graph = BLOCKS["pre"]
    with pytest.raises(ValueError, match="frozen: got 2 items, expected 6, one a norm"):
        compile_stage(graph, (False, False))
    with pytest.raises(ValueError, match="recompute: got 'some', expected one of none, bottleneck, all"):
        compile_stage(graph, (False,) * 6, None, "some")


def test_sizes() -> None:
    build = Builder(4)
    z = build.conv([build.read(0)], 4, 3, stride=2)
    build.write([build.read(build.conv([build.read(z)], 4, pool=True))], pool=True)
    assert sizes(build.graph()) == ["", "c", "cf", "cff"]
