"""Gradients of norms whose input lies at 1000 with a standard deviation of 0.01: float32 cannot hold the mean.

Every operator in float32 against its twin in float64, with an absolute bound: the naive float32 twin is far worse.
Each 1x1 passes single channels through, so that what it gives is exact and the norm behind it meets the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from cases import BlockCase, ConcatConvCase, StageCase, TransitionCase
from torch import Tensor

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
BOUND = 2e-3
LARGE: dict[str, Any] = {"mean": 1000.0, "std": 0.01, "size": (2, 12, 12), "kinks": False}


@dataclass(frozen=True)
class DenseCase(BlockCase):
    layer: str = "pre"

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        return where.dense_block(*inputs, params, running, frozen=self.flags, **self.options)


ONE: dict[str, Any] = {**LARGE, "layers": 1}
CASES: dict[str, cases.Case] = {
    "concat": ConcatConvCase(**LARGE),
    "concat silu": ConcatConvCase(**LARGE, options={"act": "silu"}),
    "dense": DenseCase(**LARGE),
    "dense recompute": DenseCase(**LARGE, options={"recompute": "bottleneck"}),
    "post": BlockCase(**ONE),
    "two_way": BlockCase(**ONE, layer="two_way"),
    **{
        f"partial {order} {fusion}": TransitionCase(**LARGE, order=order, fusion=fusion, pool=None)
        for order in ("pre", "post")
        for fusion in ("csp", "first", "last")
    },
    "stage pre": StageCase(**LARGE, pool=None),
    "stage post": StageCase(**ONE, layer="post", pool=None),
    "stage two_way": StageCase(**ONE, layer="two_way", pool=None),
}


def one_channel_a_row(weight: Tensor, raw: int, keep: bool) -> Tensor:
    """A 1x1 weight that passes one of its first `raw` channels through; keep: and adds the others as before."""
    chosen, rows = weight.clone(), torch.arange(weight.shape[0])
    chosen[:, : raw if keep else None] = 0.0
    chosen[rows, rows % raw] = 1.0
    return chosen


def prepare(case: cases.Case, leaves: dict[str, Tensor]) -> set[str]:
    """Makes the products of what lies at 1000 exact; the names of their weights, whose own gradients cancel."""
    raw: dict[str, tuple[int, bool]] = {}
    if isinstance(case, ConcatConvCase):
        raw["weight"] = sum(case.channels), False
    elif isinstance(case, TransitionCase) and case.order == "post":
        raw["t.conv.weight"] = case.dense, False
        raw["u.conv.weight"] = (case.part, True) if case.fusion == "csp" else (case.part + case.dense, False)
    elif isinstance(case, BlockCase) and case.layer != "pre":
        part = case.part if isinstance(case, StageCase) else 0
        raw |= {f"0.{branch}conv1.weight": (case.channels - part, False) for branch in ("", "branch1.", "branch2.")}
        raw["t.conv.weight"], raw["u.conv.weight"] = (case.channels - part, False), (part, True)
    for name, (channels, keep) in raw.items():
        if name in leaves:
            leaves[name] = one_channel_a_row(leaves[name], channels, keep)
    return {f"grad {name}" for name in raw}


# A frozen norm's mean is a float32 number: nothing is lost of it. Behind one that lets 1000 through, gradients cancel.
MIXED = ["dense", "dense recompute", "partial pre csp", "partial post csp", "stage pre"]


@pytest.mark.parametrize("name, frozen", [(name, ()) for name in CASES] + [(name, (False, True)) for name in MIXED])
def test_gradients(name: str, frozen: tuple[bool, ...]) -> None:
    case = replace(CASES[name], frozen=frozen)
    torch.manual_seed(0)
    leaves, running = case.leaves(), case.running()
    cancelling = prepare(case, leaves)
    outputs, _ = case(csp.ops, leaves, running)
    given = [torch.randn_like(y) + 1 for y in outputs]
    ours = cases.run(case, csp.ops, leaves, running, given)
    wide = {key: t.double() for key, t in leaves.items()}
    exact = cases.run(case, csp.reference, wide, [t.double() for t in running], given)
    for key, scale in cases.scales(exact).items():
        if key.startswith("grad") and key not in cancelling:
            error = (ours[key].double() - exact[key]).norm().item() / (scale or 1.0)
            assert error < BOUND, f"{key}: {error:.1e}"


# Post-norm layers meet a large mean behind their 3x3, too. Here it has centre taps alone and numbers of few bits, of
# which even Winograd's transforms are exact; frozen norms pass through what they read.
BEHIND = {
    "post": (BlockCase(layers=1, size=(2, 12, 12), frozen=(True, False)), ["0.norm2"]),
    "two_way": (
        BlockCase(layer="two_way", layers=1, size=(2, 12, 12), frozen=(True, False, True, False, False)),
        ["0.branch1.norm2", "0.branch2.norm2"],
    ),
    "two_way, last": (
        BlockCase(layer="two_way", layers=1, size=(2, 12, 12), frozen=(True, False, True, True, False)),
        ["0.branch1.norm2", "0.branch2.norm3"],
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_outputs_and_gradients_behind_a_3x3(name: str) -> None:
    case, tested = BEHIND[name]
    case = replace(case, options={"eps": [1e-30 if frozen else 1e-5 for frozen in case.flags]})
    torch.manual_seed(0)
    leaves = case.leaves()
    for key, t in leaves.items():
        if key == "x":
            leaves[key] = 1000 + torch.randint(-2, 3, t.shape) / 512
        elif t.dim() == 4 and not ("conv3" in key and name == "two_way"):  # there what it reads is normalised already
            rows, taps = torch.arange(t.shape[0]), t.shape[2] // 2
            leaves[key] = torch.zeros_like(t)
            leaves[key][rows, rows % t.shape[1], taps, taps] = 1.0
    norms = [key.removesuffix(".weight") for key, t in leaves.items() if key.endswith("weight") and t.dim() == 1]
    for norm, frozen in zip(norms, case.flags, strict=True):
        leaves[f"{norm}.weight"].fill_(1.0)
        leaves[f"{norm}.bias"].fill_(0.0 if frozen else 4.0)
    fixed = [c for c, frozen in zip(case.norms, case.flags, strict=True) if frozen]
    running = [t for c in fixed for t in (torch.zeros(c), torch.ones(c))]
    wide, wide_running = {key: t.double() for key, t in leaves.items()}, [t.double() for t in running]
    (y,), _ = case(csp.reference, wide, wide_running)
    given = [(y - y.mean((0, 2, 3), keepdim=True) + 0.1 * torch.randn_like(y)).float()]
    ours = cases.run(case, csp.ops, leaves, running, given)
    exact = cases.run(case, csp.reference, wide, wide_running, given)
    grown = (ours["y0"].double() - exact["y0"])[:, case.channels :].abs().max().item()
    assert grown < BOUND, f"outputs, of a standard deviation of about 1: {grown:.1e}"
    for key in ("grad x", *(f"grad {norm}.{kind}" for norm in tested for kind in ("weight", "bias"))):
        error = (ours[key].double() - exact[key]).norm().item() / exact[key].norm().item()
        assert error < BOUND, f"{key}: {error:.1e}"
