"""use_backend in threads, asyncio tasks and generators: a context is its thread's, a plain call the process's."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import csp_kernels as csp
from csp_kernels.backends import resolve, selected


def elsewhere(function: Callable[[], Any] = selected) -> Any:
    """What it returns in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_context_is_its_threads_own() -> None:
    csp.use_backend("auto")
    with csp.use_backend("reference"):
        assert (selected(), elsewhere()) == ("reference", "auto")
        assert elsewhere(lambda: resolve("cpu")) == "native"
    assert (selected(), elsewhere()) == ("auto", "auto")


def test_a_plain_call_is_everybodys() -> None:
    elsewhere(lambda: csp.use_backend("reference") and None)
    assert selected() == elsewhere() == "reference"
    kept = csp.use_backend("native")
    assert selected() == elsewhere() == "native"
    with csp.use_backend("auto"):
        assert elsewhere() == "native"
    with kept:  # now it is a context, and never was a plain call
        assert (selected(), elsewhere()) == ("native", "reference")
    assert selected() == elsewhere() == "reference"


def test_interleaved_contexts_leave_the_process_as_it_was() -> None:
    """Thread a enters, b enters, a leaves, b leaves: once left "reference" behind for good."""
    csp.use_backend("auto")
    steps = [threading.Event() for _ in range(3)]

    def first() -> None:
        with csp.use_backend("reference"):
            steps[0].set()
            steps[1].wait(10)
        steps[2].set()

    def second() -> str:
        steps[0].wait(10)
        with csp.use_backend("native"):
            steps[1].set()
            steps[2].wait(10)
            return selected()

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.submit(first), pool.submit(second)
        a.result()
        assert b.result() == "native"
    assert selected() == elsewhere() == "auto"


def test_many_threads() -> None:
    """Each sees its own choice all the time, and nothing is left; contexts made long before they are entered."""
    csp.use_backend("auto")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(seed: int) -> int:
        wrong, rng = 0, random.Random(seed)
        for _ in range(200):
            outer, inner = (rng.choice(("native", "reference", "auto")) for _ in range(2))
            with csp.use_backend(outer):
                context = csp.use_backend(inner)
                with context:
                    wrong += selected() != inner
                wrong += selected() != outer
        return wrong

    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0
    finally:
        sys.setswitchinterval(before)
    assert selected() == elsewhere() == "auto"


def test_plain_call_inside_a_context_ends_with_it() -> None:
    csp.use_backend("auto")
    with csp.use_backend("native"):
        for _ in range(3):
            csp.use_backend("reference")
        assert (selected(), elsewhere()) == ("reference", "auto")
        with csp.use_backend("native"):
            assert selected() == "native"
        assert selected() == "reference"
    assert selected() == elsewhere() == "auto"


def test_nested_entered_again_and_left_out_of_order() -> None:
    csp.use_backend("auto")
    same = csp.use_backend("reference")
    with same, csp.use_backend("native"), same:
        assert selected() == "reference"
    assert selected() == "auto"
    first, second = csp.use_backend("reference"), csp.use_backend("native")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert selected() == "native"
    second.__exit__(None, None, None)
    assert selected() == elsewhere() == "auto"
    with ExitStack() as stack:
        stack.enter_context(csp.use_backend("reference"))
        assert (selected(), elsewhere()) == ("reference", "auto")
    assert selected() == "auto"


def test_errors_leave_the_choice_as_it_was() -> None:
    csp.use_backend("auto")
    with pytest.raises(KeyError), csp.use_backend("reference"), csp.use_backend("native"):
        raise KeyError
    with csp.use_backend("reference"):
        with pytest.raises(ValueError, match="name: got 'fast'"):
            csp.use_backend("fast")
        assert selected() == "reference"
    assert selected() == "auto"


def test_generators() -> None:
    """As with any context variable a generator's context is its caller's while it waits; it ends where it is closed."""
    csp.use_backend("auto")

    def generate() -> Iterator[str]:
        with csp.use_backend("reference"):
            yield selected()

    generator = generate()
    assert next(generator) == "reference"
    with csp.use_backend("native"):
        generator.close()  # out of order
        assert selected() == "native"
    assert selected() == "auto"


def test_tasks() -> None:
    """A task starts with the choice it was made under and keeps its own."""
    csp.use_backend("auto")

    async def work(name: str) -> tuple[str, str, str]:
        inherited = selected()
        with csp.use_backend(name):
            await asyncio.sleep(0.01)
            inside = selected()
        await asyncio.sleep(0)
        return inherited, inside, selected()

    async def main() -> list[tuple[str, str, str]]:
        with csp.use_backend("reference"):
            tasks = [asyncio.create_task(work(name)) for name in ("native", "reference", "auto")]
        return await asyncio.gather(*tasks)

    found = asyncio.run(main())
    assert found == [("reference", name, "reference") for name in ("native", "reference", "auto")]
    assert selected() == "auto"


def test_backward_runs_as_forward_did() -> None:
    """In another thread and after the context."""
    block = csp.DenseBlock(2, 8, 4)
    for name, fused in (("native", True), ("reference", False)):
        with csp.use_backend(name):
            y = block(torch.randn(2, 8, 5, 5))
        with csp.use_backend("reference" if fused else "native"):
            elsewhere(lambda y=y: y.sum().backward(retain_graph=True))
            with torch.profiler.profile() as profile:
                y.sum().backward()
        assert any("stage_backward" in e.name for e in profile.events()) == fused


def test_old_settings_are_forgotten() -> None:
    """Plain calls in a loop take no memory."""
    module = sys.modules["csp_kernels.backends"]
    for i in range(50):
        csp.use_backend(("native", "reference")[i % 2])
    with csp.use_backend("auto"):
        for i in range(50):
            csp.use_backend(("native", "reference")[i % 2])
        assert len(module._calls) <= 3 and len(module._contexts.get()) <= 4


# --- compilation ---


def test_compiled_graphs_follow_the_choice() -> None:
    """One graph a choice, without a break, chosen anew at each call and in each thread."""
    block, x = csp.DenseBlock(2, 8, 4), torch.randn(2, 8, 5, 5)
    operators: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*arguments: Any) -> Any:
            operators.append(any("csp_kernels" in str(n.target) for n in graph.graph.nodes))
            return graph(*arguments)

        return run

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    counters.clear()
    csp.use_backend("auto")
    compiled(x)
    with csp.use_backend("reference"):
        compiled(x)
        elsewhere(lambda: compiled(x))
        with csp.use_backend("native"):
            compiled(x)
        compiled(x)
    compiled(x)
    reads = sys.modules["csp_kernels.backends"]._dynamo_reads_contexts()  # if not, a context counts in all threads
    assert operators == [True, False, reads, True, False, True]
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize("reads", [True, False])
def test_context_inside_a_compiled_function(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a Dynamo that knows no ContextVar."""
    if not reads:
        unknown = torch.compiler.assume_constant_result(lambda: False)
        monkeypatch.setattr(sys.modules["csp_kernels.backends"], "_dynamo_reads_contexts", unknown)
    csp.use_backend("auto")
    block, x = csp.DenseBlock(2, 8, 4).eval(), torch.randn(2, 8, 5, 5)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        with csp.use_backend("reference"):
            y, inside = block(x), selected()
            with csp.use_backend("native"):
                inside += selected()
            inside += selected()
        return y, inside + selected()

    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        y, names = compiled(x)
        torch.testing.assert_close(y, block(x))
        assert names == "referencenativereferenceauto" and selected() == elsewhere() == "auto"
        with csp.use_backend("native"):
            assert compiled(x)[1] == "referencenativereferencenative"
    assert selected() == elsewhere() == "auto"
