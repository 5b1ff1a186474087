"""Convolutions with biases, which programs know as parts of norms: against the reference in float64."""

from __future__ import annotations

import random

import pytest
import torch
from random_graphs import RandomGraph, arguments
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.reference.stage import stage as reference
from csp_kernels.stage.biases import Piece, without_biases
from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Conv, Graph, Read


@pytest.fixture(autouse=True)
def kernels() -> object:
    with csp.use_backend("native"):
        yield


def results(graph: Graph, frozen: tuple[bool, ...], where: object, given: list[list[Tensor]]) -> list[Tensor | None]:
    """Outputs, statistics, and the gradients of inputs and parameters."""
    inputs, params, running = ([t.detach().clone() for t in tensors] for tensors in given)
    leaves = [t.requires_grad_() for t in (*inputs, *params)]
    y, stats = where(graph, inputs, params, running, frozen=frozen)  # type: ignore[operator]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in y]
    loss = torch.stack([(t * w).sum() for t, w in zip(y, weights, strict=True)]).sum()
    return [*y, stats, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def compare(graph: Graph, frozen: tuple[bool, ...]) -> None:
    given = [list(tensors) for tensors in arguments(graph, frozen)]
    torch.manual_seed(1)  # of dropout
    found = results(graph, frozen, csp.ops.stage, given)
    torch.manual_seed(1)
    expected = results(graph, frozen, reference_with_seed, given)
    scale = max(1.0, *(t.abs().max().item() for t in expected if t is not None and t.numel()))
    for got, exact in zip(found, expected, strict=True):
        if exact is None:
            assert got is None or not got.any()
            continue
        assert got is not None
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9 * scale)


def reference_with_seed(*arguments: object, **options: object) -> object:
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    return reference(*arguments, seed=seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(80))
def test_random_graphs(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = RandomGraph(rng, native=True, biased=True).graph
    compare(graph, tuple(rng.random() < 0.4 for _ in graph.norms))
    compare(graph, (True,) * len(graph.norms))


def test_random_graphs_have_biases() -> None:
    graphs = [RandomGraph(random.Random(seed), native=True, biased=True).graph for seed in range(80)]
    with_bias = [any(isinstance(node, Conv) and node.bias for node in graph.nodes) for graph in graphs]
    assert sum(with_bias) > 40


def test_pieces() -> None:
    """A norm over parts of two values, one with a bias; of the other reads of that value one overlaps another."""
    build = Builder(3)
    plain, biased = build.conv([build.read(0)], 4), build.conv([build.read(0)], 6, bias=True)
    norm = build.norm(6)
    reads = [Read(plain, 0, 2, norm, 0), Read(biased, 1, 5, norm, 2), Read(biased, 3, 6), Read(biased, 4, 5)]
    build.write([build.read(build.conv(reads, 5))])
    made = without_biases(build.graph())
    assert made.pieces == ((Piece(None, 0, 2), Piece(1, 1, 5)), (Piece(1, 3, 6),))
    assert made.graph.nodes[2].reads[2:] == (Read(biased, 3, 6, 1, 0), Read(biased, 4, 5, 1, 1))
    compare(build.graph(), (False,))
    compare(build.graph(), (True,))


def block() -> Graph:
    """What is left of a residual block when another tool has folded its first norm, and one with bias and norm."""
    build = Builder(8)
    first = build.conv([build.read(0)], 6, bias=True, name="first")
    second = build.conv([build.read(first, act="silu")], 8, 3, bias=True, name="second")
    total = build.sum([build.read(second, build.norm(8, "norm"), "relu"), build.read(0)])
    build.write([conv_norm(build, [build.read(total)], 8, prefix="last.")])
    return build.graph()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Sequential()
        self.last.conv, self.last.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.second(nn.functional.silu(self.first(x))))) + x
        return torch.relu(self.last.norm(self.last.conv(y)))


@pytest.mark.parametrize("train", [True, False])
def test_a_module(train: bool) -> None:
    """Three steps of SGD with weight decay, which a bias under a batch norm feels too, and inference behind them."""
    torch.manual_seed(0)
    plain, fused = Block().double(), csp.Stage(block()).double()
    fused.load_state_dict(plain.state_dict())
    modules = plain, fused
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.1) for m in modules]
    for _ in range(3):
        x = torch.randn(2, 8, 6, 5).double()
        for module, optimizer in zip(modules, optimizers, strict=True):
            optimizer.zero_grad()
            module.train(train)(x).square().mean().backward()
            optimizer.step()
    for (name, got), expected in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        outputs = [m.eval()(x) for m in (plain, fused, fused, fused)]  # the third call packs, the fourth uses it
        for y in outputs[1:]:
            torch.testing.assert_close(y, outputs[0], rtol=1e-9, atol=1e-10)
        for module in modules:
            module.first.bias.add_(1.0)
            module.second.bias.mul_(2.0)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)


def test_explain_and_check() -> None:
    stage = csp.Stage(block())
    found = csp.explain(stage, torch.randn(2, 8, 6, 5))
    assert not found.unsupported and "first" in {name for step in found.forward for name in step.parameters}
    x = torch.randn(2, 8, 6, 5)
    verdict = csp.check(stage, x)
    assert verdict, str(verdict)


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 takes no graph for a constant")
def test_compile() -> None:
    stage, x = csp.Stage(block()), torch.randn(2, 8, 6, 5)
    gradients = []
    for module in (stage, torch.compile(stage, backend="aot_eager", fullgraph=True)):
        stage.zero_grad()
        module(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in stage.parameters()])
    torch.testing.assert_close(*gradients)


def test_dropout_behind_a_bias_is_the_references() -> None:
    build = Builder(4)
    build.write([build.read(build.conv([build.read(0)], 4, 3, bias=True, drop_rate=0.5))])
    assert csp.Stage(build.graph()).holders()[1] == "v1 has dropout behind a bias"
