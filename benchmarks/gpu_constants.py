"""What the planners' constants stand for, measured: rates and latencies of the device.

The constants are in csrc/cuda: machine_of and Work::cost in dense_layer.cu, PRODUCT_NS, STEP_NS and BYTES_A_NS in
dense_block.cu, Device::launch_ns in dense_block.h. They were estimated for an H100.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from gpu_comparisons import Layer
from gpu_timing import Device, Work, interleave
from harness import mm_ceiling

import csp_kernels as csp
from csp_kernels.backends import why_not_cuda
from csp_kernels.kernels import activate, cuda
from csp_kernels.kernels.launch import Geometry

PRODUCT_FLOPS = 2 * 16 * 8 * 16  # of an mma.sync m16n8k16
ROUNDS = 7
Measured = tuple[float, str]  # value, from what


@dataclass(frozen=True)
class Constant:
    """name: as in the sources, or what it is. on_cpu: whether it can be measured without a GPU."""

    name: str
    measure: Callable[[Device], Measured]
    on_cpu: bool = False


# --- kernels that do one thing ---


@triton.jit
def _products(out, repeats, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same product of [M, K] and [K, N] again and again, by one warp: its tensor cores are used through mma.sync.
    With M, N of 64 operands take less time to read from shared memory than to multiply. out: of the operands' type."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = ((m[:, None] * 7 + k[None, :] * 3 + tl.program_id(0)) % 13 * 0.01).to(out.dtype.element_ty)
    b = ((k[:, None] * 5 + n[None, :] * 11) % 17 * 0.01).to(out.dtype.element_ty)
    acc = tl.zeros((M, N), tl.float32)
    for _ in tl.range(repeats):
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out + tl.program_id(0) * M * N + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty))


@triton.jit
def _read_again(x, out, blocks, repeats, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads all of x [blocks * BLOCK] so often, past the level-1 cache, each from another block on."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(blocks * repeats):
        total += tl.load(x + (i + tl.program_id(0) * 37) % blocks * BLOCK + at, cache_modifier=".cg")
    tl.store(out + tl.program_id(0) * BLOCK + at, total)


# --- rates and latencies ---


def median_ms(device: Device, work: Callable[[], object]) -> float:
    return interleave({"": lambda: device.time(Work(lambda: None, lambda _: work()))}, ROUNDS)[""].median


def multiprocessors() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def copy_bandwidth(device: Device) -> Measured:
    return device.copy_bandwidth(), f"bytes a ns, read and written, of a copy of {device.copy_bytes >> 20} MiB"


def matmul(dtype: torch.dtype, tf32: bool = False) -> Callable[[Device], Measured]:
    def measure(device: Device) -> Measured:
        if device.kind == "cpu":
            return mm_ceiling(dtype, 256) / 1e3, "TFLOP/s of torch.mm, 256 x 256, on the CPU"
        size = 8192 if dtype.itemsize == 2 or tf32 else 4096
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(size, size, device=device.kind).to(dtype) for _ in range(2))
        spent = median_ms(device, lambda: torch.mm(a, b))
        torch.set_float32_matmul_precision("highest")
        return 2 * size**3 / spent / 1e9, f"TFLOP/s of torch.mm, {size} x {size}"

    return measure


def product_rate(device: Device, dtype: torch.dtype, precision: str) -> float:
    """FLOPs a ns of products by mma.sync, all multiprocessors."""
    programs, repeats, size = multiprocessors() * 8, 2048, (64, 64, 32)
    out = torch.empty(programs, size[0], size[1], dtype=dtype, device="cuda")
    spent = median_ms(device, lambda: _products[(programs,)](out, repeats, precision, *size, num_warps=1))
    return 2 * size[0] * size[1] * size[2] * repeats * programs / spent / 1e6


def mma(dtype: torch.dtype, precision: str = "ieee") -> Callable[[Device], Measured]:
    def measure(device: Device) -> Measured:
        return product_rate(device, dtype, precision) / 1e3, "TFLOP/s of mma.sync, eight warps a multiprocessor"

    return measure


def products_ns(device: Device) -> Measured:
    rate = product_rate(device, torch.bfloat16, "ieee") / PRODUCT_FLOPS
    return rate, "mma.sync m16n8k16 a ns, of all multiprocessors, eight warps each"


def product_ns(device: Device) -> Measured:
    each = products_ns(device)[0] / multiprocessors()
    return 8 * 9 / each, "ns of nine products of each of eight warps, by machine_of.products_ns"


def l2_rate(device: Device) -> Measured:
    blocks, block, programs, repeats = 2048, 1024, multiprocessors() * 8, 2  # 8 MiB
    x, out = torch.ones(blocks * block, device="cuda"), torch.empty(programs, block, device="cuda")
    spent = median_ms(device, lambda: _read_again[(programs,)](x, out, blocks, repeats, block, num_warps=4))
    rate = 4 * blocks * block * repeats * programs / spent / 1e6 / multiprocessors()
    return rate, "bytes a ns and multiprocessor, all of them reading the same 8 MiB past their level-1 caches"


def bytes_a_product(device: Device) -> Measured:
    share = l2_rate(device)[0]
    return share * 8 * multiprocessors() / products_ns(device)[0], "BYTES_A_NS by the time of a product of eight warps"


def launch_ns(device: Device) -> Measured:
    """Behind work that lets the host run ahead."""
    x, count = torch.zeros(1, device="cuda"), 400

    def chain(length: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(50_000_000)
        start.record()
        for _ in range(length):
            x.add_(1)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    chain(count)
    spent = statistics.median(chain(count) for _ in range(ROUNDS)) - statistics.median(chain(1) for _ in range(ROUNDS))
    return spent / (count - 1) * 1e6, f"ns of one more kernel that does next to nothing, of {count} in a row"


def host_ns(device: Device) -> Measured:
    """What a launch of a Triton kernel costs the host."""
    z, out, geometry = torch.zeros(4, 16, device="cuda"), torch.empty(4, 16, device="cuda"), Geometry(1, 2, 2)
    work = lambda: activate.forward(z, None, out, geometry, activate.RELU)  # noqa: E731
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(400):
        work()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / 400 * 1e9, "ns of the host for a launcher of one Triton kernel (activate.forward), 400 in a row"


def step_ns(device: Device) -> Measured:
    """Of CUDA C++ on a map of one round, by bottlenecks of more and more steps."""
    if why_not_cuda():
        raise RuntimeError(f"STEP_NS: {why_not_cuda()}")
    times = {}
    for width in (128, 512):
        layer = Layer(torch.bfloat16, 2, 7, 7, width, 32)
        with csp.use_backend("native"):
            if not cuda.takes(layer.z, layer.weight, layer.grown, layer.geometry, "ieee"):
                raise RuntimeError(f"STEP_NS: CUDA C++ does not take a bottleneck of {width}")
            times[width] = median_ms(device, layer.forward)
    spent = (times[512] - times[128]) * 1e6 / ((512 - 128) / 32)
    return spent, "ns of 32 more bottleneck channels of conv3x3_forward, 2 images of 7x7; its plan may share them out"


CONSTANTS = [
    Constant("machine_of.bytes_ns", copy_bandwidth, True),
    Constant("matmul bfloat16", matmul(torch.bfloat16)),
    Constant("matmul float32", matmul(torch.float32), True),
    Constant("matmul tf32", matmul(torch.float32, True)),
    Constant("Device::launch_ns", launch_ns),
    Constant("machine_of.products_ns", products_ns),
    Constant("PRODUCT_NS", product_ns),
    Constant("BYTES_A_NS", l2_rate),
    Constant("Work::cost bytes a product", bytes_a_product),
    Constant("STEP_NS", step_ns),
    Constant("mma bfloat16", mma(torch.bfloat16)),
    Constant("mma float16", mma(torch.float16)),
    Constant("mma tf32", mma(torch.float32, "tf32")),
    Constant("host: a Triton launch", host_ns),
    Constant("matmul float16", matmul(torch.float16)),
]
