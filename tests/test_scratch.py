"""Scratch memory of the CPU kernels: any number of threads, what failing calls leave behind, and when it goes back."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import csp_kernels as csp
from csp_kernels import native

pytestmark = pytest.mark.usefixtures("native")

HEAD = """
import resource, sys, torch, csp_kernels as csp
from csp_kernels import native
csp.use_backend("native")
torch.manual_seed(0)
"""
MANY_THREADS = """
LAYERS = {
    "concat": lambda: (csp.ConcatConv([256, 256], 512), [torch.randn(2, 256, 28, 28) for _ in range(2)]),
    "growth 48": lambda: (csp.DenseBlock(2, 64, 48), torch.randn(2, 64, 28, 28)),
    "growth 32": lambda: (csp.DenseBlock(2, 64, 32, recompute="bottleneck"), torch.randn(2, 64, 28, 28)),
    "post": lambda: (csp.PostDenseBlock(2, 20, 12), torch.randn(4, 20, 28, 28)),
    "two way": lambda: (csp.TwoWayDenseBlock(2, 20, 12), torch.randn(4, 20, 28, 28)),
    "transition": lambda: (csp.Transition(64, 32), torch.randn(4, 64, 28, 28)),
    "partial": lambda: (csp.PartialTransition(20, 40, 30, 50), [torch.randn(4, c, 28, 28) for c in (20, 40)]),
    "stage": lambda: (csp.CSPDenseStage(40, 60, 2, 12), torch.randn(4, 40, 28, 28)),
}

def gradients(layer, x):
    y = layer(*x) if isinstance(layer, csp.PartialTransition) else layer(x)
    layer.zero_grad()
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in layer.parameters())]

for name, make in LAYERS.items():
    layer, x = make()
    torch.set_num_threads(1)
    one = gradients(layer.eval(), x)
    native.empty_cache()  # the next call is a first one again
    torch.set_num_threads(int(sys.argv[1]))
    for a, b in zip(one, gradients(layer, x)):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")
"""


def run(program: str, *arguments: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", HEAD + program, *arguments]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False, timeout=180)
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.parametrize("threads", ["48", "128", "512"])
def test_first_call_of_many_threads(threads: str) -> None:
    run(MANY_THREADS, threads)


# A little more address space at a time: a call fails at each place where it takes memory, in tasks too.
TOO_LITTLE_MEMORY = """
torch.set_num_threads(2)
channels, layer = {
    "dense": lambda: (8, csp.DenseBlock(1, 8, 8, bn_size=64, recompute="bottleneck")),
    "post": lambda: (8, csp.PostDenseBlock(1, 8, 8, bn_size=64)),
    "stage": lambda: (16, csp.CSPDenseStage(16, 16, 1, 8, bn_size=64, recompute="bottleneck")),
    "concat": lambda: (16, csp.ConcatConv([16], 256, act="silu")),
}[sys.argv[1]]()
x = torch.randn(2, channels, 48, 48)
x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
start = {name: t.clone() for name, t in layer.state_dict().items()}
hard = resource.getrlimit(resource.RLIMIT_AS)[1]

def limited(megabytes, call):
    native.empty_cache()
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), hard))
    try:
        return call(), None
    except (MemoryError, RuntimeError) as error:  # RuntimeError: torch's own, for tensors
        return None, error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

def gradients(y):
    return torch.autograd.grad(y.square().mean(), [x, *layer.parameters()], retain_graph=True)

y = layer(x)  # threads start, tensors' memory is at hand
wanted, gradient = y.detach(), gradients(y)
after = {name: t.clone() for name, t in layer.state_dict().items()}
same = lambda state: all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
del y
layer.load_state_dict(start)
failed = out_of_scratch = 0
for megabytes in range(0, 400, 4):
    y, error = limited(megabytes, lambda: layer(x))
    if error is None:
        break
    failed += 1
    out_of_scratch += isinstance(error, MemoryError)
    assert same(start), "a forward that failed has counted"
assert y is not None
assert torch.equal(y, wanted) and same(after)
for megabytes in range(0, 400, 4):
    grads, error = limited(megabytes, lambda: gradients(y))
    if error is None:
        break
    failed += 1
    out_of_scratch += isinstance(error, MemoryError)
    assert same(after), "a backward has counted"
assert grads is not None and failed
assert out_of_scratch or sys.argv[1] == "concat"  # whose tensors are larger than its scratch
assert all(map(torch.equal, grads, gradient)) and same(after)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux holds a process to RLIMIT_AS")
@pytest.mark.parametrize("layer", ["dense", "post", "stage", "concat"])
def test_too_little_memory(layer: str) -> None:
    run(TOO_LITTLE_MEMORY, layer)


IDLE_MEMORY_IS_TAKEN_BACK = """
import threading
torch.set_num_threads(1)
block = csp.DenseBlock(1, 8, 8, bn_size=64).eval()
x = torch.randn(4, 8, 64, 64)
def hold():
    with torch.no_grad():
        for _ in range(2):
            block.train()(x)
    held.set(), done.wait()
held, done = threading.Event(), threading.Event()
other = threading.Thread(target=hold, daemon=True)
other.start(), held.wait()
before = native.scratch_bytes()
assert before >= 32 << 20, before
pages = int(open("/proc/self/statm").read().split()[0])
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (20 << 20), hard))
with torch.no_grad():
    block(x)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
done.set(), other.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux holds a process to RLIMIT_AS")
def test_what_idle_threads_hold_is_used_before_a_call_fails() -> None:
    run(IDLE_MEMORY_IS_TAKEN_BACK)


@pytest.fixture
def held() -> Iterator[int]:
    """Scratch memory that a step of this thread leaves."""
    csp.empty_cache()
    assert native.scratch_bytes() == 0
    step()
    step()
    yield native.scratch_bytes()
    csp.empty_cache()


def step(pixels: int = 64) -> torch.Tensor:
    torch.manual_seed(1)
    block = csp.DenseBlock(2, 16, 8)
    y: torch.Tensor = block(torch.randn(8, 16, pixels, pixels))
    y.sum().backward()
    return y.detach()


def test_memory_is_kept_between_steps_and_given_back_on_demand(held: int) -> None:
    assert held >= 2 << 20
    step()
    assert native.scratch_bytes() == held
    assert csp.empty_cache() == held
    assert native.scratch_bytes() == csp.empty_cache() == 0
    first = step()
    assert native.scratch_bytes() <= held
    assert torch.equal(step(), first)


def test_memory_goes_back_after_a_while(held: int) -> None:
    """Looked after every few seconds, at whatever call: what was used since the last look stays."""
    for _ in range(2):
        time.sleep(5.1)
        step(1)
    assert native.scratch_bytes() <= 2 << 20 < held


def test_a_thread_that_ends_gives_its_memory_back() -> None:
    csp.empty_cache()
    thread = threading.Thread(target=lambda: [step() for _ in range(3)])
    thread.start()
    thread.join()
    end = time.monotonic() + 5  # its helpers end after it
    while native.scratch_bytes() and time.monotonic() < end:
        time.sleep(0.01)
    assert native.scratch_bytes() == 0


def test_threads_call_while_another_gives_back() -> None:
    block, x = csp.DenseBlock(2, 16, 8), torch.randn(8, 16, 16, 16)
    stop = threading.Event()
    failures: list[str] = []

    def gradients(own: csp.DenseBlock) -> list[torch.Tensor]:
        y = own(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), list(own.parameters()))]

    wanted = gradients(copy.deepcopy(block))

    def calls() -> None:
        own = copy.deepcopy(block)
        while not stop.is_set():
            if not all(map(torch.equal, gradients(own), wanted)):
                failures.append("other values")

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    end, given = time.monotonic() + 1.5, 0
    while time.monotonic() < end:
        given += csp.empty_cache()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and given > 0


FORK = """
import os, threading
torch.set_num_threads(1)
block = csp.DenseBlock(1, 8, 8).eval()
x = torch.randn(2, 8, 8, 8)
def call():
    with torch.no_grad():
        return block(x)
wanted = call()
held, done = threading.Event(), threading.Event()
other = threading.Thread(target=lambda: (call(), call(), held.set(), done.wait()))
other.start(), held.wait()
def busy():
    while not done.is_set():
        csp.empty_cache()
racer = threading.Thread(target=busy)
racer.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        native.empty_cache()
        good = native.scratch_bytes() == 0 and torch.equal(call(), wanted) and torch.equal(call(), wanted)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set(), other.join(), racer.join()
assert torch.equal(call(), wanted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_fork() -> None:
    run(FORK)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_WHY_NOT", "not built")
    assert csp.empty_cache() == native.scratch_bytes() == 0
