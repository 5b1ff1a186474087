"""What a device adds: larger maps, autocast, streams, CUDA graphs, no synchronisation, 64-bit offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import cases
import pytest
import torch
from cases import DTYPES, Case, ConcatConvCase
from gpu_cases import LARGE, OPERATORS, DenseCase
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp

operators = pytest.mark.parametrize("name", OPERATORS)
needs_cuda = pytest.mark.usefixtures("cuda")


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_many_tiles(name: str, dtype: torch.dtype) -> None:
    cases.compare(replace(LARGE[name], dtype=dtype))


@operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype, device: str) -> None:
    """As with inputs that are cast by hand; gradients in the dtype of the leaves."""
    case = OPERATORS[name]
    leaves, running = {key: t.requires_grad_() for key, t in case.leaves().items()}, case.running()
    with torch.autocast(device, dtype=dtype):
        outputs, _ = case(csp.ops, leaves, running)
    cast = {key: t.to(dtype) if key in case.inputs else t for key, t in leaves.items()}
    again, _ = case(csp.ops, cast, running)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(outputs, again, strict=True))
    gradients = torch.autograd.grad([y.float().sum() for y in outputs], list(leaves.values()))
    assert all(g.dtype == torch.float32 for g in gradients)


@contextmanager
def forbidding_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@operators
@pytest.mark.parametrize("frozen", [(), (True, False)], ids=["train", "mixed"])
def test_no_synchronisation(name: str, frozen: tuple[bool, ...]) -> None:
    case = replace(OPERATORS[name], frozen=frozen)
    leaves, running = case.leaves(), case.running()
    given = cases.grads(case, case(csp.ops, leaves, running)[0])
    cases.run(case, csp.ops, leaves, running, given)  # compiles
    with forbidding_synchronisation():
        cases.run(case, csp.ops, leaves, running, given)


@needs_cuda
@operators
def test_other_stream(name: str) -> None:
    """Work of a stream that starts late: a kernel launched elsewhere would read zeros."""
    case = OPERATORS[name]
    leaves, running = case.leaves(), case.running()
    given = cases.grads(case, case(csp.ops, leaves, running)[0])
    expected = cases.run(case, csp.ops, leaves, running, given)
    late = {key: torch.zeros_like(t) for key, t in leaves.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for key, t in leaves.items():
            late[key].copy_(t)
        got = cases.run(case, csp.ops, late, running, given)
    stream.synchronize()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@needs_cuda
@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph(name: str, dtype: torch.dtype) -> None:
    """Forward and backward captured once, replayed with other values."""
    case = replace(OPERATORS[name], dtype=dtype)
    static, running = case.leaves(), case.running()
    given = cases.grads(case, case(csp.ops, static, running)[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cases.run(case, csp.ops, static, running, given)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.run(case, csp.ops, static, running, given)
    for _ in range(2):
        fill(static, case.leaves())
        graph.replay()
        for key, value in cases.run(case, csp.ops, static, running, given).items():
            assert torch.equal(captured[key], value), key


def fill(static: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, t in values.items():
        static[key].copy_(t)


@needs_cuda
def test_tensors_on_another_device_than_the_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = OPERATORS["dense_block"]
    leaves, running = case.leaves(), case.running()
    expected = cases.run(case, csp.ops, leaves, running)
    given = [g.to("cuda:1") for g in cases.grads(case, case(csp.ops, leaves, running)[0])]
    moved = {key: t.to("cuda:1") for key, t in leaves.items()}
    assert torch.cuda.current_device() == 0
    for key, value in cases.run(case, csp.ops, moved, running, given).items():
        assert value.device.index == 1 and torch.equal(value.to("cuda:0"), expected[key]), key


FAR: dict[str, Case] = {  # images of 2**18 pixels; the last begins beyond 2**31 elements
    "concat_conv": ConcatConvCase(channels=(64,), out=24, frozen=(True,)),
    "dense_block": DenseCase(channels=40, growth=24, width=32, layers=1, frozen=(True,)),
}


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("name", FAR)
def test_offsets_beyond_32_bits(name: str) -> None:
    """With fixed statistics the last image has nothing to do with the others: output and gradient as of it alone."""
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs 50 GB of free memory on the GPU")
    torch.utils.deterministic.fill_uninitialized_memory = False  # takes its time
    case = replace(FAR[name], size=(1, 512, 512), dtype=torch.bfloat16)
    leaves, running = case.leaves(), case.running()
    (key,) = case.inputs
    alone = cases.run(case, csp.ops, leaves, running)
    (c,) = case.inputs.values()
    n = 2**31 // (c * 2**18) + 2
    x = torch.zeros(n, c, 512, 512, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x[-1] = leaves[key][0]
    leaf = x.requires_grad_()
    (y,), _ = case(csp.ops, {**leaves, key: leaf}, running)
    torch.testing.assert_close(y[-1:], alone["y0"])
    grad = torch.zeros_like(y)
    grad[-1:] = cases.grads(case, [y[-1:]])[0]
    (dx,) = torch.autograd.grad(y, leaf, grad)
    torch.testing.assert_close(dx[-1:], alone[f"grad {key}"])
    assert not dx[0].any()


@needs_cuda
@pytest.mark.parametrize("name", ["dense_block", "concat_conv"])
def test_tf32_is_used_only_where_it_is_allowed(name: str) -> None:
    case = replace(LARGE[name], kinks=False)
    leaves, running = case.leaves(), case.running()
    wide = {key: t.double() for key, t in leaves.items()}
    exact = cases.run(case, csp.reference, wide, running)["y0"]
    full = error(cases.run(case, csp.ops, leaves, running)["y0"], exact)
    torch.set_float32_matmul_precision("high")
    less = error(cases.run(case, csp.ops, leaves, running)["y0"], exact)
    assert full <= limit(0.0, torch.float32, 16 * case.reduction) and less <= 5e-3
