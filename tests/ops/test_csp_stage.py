"""The cross stage partial dense stage against its naive twin in float64, and the paper's claim on its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, LAYOUTS, StageCase
from torch import Tensor

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
Case = StageCase
LAYERS = ["pre", "post", "two_way"]
FUSIONS = ["csp", "first", "last"]
KINDS = {
    f"{layer}, {fusion}, {pool}": Case(layer=layer, fusion=fusion, pool=pool)
    for layer in LAYERS
    for fusion in FUSIONS
    for pool in ("avg", None)
}
SHAPES = {
    "no bypass": Case(part=0),
    "one channel bypass": Case(part=1),
    "1x1 maps": Case(pool=None, size=(8, 1, 1)),
    "one image": Case(size=(1, 7, 5)),
    "5, 17": Case(channels=17, part=5, growth=6, width=10, mid=5, out=12),
    "48": Case(channels=48, part=12, growth=48, width=48, layers=3, mid=48, out=17, size=(2, 8, 8)),
    "one layer": Case(layers=1),
    "32": Case(channels=64, part=32, growth=32, width=64, mid=96, out=64, size=(2, 16, 16)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_training(kind: str, dtype: torch.dtype) -> None:
    case = replace(KINDS[kind], dtype=dtype)
    cases.compare(case)
    cases.compare(replace(case, kinks=False))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_shapes(shape: str, layer: str) -> None:
    for dtype in DTYPES:
        cases.compare(replace(SHAPES[shape], layer=layer, dtype=dtype))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fusion", ["csp", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recompute(layer: str, fusion: str, dtype: torch.dtype) -> None:
    options = {"recompute": "bottleneck"}
    cases.compare(Case(layer=layer, fusion=fusion, dtype=dtype, options=options))
    cases.compare(Case(layer=layer, fusion=fusion, dtype=dtype, options=options, frozen=(True, False)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "frozen",
    [(True,), (True, False, False), (False, True), (True, True, True, True, False, False)],
    ids=["all", "third", "second", "layers"],
)
def test_frozen_norms(layer: str, fusion: str, frozen: tuple[bool, ...]) -> None:
    for dtype in DTYPES:
        cases.compare(Case(layer=layer, fusion=fusion, dtype=dtype, frozen=frozen))


@kinds
def test_inference(kind: str) -> None:
    for dtype in DTYPES:
        cases.check_inference(replace(KINDS[kind], dtype=dtype, frozen=(True,)))
        cases.check_inference(replace(KINDS[kind], dtype=dtype, frozen=(True,), part=0))


@pytest.mark.parametrize("layer", LAYERS)
def test_large_mean(layer: str) -> None:
    cases.compare(Case(layer=layer, mean=1000.0, std=0.01, size=(4, 14, 14)))


def test_one_value_per_channel_with_running_statistics() -> None:
    for layer in LAYERS:
        cases.compare(Case(layer=layer, size=(1, 1, 1), pool=None, frozen=(True,), dtype=torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_layouts(layer: str, fusion: str, layout: str) -> None:
    cases.check_layout(Case(layer=layer, fusion=fusion, dtype=torch.float64), layout)


@kinds
def test_expanded(kind: str) -> None:
    cases.check_expanded(replace(KINDS[kind], dtype=torch.float64, size=(3, 6, 5)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mode", ["train", "frozen", "mixed", "recompute"])
def test_gradcheck(layer: str, fusion: str, mode: str) -> None:
    frozen = {"frozen": (True,), "mixed": (True, False, False)}.get(mode, ())
    small = {"channels": 4, "part": 2, "growth": 2, "width": 3, "mid": 3, "out": 3, "size": (2, 4, 3)}
    options = {"recompute": "bottleneck"} if mode == "recompute" else {}
    layers = 1 if layer == "two_way" else 2
    kind = {"layer": layer, "fusion": fusion, "frozen": frozen, "layers": layers, "options": options}
    cases.check_gradients(Case(dtype=torch.float64, **small, **kind))


@kinds
def test_repeats_bitwise(kind: str) -> None:
    for dtype in DTYPES:
        cases.check_repeats(replace(KINDS[kind], dtype=dtype, size=(5, 9, 9)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_the_storage_dtype(layer: str, dtype: torch.dtype) -> None:
    cases.check_storage_dtype(Case(layer=layer, dtype=dtype))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer: str, backend: str) -> None:
    cases.check_autocast(Case(layer=layer), backend)


@kinds
@pytest.mark.parametrize("frozen", [(), (True,)], ids=["train", "frozen"])
def test_empty_batch(kind: str, frozen: tuple[bool, ...]) -> None:
    cases.check_empty(replace(KINDS[kind], size=(0, 6, 5), frozen=frozen))


@pytest.mark.parametrize("layer", LAYERS)
def test_norms_without_affine_parameters(layer: str) -> None:
    case = Case(layer=layer)
    x, *params = case.leaves().values()
    bare, full, bias = [], [], False
    for p in params:
        vector = p.dim() == 1
        bare.append(None if vector else p)
        full.append(torch.full_like(p, 0.0 if bias else 1.0) if vector else p)
        bias = vector and not bias
    y, expected = (csp.ops.csp_stage(x, p, part_channels=case.part, layer=layer)[0] for p in (bare, full))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_epsilon_a_norm(layer: str) -> None:
    case = Case(layer=layer)
    cases.compare(replace(case, options={"eps": [0.5 / (i + 1) for i in range(len(case.norms))]}))


# --- the parts, and what they have to do with each other (the paper's equations of the backward pass) ---


def split(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Bypass, dense part, parameters of the dense layers and of the transition."""
    x, *params = leaves.values()
    last = sum(name.startswith(("t.", "u.")) for name in leaves)
    return x[:, : case.part], x[:, case.part :], params[:-last], params[-last:]


def dense_block(layer: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return csp.ops.dense_block if layer == "pre" else getattr(csp.ops, f"{layer}_dense_block")


def order(layer: str) -> str:
    return "pre" if layer == "pre" else "post"


@kinds
def test_equals_block_and_transition(kind: str) -> None:
    case = replace(KINDS[kind], dtype=torch.float64)
    leaves = case.leaves()
    part, rest, layers, last = split(case, leaves)
    dense, first = dense_block(case.layer)(rest, layers)
    choices = {"fusion": case.fusion, "pool": case.pool, "order": order(case.layer)}
    expected, second = csp.ops.partial_transition(part, dense, last, **choices)
    (y,), stats = case(csp.ops, leaves, [])
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    separate = torch.cat((first, second), 1)
    needed = separate[1] != 0  # a block alone has no norm behind its last layer
    torch.testing.assert_close(stats[:, needed], separate[:, needed], rtol=1e-11, atol=1e-11)


def perturbed(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another bypass."""
    x = leaves["x"].clone()
    x[:, : case.part] = torch.randn_like(x[:, : case.part])
    return {**leaves, "x": x}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_path_does_not_see_the_bypass(layer: str, dtype: torch.dtype) -> None:
    """Fusion "last": outputs and all gradients of the dense side are the same bits for any x'."""
    case = Case(layer=layer, fusion="last", dtype=dtype)
    leaves = case.leaves()
    one, two = (cases.run(case, csp.ops, values, []) for values in (leaves, perturbed(case, leaves)))
    assert not torch.equal(one["y0"][:, : case.part], two["y0"][:, : case.part])
    for results in (one, two):
        results["y0"], results["grad x"] = results["y0"][:, case.part :], results["grad x"][:, case.part :]
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("fusion", ["csp", "first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_gradients_do_not_see_the_bypass(fusion: str, dtype: torch.dtype) -> None:
    """Order "pre": u's norm and ReLU work channel by channel, so not even its mask carries x' to the dense layers."""
    case = Case(fusion=fusion, dtype=dtype)
    leaves = case.leaves()
    one, two = (cases.run(case, csp.ops, values, []) for values in (leaves, perturbed(case, leaves)))
    assert not torch.equal(one["y0"], two["y0"]) and not torch.equal(
        one["grad u.conv.weight"], two["grad u.conv.weight"]
    )
    for name, value in one.items():
        if name.startswith(("grad 0.", "grad 1.", "grad t.")):
            assert torch.equal(value, two[name]), name
    assert torch.equal(one["grad x"][:, case.part :], two["grad x"][:, case.part :])
    own = one["grad u.conv.weight"][:, case.part :], two["grad u.conv.weight"][:, case.part :]
    assert torch.equal(*own)


@pytest.mark.parametrize("layer", ["post", "two_way"])
@pytest.mark.parametrize("fusion", ["csp", "first"])
def test_dense_gradients_do_not_see_the_bypass_but_through_the_mask(layer: str, fusion: str) -> None:
    """Order "post" with u frozen and its ReLU open: what is left, the product, keeps the two sides apart."""
    case = Case(layer=layer, fusion=fusion, dtype=torch.float64)
    case = replace(case, frozen=(*[False] * (len(case.norms) - 1), True))
    leaves, running = case.leaves(), case.running()
    leaves["u.norm.bias"].fill_(100.0)
    one, two = (cases.run(case, csp.ops, values, running) for values in (leaves, perturbed(case, leaves)))
    assert not torch.equal(one["y0"], two["y0"])
    for name, value in one.items():
        if name.startswith(("grad 0.", "grad 1.", "grad t.")):
            assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("layer", LAYERS)
def test_no_gradient_crosses_between_the_sides(layer: str) -> None:
    """Fusion "last": the dense outputs have none for x', the bypass has none for x'' and the parameters."""
    case = Case(layer=layer, fusion="last", dtype=torch.float64)
    leaves = {name: t.requires_grad_() for name, t in case.leaves().items()}
    (y,), _ = case(csp.ops, leaves, [])
    mine, theirs = y[:, : case.part].square().sum(), y[:, case.part :].square().sum()
    (x, *params) = torch.autograd.grad(mine, list(leaves.values()), retain_graph=True)
    assert x[:, : case.part].any() and not x[:, case.part :].any() and not any(p.any() for p in params)
    (x, *params) = torch.autograd.grad(theirs, list(leaves.values()))
    assert not x[:, : case.part].any() and x[:, case.part :].any() and all(p.any() for p in params)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("pool", ["avg", None])
def test_gradient_of_u_needs_the_bypass_and_x_t_only(layer: str, pool: str | None) -> None:
    """w_U' = f_U(w_U, {g0', g_T}): u alone on x' and x_T gives it."""
    case = Case(layer=layer, pool=pool, dtype=torch.float64)
    leaves = case.leaves()
    whole = cases.run(case, csp.ops, leaves, [])
    part, rest, layers, last = split(case, leaves)
    dense, _ = dense_block(layer)(rest, layers)
    x_t, _ = csp.ops.partial_transition(None, dense, last[:3], fusion="last", pool=None, order=order(layer))
    tensors = [t.detach().requires_grad_() for t in last[3:]]
    y, _ = csp.ops.partial_transition(part, x_t.detach(), tensors, fusion="first", pool=pool, order=order(layer))
    gradients = torch.autograd.grad(y, tensors, cases.grads(case, [y]))
    for name, value in zip(("norm.weight", "norm.bias", "conv.weight"), gradients, strict=True):
        torch.testing.assert_close(value, whole[f"grad u.{name}"], rtol=1e-9, atol=1e-11)


# --- bad input ---


def arguments(layer: str = "pre", fusion: str = "csp") -> dict[str, Any]:
    case = Case(layer=layer, fusion=fusion)
    x, *params = case.leaves().values()
    return {"x": x, "params": params, "part_channels": case.part, "layer": layer, "fusion": fusion}


def with_param(index: int, change: Callable[[Tensor], Any], layer: str = "pre") -> dict[str, Any]:
    given = arguments(layer)
    given["params"][index] = change(given["params"][index])
    return given


def with_x(change: Callable[[Tensor], Any], layer: str = "pre") -> dict[str, Any]:
    given = arguments(layer)
    return {**given, "x": change(given["x"])}


BAD: dict[str, tuple[type[Exception], str, Callable[[], dict[str, Any]]]] = {
    "not a tensor": (TypeError, "x: got list", lambda: {"x": [1.0]}),
    "3-D": (ValueError, "x: got 3 dimensions", lambda: with_x(lambda t: t[0])),
    "integers": (TypeError, "x: got torch.int64", lambda: with_x(Tensor.long)),
    "channels, pre": (
        ValueError,
        "x: got 23 channels .*, 11 of them for the dense layers, expected 12, the size of params: layer 0 norm1.weight",
        lambda: with_x(lambda t: t[:, 1:]),
    ),
    "channels, post": (ValueError, "11 of them .* layer 0 conv1.weight", lambda: with_x(lambda t: t[:, 1:], "post")),
    "channels, two_way": (ValueError, "11 of them .* branch1.conv1", lambda: with_x(lambda t: t[:, 1:], "two_way")),
    "part_channels": (ValueError, "part_channels: got 24, expected 0 to 23", lambda: {"part_channels": 24}),
    "part_channels sign": (ValueError, "part_channels: got -1", lambda: {"part_channels": -1}),
    "part_channels float": (TypeError, "part_channels: got float, expected an int", lambda: {"part_channels": 12.0}),
    "too small": (ValueError, "x: got size 1x5, expected at least 2x2 to pool", lambda: with_x(lambda t: t[:, :, :1])),
    "one value": (
        ValueError,
        "x: got one value per channel",
        lambda: {**with_x(lambda t: t[:1, :, :1, :1]), "pool": None},
    ),
    "one value after pooling": (
        ValueError,
        "x: got one value per channel after pooling",
        lambda: with_x(lambda t: t[:1, :, :2, :3], "post"),
    ),
    "x float64": (TypeError, "got torch.float32, expected torch.float64", lambda: with_x(Tensor.double)),
    "x meta": (ValueError, "layer 0 norm1.weight: got .* cpu, expected meta", lambda: with_x(lambda t: t.to("meta"))),
    "layer": (ValueError, "layer: got 'mid', expected one of pre, post, two_way", lambda: {"layer": "mid"}),
    "fusion": (ValueError, "fusion: got 'none', expected one of csp, first, last", lambda: {"fusion": "none"}),
    "pool": (ValueError, "pool: got 'max', expected one of avg, None", lambda: {"pool": "max"}),
    "recompute": (ValueError, "recompute: got 'all', expected one of none, bottleneck", lambda: {"recompute": "all"}),
    "no layer": (
        ValueError,
        "params: got 6, expected 6 a layer, at least one layer, and 6 for the transition: .* u.conv.weight",
        lambda: {"params": arguments()["params"][-6:]},
    ),
    "part of a layer": (ValueError, "params: got 17", lambda: {"params": arguments()["params"][1:]}),
    "two_way count": (ValueError, "params: got 18, expected 15 a layer", lambda: {"layer": "two_way"}),
    "dense weight": (TypeError, "layer 1 conv2.weight: got NoneType", lambda: with_param(11, lambda t: None)),
    "first 3x3": (ValueError, "layer 0 conv2.weight: got shape", lambda: with_param(5, lambda t: t[0])),
    "dense norm": (ValueError, "layer 1 norm2.bias: got shape", lambda: with_param(10, lambda t: t[1:])),
    "post weight": (ValueError, "layer 1 conv1.weight: got shape", lambda: with_param(6, lambda t: t[1:], "post")),
    "post norm": (TypeError, "layer 0 norm1.weight: got torch.float64", lambda: with_param(1, Tensor.double, "post")),
    "branch2": (
        ValueError,
        "layer 0 branch2.conv1.weight: got shape .* expected .20, 12, 1, 1.",
        lambda: with_param(6, lambda t: t[1:], "two_way"),
    ),
    "branch2 conv3": (
        ValueError,
        "layer 1 branch2.conv3.weight: got shape",
        lambda: with_param(27, lambda t: t[1:], "two_way"),
    ),
    "t": (
        ValueError,
        r"t.conv.weight: got shape \[17, 35, 1, 1\], expected",
        lambda: with_param(14, lambda t: t[:, 1:]),
    ),
    "u": (ValueError, "u.conv.weight: got .* meta", lambda: with_param(17, lambda t: t.to("meta"))),
    "frozen": (ValueError, "frozen: got 5 flags, expected 6", lambda: {"frozen": [True] * 5}),
    "running": (ValueError, "running: got 0 tensors, expected 12", lambda: {"frozen": [True] * 6}),
    "running shape": (
        ValueError,
        "running: u.norm mean: got shape",
        lambda: {"frozen": [False] * 5 + [True], "running": [torch.zeros(3), torch.zeros(29)]},
    ),
    "running shape, two_way": (
        ValueError,
        "running: layer 1 branch2.norm3 var: got shape",
        lambda: {
            **arguments("two_way"),
            "frozen": [i == 9 for i in range(12)],
            "running": [torch.zeros(6), torch.zeros(5)],
        },
    ),
    "eps count": (ValueError, "eps: got 3 numbers, expected one or 6", lambda: {"eps": [1e-5] * 3}),
    "eps": (ValueError, "eps: got -1", lambda: {"eps": -1.0}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(name: str, backend: str) -> None:
    kind, message, change = BAD[name]
    csp.use_backend(backend)
    with pytest.raises(kind, match=message):
        csp.ops.csp_stage(**{**arguments(), **change()})


def test_native_refuses_other_devices() -> None:
    x, *params = (t.to("meta") for t in Case().leaves().values())
    with pytest.raises(RuntimeError, match="backend 'native': got tensors on 'meta'"):
        csp.ops.csp_stage(x, params, part_channels=12)
