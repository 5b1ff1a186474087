"""NaN and infinity in all operators in Triton, interpreted: what they spread to, and what they leave alone, as in plain
PyTorch. In 3x3 products too: Triton's form of them adds no terms that the convolution does not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cases
import pytest
import torch
from cases import BlockCase, ConcatConvCase, StageCase, TransitionCase
from tolerances import error
from torch import Tensor

import csp_kernels as csp
from csp_kernels.kernels import activate, launch, mix
from csp_kernels.reference.activations import FUNCTIONS
from csp_kernels.stage.build import Builder, conv_norm
from csp_kernels.stage.graph import Graph
from csp_kernels.vocabulary import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("native", "operators")
# of float64 and another, relative in the 2-norm of what is finite
CLOSE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SIZE = (3, 3, 3)  # an image for each of
NOT_FINITE = math.nan, math.inf, -math.inf


@dataclass(frozen=True)
class PreBlockCase(BlockCase):
    """DenseNet's layers."""

    layer: str = "pre"

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        y, stats = where.dense_block(*inputs, params, running, frozen=self.flags, **self.options)
        total = y.shape[1]  # what the last layer adds has unspecified statistics: no norm needs them
        return y, torch.cat([stats[:, : total - self.growth], stats[:, total:]], 1)


@dataclass(frozen=True)
class Small:
    """Sizes that keep the interpreter quick; no ReLU is near its kink, every fourth channel's is not active."""

    frozen: tuple[bool, ...] = (True,)
    size: tuple[int, int, int] = SIZE
    kinks: bool = False
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: type[cases.Case], **given: Any) -> cases.Case:
        options = {**self.options, **given.pop("options", {})}
        return kind(self.size, self.dtype, self.frozen, kinks=self.kinks, options=options, **given)


def every(small: Small) -> dict[str, cases.Case]:
    """All operators."""
    block = {"channels": 8, "growth": 4, "width": 5}
    stage = {**block, "layers": 1, "part": 4, "mid": 5, "out": 6, "pool": None}
    found = {"dense block": small.of(PreBlockCase, layers=2, **block)}
    found |= {act: small.of(ConcatConvCase, channels=(5, 4), out=8, options={"act": act}) for act in ACTIVATIONS}
    found["two outputs"] = small.of(ConcatConvCase, channels=(5, 4), out=8, options={"splits": [3, 5]})
    found |= {f"{layer} block": small.of(BlockCase, layer=layer, layers=1, **block) for layer in ("post", "two_way")}
    found |= {f"stage, {layer}": small.of(StageCase, layer=layer, **stage) for layer in ("pre", "post")}
    for order, fusion in (("pre", "csp"), ("post", "csp"), ("post", "first"), ("pre", "last"), ("post", "last")):
        sizes = {"part": 4, "dense": 6, "mid": 5, "out": 6}
        found[f"transition, {order}, {fusion}"] = small.of(TransitionCase, order=order, fusion=fusion, **sizes)
    return found


FROZEN, TRAINED = every(Small()), every(Small(frozen=(), kinks=True))
all_cases = pytest.mark.parametrize("name", FROZEN)


def compare(case: cases.Case, leaves: dict[str, Tensor], running: list[Tensor], given: Sequence[Tensor]) -> None:
    """What is NaN or infinite in plain PyTorch in float64 is, and nothing else; what is finite is close."""
    ours = cases.run(case, csp.ops, leaves, running, given)
    wide = {name: t.double() for name, t in leaves.items()}
    exact = cases.run(case, csp.reference, wide, [t.double() for t in running], given)
    for name, expected in exact.items():
        if name == "stats" and any(case.flags):
            continue
        got, finite = ours[name], expected.isfinite()
        wrong = (got.isfinite() != finite).nonzero()
        assert not len(wrong), f"{name}: finite or not differs at {wrong[:3].tolist()}"
        assert error(got[finite], expected[finite]) <= CLOSE[case.dtype], name


def draw(case: cases.Case) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    leaves, running = case.leaves(), case.running()
    return leaves, running, [g.clone() for g in cases.grads(case, case(csp.reference, leaves, running)[0])]


def strides() -> Graph:
    """With maxima, and groups that are not computed together."""
    build = Builder(4)
    x = build.read(0)
    down = conv_norm(build, [build.read(build.conv([x], 32, 3, stride=2))], 64)
    grouped = build.conv([down], 64, 3, stride=2, groups=2)
    build.write([conv_norm(build, [build.read(build.max_pool(x, 3, stride=2))], 5), down])
    build.write([build.read(grouped, build.norm(64), "relu"), build.read(build.conv([down], 6, stride=2))])
    return build.graph()


@pytest.mark.parametrize("number", NOT_FINITE)
def test_strides_and_maxima(number: float) -> None:
    """Forward, and in the gradient of all that they reach."""
    case = Small(size=(2, 9, 7)).of(cases.GraphCase, graph=strides())
    leaves, running, given = draw(case)
    leaves["inputs.0"][0, 1, 8, 6] = number
    leaves["inputs.0"][1, 2, 3, 2] = number
    compare(case, leaves, running, given)


@all_cases
def test_in_an_input(name: str) -> None:
    """Of norms with fixed statistics: what it does not reach stays finite, NaN in front of a ReLU passes gradients."""
    case = FROZEN[name]
    leaves, running, given = draw(case)
    for i, key in enumerate(case.inputs):
        leaves[key][:, 2 - i, 1, i] = torch.tensor(NOT_FINITE)
    compare(case, leaves, running, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_sixteen_bits(dtype: torch.dtype) -> None:
    """Where both gradients of the 1x1 are taken in one pass."""
    case = Small(dtype=dtype).of(PreBlockCase, layers=1, channels=8, growth=4, width=5)
    leaves, running, given = draw(case)
    leaves["x"][:, 2, 1, 0] = torch.tensor(NOT_FINITE)
    given[0][0, :, 1, 1] = math.nan
    compare(case, leaves, running, given)


@pytest.mark.parametrize("name", [name for name in FROZEN if name not in ("identity", "leaky_relu", "silu", "mish")])
@pytest.mark.parametrize("channel", [0, slice(None)], ids=["channel 0", "all"])
def test_in_a_gradient(name: str, channel: int | slice) -> None:
    """Nothing comes through a ReLU that is not active, as those of channel 0. In the middle: convolutions differ in
    whether the padding's zeros are terms of a weight's gradient."""
    case = FROZEN[name]
    leaves, running, given = draw(case)
    for g in given:
        for image, value in enumerate(NOT_FINITE):
            g[image, channel, g.shape[2] // 2, g.shape[3] // 2] = value
    compare(case, leaves, running, given)


@all_cases
def test_in_running_statistics(name: str) -> None:
    """A mean of infinity makes a channel minus infinity, which ReLU makes 0; a variance of infinity leaves the bias."""
    case = FROZEN[name]
    leaves, running, given = draw(case)
    running[0][1], running[1][2] = math.inf, math.inf
    compare(case, leaves, running, given)


@all_cases
@pytest.mark.parametrize("value", NOT_FINITE[:2], ids=str)
def test_in_training(name: str, value: float) -> None:
    """Statistics of a channel that has one are not finite: above all, its variance is not 0."""
    case = TRAINED[name]
    leaves, running, given = draw(case)
    leaves[next(iter(case.inputs))][0, -1, 1, 2] = value
    compare(case, leaves, running, given)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    """Values and gradients at every kind of number, as PyTorch's."""
    x = torch.tensor([-math.inf, -1e30, -4.0, -3.0, -0.0, 0.0, 1.0, 3.0, 4.0, 1e30, math.inf, math.nan])
    if act.startswith("gelu"):
        x = x[~x.isinf()]  # there PyTorch's kernels differ among each other
    code = activate.Activation(ACTIVATIONS.index(act), 0.1)

    def function(t: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[act](t * 1, 0.1)

    z, geometry = x.repeat(16, 1).t().contiguous(), launch.Geometry(1, 1, len(x))
    y, dz = torch.empty_like(z), torch.empty_like(z)
    activate.forward(z, None, y, geometry, code)
    torch.testing.assert_close(y, function(z), equal_nan=True)
    for value in (1.0, math.nan, math.inf):
        leaf, d = z.clone().requires_grad_(), torch.full_like(z, value)
        activate.backward(d, z, None, dz, geometry, code)
        (expected,) = torch.autograd.grad(function(leaf), leaf, d)
        torch.testing.assert_close(dz, expected, equal_nan=True)


@pytest.mark.parametrize("code", [-1, len(ACTIVATIONS)])
def test_unknown_activations_are_refused(code: int) -> None:
    """Not run as another one; by the kernels that store it and by those that apply it on load."""
    z, geometry, act = torch.ones(4, 4), launch.Geometry(1, 2, 2), activate.Activation(code)
    norm = launch.Norm(*(torch.ones(4) for _ in range(3)))
    segments = [mix.Segment(torch.ones(4, 4), None, torch.empty(4, 4))]
    calls = (
        lambda: activate.forward(z, None, torch.empty(4, 4), geometry, act),
        lambda: activate.backward(z, z, None, torch.empty(4, 4), geometry, act),
        lambda: mix.forward(segments, torch.eye(4), torch.empty(4, 4), geometry, after=mix.After(norm, act)),
        lambda: mix.backward(segments, z, z, mix.ActivationGradient(norm, act), torch.eye(4), geometry),
    )
    for call in calls:
        with pytest.raises(Exception, match="unknown activation"):
            call()
