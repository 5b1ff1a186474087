"""CSP_KERNELS_ISA: every compiled instruction set that runs here agrees with the reference; others are errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from csp_kernels import native

CHECK = """
import torch, csp_kernels as csp
from csp_kernels.stage.build import Builder, conv_norm
torch.manual_seed(0)
build = Builder(20)
y = conv_norm(build, [build.read(0)], 19, 3, "silu")
z = build.sum([conv_norm(build, [y, build.read(0)], 20), build.read(0)], "relu")
build.write([build.read(z), y])
build.write([build.read(z, start=3)], pool=True)
graph = build.graph()
print(torch.ops.csp_kernels.cpu_isa())
for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
    block = csp.DenseBlock(3, 20, 12).to(dtype)
    twin = csp.reference.DenseBlock(3, 20, 12).double()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 20, 9, 7).to(dtype)
    y, want = block(x), twin(x.double())
    error = ((y.double() - want).norm() / want.norm()).item()
    assert error < bound, (dtype, error)
    y.double().square().mean().backward()
    want.square().mean().backward()
    for p, q in zip(block.parameters(), twin.parameters()):
        error = ((p.grad.double() - q.grad).norm() / q.grad.norm()).item()
        assert error < 10 * bound, (dtype, error)
    stage = csp.Stage(graph).to(dtype if dtype == torch.float64 else torch.float32)
    items = csp.check(stage, x).items
    assert all(item.agrees or item.error < 10 * bound for item in items), str(items)
    last = csp.DenseBlock(3, 20, 12).to(dtype)
    last.load_state_dict(block.state_dict())
    last.to(memory_format=torch.channels_last)(x).double().square().mean().backward()
    assert all(map(torch.equal, (p.grad for p in last.parameters()), (p.grad for p in block.parameters())))
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CSP_KERNELS_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, "-c", CHECK], env=env, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4", "v4bf16", "v4amx"])
def test_instruction_set(isa: str) -> None:
    done = run(isa)
    if f"CSP_KERNELS_ISA: got {isa}, expected" in done.stderr and (isa not in native.isas() or isa != "baseline"):
        pytest.skip(f"{isa} is not compiled in or does not run on this machine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == isa


def test_unknown_instruction_set() -> None:
    done = run("v5")
    assert done.returncode != 0
    assert "CSP_KERNELS_ISA: got v5, expected an instruction set that is compiled in" in done.stderr
