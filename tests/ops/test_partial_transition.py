"""The partial transition against its naive twin in float64: values, gradients, layouts, dtypes, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, TransitionCase
from torch import Tensor

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
Case = TransitionCase
KINDS = {
    f"{fusion}, {order}, {pool}": Case(fusion=fusion, order=order, pool=pool)
    for fusion in ("csp", "first", "last")
    for order in ("post", "pre")
    for pool in ("avg", None)
}
SHAPES = {
    "no bypass": Case(part=0),
    "one channel bypass": Case(part=1),
    "1x1 maps": Case(pool=None, size=(8, 1, 1)),
    "2x3 maps": Case(size=(8, 2, 3)),
    "one image": Case(size=(1, 7, 5)),
    "5, 12, 17": Case(part=5, dense=12, mid=17, out=5),
    "48": Case(part=48, dense=48, mid=48, out=48, size=(2, 8, 8)),
    "64, 96": Case(part=64, dense=96, mid=96, out=64, size=(2, 16, 16)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_training(kind: str, dtype: torch.dtype) -> None:
    case = replace(KINDS[kind], dtype=dtype)
    cases.compare(case)
    cases.compare(replace(case, kinks=False))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
def test_shapes(shape: str, order: str, fusion: str) -> None:
    for dtype in DTYPES:
        cases.compare(replace(SHAPES[shape], order=order, fusion=fusion, dtype=dtype))


@kinds
@pytest.mark.parametrize("frozen", [(True,), (True, False), (False, True)], ids=["all", "t", "u"])
def test_frozen_norms(kind: str, frozen: tuple[bool, ...]) -> None:
    for dtype in DTYPES:
        cases.compare(replace(KINDS[kind], dtype=dtype, frozen=frozen))


@kinds
def test_inference(kind: str) -> None:
    for dtype in DTYPES:
        cases.check_inference(replace(KINDS[kind], dtype=dtype, frozen=(True,)))
        cases.check_inference(replace(KINDS[kind], dtype=dtype, frozen=(True,), part=0))


@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_large_mean(fusion: str, order: str) -> None:
    cases.compare(Case(fusion=fusion, order=order, mean=1000.0, std=0.01, size=(4, 14, 14)))


def test_one_value_per_channel_with_running_statistics() -> None:
    cases.compare(Case(size=(1, 1, 1), pool=None, frozen=(True,), dtype=torch.float64))
    cases.compare(Case(size=(1, 3, 2), frozen=(False, True), dtype=torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@kinds
def test_layouts(kind: str, layout: str) -> None:
    cases.check_layout(replace(KINDS[kind], dtype=torch.float64), layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("fusion", ["csp", "first", "last"])
def test_part_and_dense_are_slices_of_one_tensor(fusion: str, layout: torch.memory_format) -> None:
    """As in a stage: the bypass is the first channels of its input. Neighbours, here NaN, are never read."""
    case = Case(fusion=fusion, dtype=torch.float64)
    leaves = case.leaves()
    plain = cases.run(case, csp.ops, leaves, [])
    joined = torch.full((3, 42, 7, 5), float("nan"), dtype=torch.float64).contiguous(memory_format=layout)
    joined[:, 3:15], joined[:, 17:41] = leaves["part"], leaves["dense"]
    given = cases.run(case, csp.ops, {**leaves, "part": joined[:, 3:15], "dense": joined[:, 17:41]}, [])
    assert given["y0"].is_contiguous(memory_format=layout)
    for name, value in plain.items():
        torch.testing.assert_close(given[name], value, rtol=1e-11, atol=1e-11)


@kinds
def test_expanded(kind: str) -> None:
    cases.check_expanded(replace(KINDS[kind], dtype=torch.float64))


@kinds
@pytest.mark.parametrize("frozen", [(), (True,), (True, False)], ids=["train", "frozen", "t frozen"])
def test_gradcheck(kind: str, frozen: tuple[bool, ...]) -> None:
    small = {"part": 2, "dense": 3, "mid": 3, "out": 3, "size": (2, 5, 4), "dtype": torch.float64}
    cases.check_gradients(replace(KINDS[kind], **small, frozen=frozen))


def test_gradcheck_without_bypass() -> None:
    small = {"part": 0, "dense": 3, "mid": 3, "out": 2, "size": (2, 4, 4), "dtype": torch.float64}
    for kind in KINDS.values():
        cases.check_gradients(replace(kind, **small))


@kinds
def test_repeats_bitwise(kind: str) -> None:
    for dtype in DTYPES:
        cases.check_repeats(replace(KINDS[kind], dtype=dtype, size=(5, 9, 9)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["post", "pre"])
def test_parameters_in_the_storage_dtype(dtype: torch.dtype, order: str) -> None:
    cases.check_storage_dtype(Case(dtype=dtype, order=order))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_autocast(backend: str, order: str) -> None:
    cases.check_autocast(Case(order=order), backend)


@kinds
@pytest.mark.parametrize("frozen", [(), (True,)], ids=["train", "frozen"])
def test_empty_batch(kind: str, frozen: tuple[bool, ...]) -> None:
    cases.check_empty(replace(KINDS[kind], size=(0, 6, 5), frozen=frozen))


@pytest.mark.parametrize("order", ["post", "pre"])
def test_norms_without_affine_parameters(order: str) -> None:
    case = Case(order=order)
    part, dense, *params = case.leaves().values()
    bare = [None if i % 3 != 2 else p for i, p in enumerate(params)]
    full = [p if i % 3 == 2 else torch.full_like(p, 1.0 - i % 3) for i, p in enumerate(params)]
    y, expected = (csp.ops.partial_transition(part, dense, p, order=order)[0] for p in (bare, full))
    assert torch.equal(y, expected)


def test_one_epsilon_a_norm() -> None:
    cases.compare(Case(options={"eps": [0.5, 1e-3]}))
    cases.compare(Case(options={"eps": 0.1}, order="pre"))


def test_gradient_of_one_input_alone() -> None:
    case = Case(dtype=torch.float64)
    leaves = case.leaves()
    whole = cases.run(case, csp.ops, leaves, [])
    for name in ("part", "dense", "t.conv.weight", "u.norm.bias"):
        leaf = leaves[name].clone().requires_grad_()
        (y,), _ = case(csp.ops, {**leaves, name: leaf}, [])
        (gradient,) = torch.autograd.grad(y, leaf, cases.grads(case, [y])[0])
        torch.testing.assert_close(gradient, whole[f"grad {name}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["post", "pre"])
def test_fusion_last_leaves_the_bypass_alone(order: str) -> None:
    case = Case(fusion="last", order=order, pool=None)
    leaves = case.leaves()
    (y,), _ = case(csp.ops, leaves, [])
    assert torch.equal(y[:, : case.part], leaves["part"])


@pytest.mark.parametrize("order", ["post", "pre"])
def test_equals_the_transition_of_densenet(order: str) -> None:
    """Without a bypass "first" is the plain transition; in order "pre" that of DenseNet."""
    case = Case(fusion="first", part=0, order=order, dtype=torch.float64)
    leaves = case.leaves()
    (y,), _ = case(csp.ops, leaves, [])
    dense, weight, bias, conv = leaves.values()
    F = torch.nn.functional
    if order == "pre":
        a = F.relu(F.batch_norm(dense, None, None, weight, bias, True))
        expected = F.avg_pool2d(F.conv2d(a, conv), 2)
    else:
        expected = F.relu(F.batch_norm(F.conv2d(F.avg_pool2d(dense, 2), conv), None, None, weight, bias, True))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


# --- bad input ---

GOOD = Case()


def arguments(case: Case = GOOD) -> dict[str, Any]:
    part, dense, *params = case.leaves().values()
    return {"part": part, "dense": dense, "params": params}


def with_param(index: int, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    params: list[Any] = arguments()["params"]
    params[index] = change(params[index])
    return {"params": params}


def with_input(name: str, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {name: change(arguments()[name])}


BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "dense": (TypeError, "dense: got NoneType", lambda: {"dense": None}),
    "part": (TypeError, "part: got list", lambda: {"part": [1.0]}),
    "3-D": (ValueError, "dense: got 3 dimensions", lambda: with_input("dense", lambda t: t[0])),
    "integers": (TypeError, "dense: got torch.int32", lambda: with_input("dense", Tensor.int)),
    "empty part": (ValueError, r"part: got shape \[3, 0, 7, 5\]", lambda: with_input("part", lambda t: t[:, :0])),
    "batch": (
        ValueError,
        r"part: got shape .* expected \[3, channels, 7, 5\]",
        lambda: with_input("part", lambda t: t[:1]),
    ),
    "width": (ValueError, "part: got shape .* as dense has", lambda: with_input("part", lambda t: t[..., :4])),
    "dtypes": (TypeError, "part: got torch.float64, expected torch.float32", lambda: with_input("part", Tensor.double)),
    "devices": (ValueError, "part: got .* meta", lambda: with_input("part", lambda t: t.to("meta"))),
    "dense channels": (
        ValueError,
        "dense: got 23 channels .* expected 24, the input channels of params: t.conv.weight",
        lambda: with_input("dense", lambda t: t[:, 1:]),
    ),
    "part channels": (
        ValueError,
        "part: got 11 channels .* expected 12 channels: params: u.conv.weight takes 29, 17 of them from t",
        lambda: with_input("part", lambda t: t[:, 1:]),
    ),
    "no part": (ValueError, "part: got no bypass, expected 12 channels", lambda: {"part": None}),
    "first": (
        ValueError,
        r"part and dense: got 11 \+ 24 = 35 channels, expected 36",
        lambda: {
            **arguments(replace(GOOD, fusion="first")),
            **with_input("part", lambda t: t[:, 1:]),
            "fusion": "first",
        },
    ),
    "too small": (
        ValueError,
        "dense: got size 1x5, expected at least 2x2 to pool",
        lambda: {name: arguments()[name][:, :, :1] for name in ("part", "dense")},
    ),
    "one value": (
        ValueError,
        "dense: got one value per channel .* use a larger batch or image",
        lambda: {"pool": None, **{name: arguments()[name][:1, :, :1, :1] for name in ("part", "dense")}},
    ),
    "one value after pooling": (
        ValueError,
        r"dense: got one value per channel after pooling \[1, 24, 3, 2\]",
        lambda: {name: arguments()[name][:1, :, :3, :2] for name in ("part", "dense")},
    ),
    "params": (ValueError, "params: got 5, expected 6 for fusion 'csp'", lambda: {"params": arguments()["params"][:5]}),
    "params of first": (ValueError, "params: got 6, expected 3 .* u.norm.weight", lambda: {"fusion": "first"}),
    "params of last": (ValueError, "params: got 6, expected 3 .* t.norm.weight", lambda: {"fusion": "last"}),
    "t.conv": (TypeError, "params: t.conv.weight: got NoneType", lambda: with_param(2, lambda t: None)),
    "t.norm": (ValueError, r"t.norm.weight: got shape \[16\], expected \[17\]", lambda: with_param(0, lambda t: t[1:])),
    "norm of the other order": (
        ValueError,
        r"t.norm.weight: got shape \[17\], expected \[24\]",
        lambda: {"order": "pre"},
    ),
    "u.norm": (TypeError, "u.norm.bias: got torch.float64", lambda: with_param(4, Tensor.double)),
    "u.conv": (ValueError, "u.conv.weight: got .* meta", lambda: with_param(5, lambda t: t.to("meta"))),
    "fusion": (ValueError, "fusion: got 'none', expected one of csp, first, last", lambda: {"fusion": "none"}),
    "order": (ValueError, "order: got 'mid', expected one of post, pre", lambda: {"order": "mid"}),
    "pool": (ValueError, "pool: got 'max', expected one of avg, None", lambda: {"pool": "max"}),
    "frozen": (ValueError, "frozen: got 1 flags, expected 2", lambda: {"frozen": [True]}),
    "frozen bool": (TypeError, "frozen: got True, expected 2 flags", lambda: {"frozen": True}),
    "eps": (ValueError, "eps: got 3 numbers", lambda: {"eps": [1e-5] * 3}),
    "eps sign": (ValueError, "eps: got 0", lambda: {"eps": [1e-5, 0.0]}),
    "running": (ValueError, "running: got 0 tensors, expected 2", lambda: {"frozen": [True, False]}),
    "running shape": (
        ValueError,
        "running: u.norm var: got shape",
        lambda: {"frozen": [False, True], "running": [torch.zeros(20), torch.zeros(19)]},
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(name: str, backend: str) -> None:
    kind, message, change = BAD[name]
    csp.use_backend(backend)
    with pytest.raises(kind, match=message):
        csp.ops.partial_transition(**{**arguments(), **change()})


def test_native_refuses_other_devices() -> None:
    part, dense, *params = (t.to("meta") for t in GOOD.leaves().values())
    with pytest.raises(RuntimeError, match="backend 'native': got tensors on 'meta'"):
        csp.ops.partial_transition(part, dense, params)
