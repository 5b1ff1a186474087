"""nvcc builds the widest kernels without spills and with the instructions they are written for. All of them, slower:
python tests/cuda/resources.py"""

from __future__ import annotations

from pathlib import Path

import cubins
import pytest

pytestmark = pytest.mark.verify  # minutes of nvcc

WIDEST = """
#include "device/conv3x3_dgrad.cuh"
#include "device/conv3x3_forward.cuh"
#include "device/conv3x3_wgrad.cuh"
namespace csp::cuda {
template __global__ void conv3x3_forward_kernel<Half, Conv3x3Tile<4, 2, 2, 1, 2, 4, 32>>(const ForwardArguments);
template __global__ void conv3x3_dgrad_kernel<BFloat16, Conv3x3Tile<4, 2, 1, 4, 1, 4, 32>>(const DgradArguments);
template __global__ void conv3x3_wgrad_kernel<Half, WgradTile<4>>(const WgradArguments);
}
"""
FLOAT32 = """
#include "device/float32_dgrad.cuh"
#include "device/float32_forward.cuh"
#include "device/float32_wgrad.cuh"
namespace csp::cuda::float32 {
template __global__ void forward_float32_kernel<Ieee, Tile<4, 2, 2, 1, 4>>(const ForwardArguments);
template __global__ void forward_float32_kernel<Tf32, Tile<4, 2, 2, 1, 4>>(const ForwardArguments);
template __global__ void dgrad_float32_kernel<Ieee, Tile<4, 2, 2, 2, 4>>(const DgradArguments);
template __global__ void dgrad_float32_kernel<Tf32, Tile<4, 2, 2, 2, 4>>(const DgradArguments);
template __global__ void wgrad_float32_kernel<Ieee, WgradTile<2, 2>>(const WgradArguments);
template __global__ void wgrad_float32_kernel<Tf32, WgradTile<2, 2>>(const WgradArguments);
}
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spills(const float* a, const float* b, float* c, int n) {
  float sums[10][10] = {};
  for (int k = 0; k < n; k++)
#pragma unroll
    for (int i = 0; i < 100; i++) sums[i / 10][i % 10] += a[k * 10 + i / 10] * b[k * 10 + i % 10];
#pragma unroll
  for (int i = 0; i < 100; i++) c[i * 1024 + threadIdx.x] = sums[i / 10][i % 10];
}
"""


@pytest.fixture
def compiler() -> str:
    found = cubins.nvcc()
    if found is None:
        pytest.skip("nvcc is missing: the kernels were run on the host only, not built for a GPU")
    return found


@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
@pytest.mark.parametrize("kernels, count", [(WIDEST, 3), (FLOAT32, 6)], ids=["16-bit", "float32"])
def test_widest_kernels(compiler: str, tmp_path: Path, architecture: str, kernels: str, count: int) -> None:
    source, cubin = tmp_path / "widest.cu", tmp_path / "widest.cubin"
    source.write_text(kernels)
    built = cubins.build(compiler, source, architecture, cubin)
    assert len(built) == count
    assert all(kernel.spilled_bytes == 0 and 128 < kernel.registers <= 255 for kernel in built)
    tool = cubins.disassembler()
    assert tool is not None, "cuobjdump is neither in the toolkit nor beside triton"
    assert cubins.complaints(cubin, tool) == []


def test_spills_are_errors(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLING)
    with pytest.raises(RuntimeError, match="spill"):
        cubins.build(compiler, source, "90", tmp_path / "spills.cubin")
