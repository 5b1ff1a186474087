"""`torch.ops.csp_kernels.stage` on random graphs against the reference in float64, and what it refuses."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_graphs import RandomGraph, arguments, some
from tolerances import error, limit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import csp_kernels as csp
from csp_kernels.ops._program import Moments
from csp_kernels.ops.stage import unsupported
from csp_kernels.reference.stage import stage as reference
from csp_kernels.stage.build import Builder, conv_norm, through_norm
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.program import Bottleneck, Program, Wanted
from csp_kernels.stage.text import decode, encode
from csp_kernels.stage.two_way_dense_block import two_way_dense_block
from csp_kernels.vocabulary import RECOMPUTE

OPS = torch.ops.csp_kernels
SEED = torch.tensor([5])

pytestmark = pytest.mark.usefixtures("native")


def packed(t: Tensor) -> Tensor:
    return t.detach().contiguous(memory_format=torch.channels_last)


class Case:
    """A graph with arguments in float64, and what the reference makes of them."""

    def __init__(self, graph: Graph, frozen: tuple[bool, ...], size: tuple[int, int] = (9, 10)) -> None:
        self.graph, self.frozen = graph, frozen
        self.inputs, self.params, self.running = arguments(graph, frozen, size)
        self.eps = [1e-5 * (i + 1) for i in range(len(graph.norms))]
        leaves = [t.requires_grad_() for t in (*self.inputs, *self.params)]
        self.exact, self.stats = reference(
            graph, self.inputs, self.params, self.running, frozen=frozen, eps=self.eps, seed=SEED
        )
        self.given = [torch.randn_like(y) for y in self.exact]
        grads = torch.autograd.grad(self.exact, leaves, self.given, allow_unused=True)
        self.grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]

    def run(self, program: Program) -> tuple[list[Tensor], Tensor, dict[int, Tensor]]:
        """Outputs, statistics, and gradients by number of the input or parameter; the program through its text."""
        text = encode(program)
        ins, params = [packed(t) for t in self.inputs], [t.detach() for t in self.params]
        outputs, kept, stats = OPS.stage.default(ins, params, self.running, SEED, text, self.eps, 2)
        if not program.backward:
            assert not kept
            return outputs, stats, {}
        found = OPS.stage_backward.default(
            [packed(g) for g in self.given], ins, outputs, kept, stats, params, self.running, SEED, text, self.eps, 2
        )
        return outputs, stats, dict(zip(self.numbers(program), found, strict=True))

    def numbers(self, program: Program) -> list[int]:
        count = len(self.graph.inputs)
        weights = [program.weights[i] for i in program.wanted.nodes]
        norms = [program.norms[i].position for i in program.wanted.norms]
        positions = [w.position for w in weights if w is not None] + [p + k for p in norms for k in (0, 1)]
        return [*program.wanted.inputs, *(count + p for p in positions)]

    def compare(self, program: Program) -> None:
        outputs, stats, grads = self.run(program)
        for y, exact in zip(outputs, self.exact, strict=True):
            torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
        trained = [c for c, f in zip(self.graph.norms, self.frozen, strict=True) for _ in range(c) if not f]
        live = torch.tensor([not f for c, f in zip(self.graph.norms, self.frozen, strict=True) for _ in range(c)])
        if trained:
            torch.testing.assert_close(
                Moments(encode(program), stats).of(None)[:, live], self.stats[:, live], rtol=1e-9, atol=1e-9
            )
        scale = max(1.0, *(g.abs().max().item() for g in self.grads))
        for number, g in grads.items():
            torch.testing.assert_close(
                g, self.grads[number], rtol=1e-8, atol=1e-9 * scale, msg=lambda m, n=number: f"gradient {n}: {m}"
            )


def random_case(seed: int) -> tuple[Case, Wanted, str]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = RandomGraph(rng, native=True).graph
    wanted = Wanted.all(graph)
    if rng.random() < 0.5:
        wanted = Wanted(some(rng, wanted.inputs), some(rng, wanted.nodes), some(rng, wanted.norms))
    return Case(graph, tuple(rng.random() < 0.3 for _ in graph.norms)), wanted, rng.choice(RECOMPUTE)


@pytest.mark.parametrize("seed", range(300))
def test_random_graphs(seed: int) -> None:
    case, wanted, recompute = random_case(seed)
    case.compare(compile_stage(case.graph, case.frozen, wanted, recompute))
    case.compare(compile_stage(case.graph, case.frozen))  # keeps nothing
    case = Case(case.graph, (True,) * len(case.frozen))
    case.compare(compile_stage(case.graph, case.frozen))  # folds what it can


@pytest.mark.parametrize("size", [(6, 35), (5, 58)], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_stride_2_on_wide_images(seed: int, size: tuple[int, int]) -> None:
    """Few channels and rows wide enough for them to be multiplied as they lie, from several reads side by side, of an
    image's three colours too; outputs of odd and even rows and columns."""
    stride_2(random.Random(seed), [3, 3, 5, 9, 17], size)


@pytest.mark.parametrize("size", [(16, 34), (23, 24), (26, 21)], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_stride_2_of_many_channels(seed: int, size: tuple[int, int]) -> None:
    """Enough of them for tiles of outputs, whose last ones are whole or not; reads of whole vectors and of others."""
    stride_2(random.Random(seed), [32, 48, 53], size)


def stride_2(rng: random.Random, choices: list[int], size: tuple[int, int]) -> None:
    torch.manual_seed(rng.randrange(1000))
    channels = rng.choice(choices)
    build = Builder(channels)
    first = build.conv([build.read(0)], channels, 1)
    read = build.read(first, build.norm(channels), rng.choice(["relu", "leaky_relu", "silu", "identity"]), slope=0.1)
    some_of_it = build.read(0, start=0, stop=channels - 1)  # nobody may write to the last one's gradient
    reads = rng.choice([[read], [build.read(0)], [some_of_it], [read, some_of_it], [build.read(0), read, read]])
    out = rng.choice([3, 8, 20, 35])
    value = build.conv(reads, out, 3, stride=2)
    build.write([build.read(value, build.norm(out), rng.choice(["identity", "relu", "silu"]))])
    build.write([read])
    graph = build.graph()
    frozen = rng.random() < 0.5, rng.random() < 0.5
    Case(graph, frozen, size).compare(compile_stage(graph, frozen, Wanted.all(graph)))
    Case(graph, (True, True), size).compare(compile_stage(graph, (True, True)))


@pytest.mark.parametrize("width", [23, 32])
def test_maps_larger_than_a_cache(width: int) -> None:
    """Sums, activations and gradients of more than 1 MiB, of whole lines (written past the caches) and of others."""
    graph = joins(width)
    frozen = (False,) * len(graph.norms)
    Case(graph, frozen, (48, 49)).compare(compile_stage(graph, frozen, Wanted.all(graph)))
    frozen = (True,) * len(graph.norms)
    Case(graph, frozen, (48, 49)).compare(compile_stage(graph, frozen))


def test_a_1x1_that_reads_channels_twice() -> None:
    """Through SiLU and as they are: the first gradient is written, the second added to it."""
    build = Builder(8)
    value = build.conv([build.read(0)], 8)
    reads = [
        build.read(value, act="silu"),
        build.read(value, start=2, stop=7),
        build.read(value, build.norm(8), "relu"),
    ]
    build.write([build.read(build.conv(reads, 8))])
    graph = build.graph()
    Case(graph, (False,)).compare(compile_stage(graph, (False,), Wanted.all(graph)))


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_deep_and_dense_graphs_compile_at_once(recompute: str) -> None:
    """Neither recursion nor time that doubles with each layer."""
    build = Builder(4)
    reads = [conv_norm(build, [build.read(0)], 4)]
    for _ in range(400):
        reads.append(conv_norm(build, reads[-2:], 4, 3))
    build.write(reads[-1:])
    graph = build.graph()
    program = compile_stage(graph, (True,) * len(graph.norms), Wanted.all(graph), recompute)
    assert len(program.backward) > 400


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_norm_of_some_of_what_a_1x1_gives(start: int) -> None:
    """It is not folded into the 1x1: it has nothing for the other channels."""
    build = Builder(3)
    value = build.conv([build.read(0)], 4)
    build.write([replace(build.read(value, start=start, stop=start + 2), norm=build.norm(2), act="relu")])
    Case(build.graph(), (True,)).compare(compile_stage(build.graph(), (True,)))


BLOCKS: dict[str, Callable[[], Graph]] = {
    "dense": lambda: dense_block(3, 24, 17, 40, 0.2),
    "post": lambda: post_dense_block(20, 17, [33, 48]),
    "two_way": lambda: two_way_dense_block(20, 16, [16, 24]),
    "joins": lambda: joins(),
}


def joins(width: int = 40) -> Graph:
    """Activations of every kind in front of both kinds of products, a sum, several segments in front of a 3x3."""
    build = Builder(20, 33)
    a = build.conv([build.read(0, act="silu"), build.read(1)], width)
    b = build.conv([build.read(0), build.read(a, build.norm(width), "mish")], width, 3)
    c = build.sum([build.read(a), build.read(b, build.norm(width), "hardswish")], "relu")
    d = conv_norm(build, [build.read(c, act="leaky_relu", slope=0.2)], width // 2, 3, "silu")
    build.write([d])
    build.write([build.read(c), build.read(b, start=3, stop=21)], pool=True)
    return build.graph()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense", "post", "two_way", "joins"])
def test_dtypes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for whole vectors and their rests; within twice the error of the reference in the same dtype."""
    graph = BLOCKS[name]()
    case = Case(graph, (False,) * len(graph.norms))
    wide = torch.float32
    inputs = [t.detach().to(dtype).requires_grad_() for t in case.inputs]
    params = [t.detach().to(wide).requires_grad_() for t in case.params]
    again = [t.detach().double().requires_grad_() for t in inputs]
    full = [p.detach().double().requires_grad_() for p in params]
    exact = step(lambda: reference(graph, again, full, eps=case.eps, seed=SEED)[0], [*again, *full], case.given)
    naive = step(lambda: reference(graph, inputs, params, eps=case.eps, seed=SEED)[0], [*inputs, *params], case.given)
    monkeypatch.setattr(sys.modules["csp_kernels.ops.stage"], "_seed", lambda *_: SEED)
    ours = step(lambda: csp.ops.stage(graph, inputs, params, eps=case.eps)[0], [*inputs, *params], case.given)
    errors = [(error(x, z), error(y, z)) for x, y, z in zip(ours, naive, exact, strict=True)]
    count = len(graph.outputs)
    for part in (errors[:count], errors[count:]):  # a ReLU that flips shows in one gradient here, in another there
        allowed = limit(max(e for _, e in part), dtype, 9 * 64)
        assert max(e for e, _ in part) <= allowed, (part, allowed)


def step(run: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients of the leaves."""
    outputs = run()
    grads = torch.autograd.grad(
        outputs, leaves, [g.to(y.dtype) for g, y in zip(given, outputs, strict=True)], allow_unused=True
    )
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_repeats_bit_by_bit(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case, wanted, _ = random_case(11)
        program = compile_stage(case.graph, case.frozen, wanted)
        first, second = case.run(program), case.run(program)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(g, second[2][i]) for i, g in first[2].items())


def test_second_derivatives_run_on_the_reference() -> None:
    graph = dense_block(1, 3, 2, 4)
    inputs, params, _ = arguments(graph, (False, False))
    inputs = [t[:1, :, :3, :3].detach().requires_grad_() for t in inputs]
    params = [p.detach().requires_grad_() for p in params]
    csp.use_backend("auto")
    torch.autograd.gradgradcheck(lambda *t: csp.ops.stage(graph, t[:1], t[1:])[0][0], (*inputs, *params))


def test_slices_are_read_in_place() -> None:
    """Channel slices of wider tensors, surrounded by NaN that nothing may read and canaries that nothing may write."""
    graph = post_dense_block(20, 17, [33])
    case = Case(graph, (False,) * 2)
    wide = [torch.full((2, 23, 9, 10), torch.nan, dtype=torch.float64) for _ in case.inputs]
    wide = [packed(t) for t in wide]
    for t, x in zip(wide, case.inputs, strict=True):
        t[:, 2:22] = x.detach()
    case.inputs = [t[:, 2:22] for t in wide]
    y, _ = csp.ops.stage(graph, case.inputs, case.params, eps=case.eps)
    torch.testing.assert_close(y[0], case.exact[0], rtol=1e-9, atol=1e-9)
    assert all(t[:, :2].isnan().all() and t[:, 22:].isnan().all() for t in wide)


@pytest.mark.parametrize("graph", [dense_block(2, 20, 17, 32, 0.2), joins(32)], ids=["dense", "joins"])
def test_opcheck(graph: Graph) -> None:
    """Widths without padding: opcheck compares what two runs have left there."""
    case = Case(graph, (False,) * len(graph.norms))
    program = encode(compile_stage(graph, case.frozen, Wanted.all(graph)))
    ins = [packed(t).requires_grad_() for t in case.inputs]
    params = [p.detach().requires_grad_() for p in case.params]
    torch.library.opcheck(OPS.stage.default, (ins, params, [], SEED, program, case.eps, 2))
    ins, params = [t.detach() for t in ins], [p.detach() for p in params]
    outputs, kept, stats = OPS.stage.default(ins, params, [], SEED, program, case.eps, 2)
    given = [packed(g) for g in case.given]
    arguments_ = given, ins, outputs, kept, stats, params, [], SEED, program, case.eps, 2
    torch.library.opcheck(OPS.stage_backward.default, arguments_, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 takes no graph for a constant")
def test_compiles() -> None:
    graph = dense_block(2, 8, 4, 16)
    inputs, params, _ = arguments(graph, (False,) * 4)
    csp.use_backend("auto")
    params = [p.detach() for p in params]
    run = torch.compile(lambda x: csp.ops.stage(graph, [x], params)[0][0].relu().sum(), fullgraph=True)
    x = inputs[0].detach().requires_grad_()
    run(x).backward()
    grad, x.grad = x.grad, None
    csp.ops.stage(graph, [x], params)[0][0].relu().sum().backward()
    assert grad is not None and x.grad is not None
    torch.testing.assert_close(grad, x.grad)


def test_fake_tensors_leave_nothing_behind() -> None:
    """A first call under FakeTensorMode, then a real one of the same program."""
    graph = dense_block(1, 5, 3, 16)
    csp.use_backend("auto")
    with FakeTensorMode():
        inputs, params, _ = arguments(graph, (False,) * 2)
        csp.ops.stage(graph, inputs, params)
    inputs, params, _ = arguments(graph, (False,) * 2)
    y, stats = csp.ops.stage(graph, inputs, params)
    exact, expected = reference(graph, inputs, params)
    assert type(stats) is Tensor
    torch.testing.assert_close(y[0], exact[0])
    torch.testing.assert_close(stats, expected)


# --- text ---


@pytest.mark.parametrize("seed", range(50))
def test_text_is_the_program(seed: int) -> None:
    rng = random.Random(seed)
    graph = RandomGraph(rng).graph
    wanted = Wanted.all(graph) if rng.random() < 0.7 else None
    program = compile_stage(graph, (False,) * len(graph.norms), wanted)
    assert decode(encode(program)) == program


def small() -> tuple[str, list[Any]]:
    """A program's text, and the operator's other arguments."""
    graph = dense_block(1, 4, 3, 16)
    case = Case(graph, (False, False))
    text = encode(compile_stage(graph, case.frozen, Wanted.all(graph)))
    return text, [[packed(t) for t in case.inputs], [p.detach() for p in case.params], [], None, case.eps, 2]


@pytest.mark.parametrize("seed", range(300))
def test_changed_programs_raise_or_run(seed: int) -> None:
    """One word of the text replaced: an exception that names the program or an argument, never a signal."""
    text, (inputs, params, running, none, eps, winograd) = small()
    rng = random.Random(seed)
    words = text.split()
    at = rng.randrange(len(words))
    words[at] = rng.choice(["-", "0", "1", "2", "3", "7", "16", "99", "1000000000", "-5", "relu", "nan", "x", "Copy"])
    changed = " ".join(words)
    try:
        outputs, kept, stats = OPS.stage.default(inputs, params, running, none, changed, eps, winograd)
        grads = [torch.ones_like(y) for y in outputs]
        OPS.stage_backward.default(
            grads, inputs, outputs, kept, stats, params, running, none, changed, eps, winograd
        )  # fmt: skip
    except RuntimeError as error:
        assert "stage" in str(error)


@pytest.mark.parametrize("end", [0, 1, 40, -1])
def test_shortened_programs_raise(end: int) -> None:
    text, (inputs, params, running, none, eps, winograd) = small()
    with pytest.raises(RuntimeError, match="program"):
        OPS.stage.default(inputs, params, running, none, " ".join(text.split()[:end]), eps, winograd)
    with pytest.raises(ValueError, match="program"):
        decode(" ".join(text.split()[:end]))


# --- arguments ---


def bad(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    graph = dense_block(1, 4, 3, 16)
    inputs, params, _ = arguments(graph, (False, False))
    given: dict[str, Any] = {"graph": graph, "inputs": inputs, "params": params}
    change(given)
    return given


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a: a.update(inputs=[]), ValueError, "inputs: got 0 tensors, expected 1"),
        (lambda a: a.update(inputs=a["inputs"][0]), TypeError, "inputs: got Tensor"),
        (lambda a: a.update(inputs=[a["inputs"][0][:, :3]]), ValueError, r"inputs\[0\]: got 3 channels"),
        (lambda a: a["params"].pop(), ValueError, "params: got 5, expected 6: denselayer1.norm1.weight"),
        (lambda a: a["params"].reverse(), ValueError, r"params\[0\] \(denselayer1.norm1.weight\)"),
        (lambda a: a.update(frozen=[True]), ValueError, "frozen: got 1"),
        (lambda a: a.update(frozen=[True, False]), ValueError, "running: got 0 tensors, expected 2"),
        (lambda a: a.update(eps=-1.0), ValueError, "eps: got -1.0"),
        (lambda a: a.update(recompute="some"), ValueError, "recompute: got 'some'"),
        (lambda a: a.update(inputs=[a["inputs"][0][:1, :, :1, :1]]), ValueError, "got one value per channel"),
    ],
)
def test_bad_arguments(change: Callable[[dict[str, Any]], None], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        csp.ops.stage(**bad(change))


FIRST: list[dict[str, Any]] = [
    {},
    {"stride": 2},
    {"pool": True},
    {"kernel": 3},
    {"kernel": 3, "stride": 2},
    {"kernel": 3, "groups": 2},
]
LAST: list[dict[str, Any]] = [{}, {"groups": 2}, {"stride": 2}, {"groups": 2, "stride": 2}, {"kernel": 1}]


@pytest.mark.parametrize("last", LAST, ids=str)
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_strips_of_a_1x1_and_a_3x3_alone(first: dict[str, Any], last: dict[str, Any]) -> None:
    """In inference a 1x1 and the 3x3 behind it, both through norms and ReLUs, run strip by strip; no other two do."""
    build = Builder(8)
    narrow = build.conv(through_norm(build, [build.read(0)]), 8, **first)
    build.write([build.read(build.conv(through_norm(build, [build.read(narrow)]), 6, **{"kernel": 3, **last}))])
    graph = build.graph()
    program = compile_stage(graph, (True, True))
    assert any(isinstance(step, Bottleneck) for step in program.forward) == (not first and not last)
    Case(graph, (True, True)).compare(program)


@pytest.mark.parametrize("act", ["identity", "silu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_output_that_is_a_term_of_a_sum(swapped: bool, act: str) -> None:
    """In inference a product that takes over the sum writes that alone: not where its own value is an output."""
    build = Builder(8)
    first = conv_norm(build, [build.read(0)], 8, 3, act)
    second = conv_norm(build, [first], 8, 3, act)
    build.write([second])
    build.write([build.read(build.sum([second, first] if swapped else [first, second]))])
    graph = build.graph()
    Case(graph, (True, True)).compare(compile_stage(graph, (True, True)))


def test_gradients_of_what_has_no_influence() -> None:
    """None, as in PyTorch: an optimizer would decay weights by zeros."""
    build = Builder(8)
    first = conv_norm(build, [build.read(0)], 8, 3, "silu")
    build.write([conv_norm(build, [first], 6)])
    build.write([conv_norm(build, [first], 5)])
    graph = build.graph()
    inputs, params, _ = arguments(graph, (False,) * 3)
    leaves = [t.detach().requires_grad_() for t in (*inputs, *params)]
    for given in ((0,), (1,), (0, 1)):
        results = []
        for run in (csp.ops.stage, reference):
            y, _ = run(graph, leaves[:1], leaves[1:])
            results.append(torch.autograd.grad([y[i].sum() for i in given], leaves, allow_unused=True))
        assert [g is None for g in results[0]] == [g is None for g in results[1]]
        assert sum(g is None for g in results[0]) == 3 * (len(given) == 1)
        for got, expected in zip(*results, strict=True):
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_averages_behind_a_stride() -> None:
    """They stay behind it: a 1x1 can average in front, or skip pixels."""
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 6, stride=2))], pool=True)
    graph = build.graph()
    Case(graph, ()).compare(compile_stage(graph, (), Wanted.all(graph)))


def test_what_the_kernels_cannot_run() -> None:
    build = Builder(4)
    build.write([build.read(build.conv([build.read(0)], 6, groups=2))])
    graph = build.graph()
    inputs, params, _ = arguments(graph, ())
    assert unsupported(graph) == "v1 has groups"
    with pytest.raises(RuntimeError, match="v1 has groups"):
        csp.ops.stage(graph, inputs, params)
    csp.use_backend("auto")
    y, _ = csp.ops.stage(graph, inputs, params)
    torch.testing.assert_close(y[0], reference(graph, inputs, params)[0][0])
