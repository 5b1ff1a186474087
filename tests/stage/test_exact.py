"""Products of small whole numbers are exact in every number format and order: one wrong pixel, channel or tap shows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import csp_kernels as csp
from csp_kernels import native
from csp_kernels.stage.build import Builder

# batch, height, width: one pixel, odd ones, several strips of rows, several images in one, more than one task
SIZES = [(1, 1, 1), (2, 1, 9), (3, 9, 1), (2, 7, 7), (5, 3, 5), (1, 40, 41), (2, 33, 18), (2, 9, 58), (1, 3, 530)]
CHANNELS = [(3, 20), (5, 3), (16, 16), (33, 17), (32, 64), (70, 96)]
WIDE = (200, 130)  # of few pixels: tasks share channels
GROUPED = [(160, 160, 20), (96, 192, 12), (132, 66, 33), (256, 128, 8)]  # tasks share groups, but in the last
NARROW = [(40, 40, 40), (36, 36, 18), (132, 132, 33), (72, 72, 9)]  # 1, 2, 4 and 8 channels
CONVS = {"3x3": {}, "3x3 with stride 2": {"stride": 2}, "1x1": {}, "1x1 with stride 2": {"stride": 2}}


def whole(*shape: int) -> Tensor:
    """Small whole numbers, many of them zero, so that no sum is rounded."""
    return torch.randint(-2, 3, shape).double()


def bounds(dtype: torch.dtype, precision: str, conv: str) -> dict[str, float]:
    """Winograd's larger tiles, which 16 bits and "high" take where they have no form of their own, have thirds."""
    exact = (dtype, precision) == (torch.float32, "highest") or conv != "3x3" or native.isa() == "v4amx"
    return {"rtol": 0, "atol": 0} if exact else {"rtol": 2**-7, "atol": 0.05}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "dtype, precision", [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest")], ids=str
)
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_whole_numbers(size: tuple[int, int, int], conv: str, dtype: torch.dtype, precision: str) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(precision)
    kernel, stride = int(conv[0]), CONVS[conv].get("stride", 1)
    few = size[0] * size[1] * size[2] < 100
    for channels, out in [*CHANNELS, WIDE] if few else CHANNELS:
        build = Builder(channels)
        build.write([build.read(build.conv([build.read(0)], out, kernel, **CONVS[conv]))])

        def exact(x: Tensor, weight: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, weight, padding=kernel // 2, stride=stride)

        limits = bounds(dtype, precision, conv)
        check(csp.Stage(build.graph()), exact, size, channels, dtype, limits, f"{channels} -> {out} channels")


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", ["3x3", "3x3 with stride 2"])
@pytest.mark.parametrize("twice", [False, True], ids=["", "read twice"])
@pytest.mark.parametrize("size", [(2, 7, 7), (1, 40, 41), (3, 1, 1), (1, 2, 3), (1, 5, 530)], ids=str)
def test_groups(size: tuple[int, int, int], twice: bool, conv: str, dtype: torch.dtype) -> None:
    """twice: the first groups read the channels that the last ones read, whose gradient is that of both."""
    torch.manual_seed(0)
    stride = CONVS[conv].get("stride", 1)
    for channels, out, groups in GROUPED + NARROW:
        build = Builder(channels)
        read = [build.read(0)] * (1 + twice)
        many = groups * (1 + twice)
        build.write([build.read(build.conv(read, out * (1 + twice), 3, stride=stride, groups=many))])

        def exact(x: Tensor, weight: Tensor, many: int = many) -> Tensor:
            given = torch.cat((x, x), 1) if twice else x
            return torch.nn.functional.conv2d(given, weight, padding=1, stride=stride, groups=many)

        limits = bounds(dtype, "highest", conv)
        check(csp.Stage(build.graph()), exact, size, channels, dtype, limits, f"{channels} -> {out}, {groups} groups")


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("size", [(2, 7, 7), (1, 40, 41), (3, 9, 58), (3, 1, 1), (1, 5, 530)], ids=str)
def test_statistics(size: tuple[int, int, int], conv: str, dtype: torch.dtype) -> None:
    """A norm behind a convolution sees all pixels once: running mean and variance of several strips of rows."""
    torch.manual_seed(0)
    (n, h, w), kernel, stride = size, int(conv[0]), CONVS[conv].get("stride", 1)
    dense = [(channels, out, 1) for channels, out in CHANNELS]
    for channels, out, groups in dense + NARROW if kernel == 3 else dense:
        build = Builder(channels)
        value = build.conv([build.read(0)], out, kernel, groups=groups, **CONVS[conv])
        build.write([build.read(value, build.norm(out))])
        stage = csp.Stage(build.graph(), momentum=1.0)
        weight = next(p for p in stage.parameters() if p.dim() == 4)
        weight.data = torch.randint(-1, 2, weight.shape).to(dtype)  # outputs are below 256: whole in bfloat16, too
        x = whole(n, channels, h, w)
        stage(x.to(dtype))
        y = torch.nn.functional.conv2d(x, weight.double(), padding=kernel // 2, stride=stride, groups=groups)
        norm = next(m for m in stage.modules() if isinstance(m, torch.nn.BatchNorm2d))
        limits = bounds(dtype, "highest", conv)
        limits = {"rtol": limits["rtol"] or 1e-5, "atol": limits["atol"] or 3e-6}
        for found, values in (norm.running_mean, y.mean((0, 2, 3))), (norm.running_var, y.var((0, 2, 3))):
            torch.testing.assert_close(found, values.float(), **limits)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", [(2, 7, 7), (1, 40, 41)], ids=str)
@pytest.mark.parametrize("conv", ["3x3", "3x3 with stride 2"])
def test_folded_norms_of_groups(conv: str, size: tuple[int, int, int]) -> None:
    """In inference the norm behind groups of a 3x3 is in their weights (the channels of a group differ in scale), the
    activation and a shortcut behind it are in what follows the product."""
    torch.manual_seed(0)
    n, h, w = size
    stride = CONVS[conv].get("stride", 1)
    shortcuts = [False] if stride > 1 else [False, True]
    for (channels, out, groups), shortcut in itertools.product(GROUPED + NARROW, shortcuts):
        if shortcut and channels != out:
            continue
        build = Builder(channels)
        value = build.conv([build.read(0)], out, 3, stride=stride, groups=groups)
        read = build.read(value, build.norm(out), "silu")
        build.write([build.read(build.sum([read, build.read(0)])) if shortcut else read])
        stage = csp.Stage(build.graph()).eval()
        norm = next(m for m in stage.modules() if isinstance(m, torch.nn.BatchNorm2d))
        with torch.no_grad():
            norm.running_mean.copy_(torch.randn(out))
            norm.running_var.copy_(torch.rand(out) + 0.5)
            norm.weight.copy_(torch.rand(out) + 0.5)
            norm.bias.copy_(torch.randn(out))
            x = whole(n, channels, h, w)
            found = [stage(x.float()) for _ in range(3)]
            weight = next(p for p in stage.parameters() if p.dim() == 4).double()
            y = torch.nn.functional.conv2d(x, weight, padding=1, stride=stride, groups=groups)
            wanted = torch.nn.functional.silu(copy.deepcopy(norm).double()(y))
            wanted = (wanted + x if shortcut else wanted).float()
        for call, result in enumerate(found, 1):
            label = f"call {call}, {groups} groups, shortcut {shortcut}"
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, label=label: f"{label}: {m}")


def check(
    stage: csp.Stage,
    exact: Callable[[Tensor, Tensor], Tensor],
    size: tuple[int, int, int],
    channels: int,
    dtype: torch.dtype,
    limits: dict[str, float],
    what: str,
) -> None:
    """A stage of one convolution against exact(x, weight) in float64: output and both gradients, and inference, whose
    second call packs weights for the third."""
    (weight,) = stage.parameters()
    weight.data.copy_(whole(*weight.shape))
    n, h, w = size
    x = whole(n, channels, h, w).requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    wanted = exact(x, exact_weight)
    grad = whole(*wanted.shape)
    wanted.backward(grad)
    own = x.detach().to(dtype).requires_grad_()
    y = stage(own)
    y.backward(grad.to(dtype))
    assert x.grad is not None and exact_weight.grad is not None and weight.grad is not None and own.grad is not None
    with torch.no_grad():
        inferred = [stage(own) for _ in range(3)]
    pairs = {
        "output": (y, wanted),
        **{f"output of call {i} of inference": (found, wanted) for i, found in enumerate(inferred, 1)},
        "gradient of x": (own.grad, x.grad),
        "gradient of the weight": (weight.grad, exact_weight.grad),
    }
    for name, (found, want) in pairs.items():
        label = f"{name}, {what}"
        torch.testing.assert_close(
            found, want.detach().to(found.dtype), **limits, msg=lambda m, label=label: f"{label}: {m}"
        )
