"""Calls of inference that skip the checks in Python because one like them was checked: the same results, and the same
errors for what has become wrong since."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import BlockCase, Case, ConcatConvCase, GraphCase, StageCase, TransitionCase
from torch import Tensor

import csp_kernels as csp
from csp_kernels.ops import _checks, _packed, _repeated
from csp_kernels.stage.build import Builder, conv_norm

pytestmark = pytest.mark.usefixtures("native")


def graph(bias: bool = False) -> Any:
    """Two inputs and two outputs, one of them pooled."""
    build = Builder(6, 4)
    read = conv_norm(build, [build.read(0), build.read(1)], 8, 3)
    build.write([read])
    build.write([build.read(build.conv([read], 5, 1, bias=bias, pool=not bias, name="last"))], not bias)
    return build.graph()


@dataclass(frozen=True)
class DenseCase(BlockCase):
    layer: str = "pre"

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        return where.dense_block(*inputs, params, running, frozen=self.flags, **self.options)


CASES: dict[str, Case] = {
    "dense_block": DenseCase(),
    "post_dense_block": BlockCase(),
    "two_way_dense_block": BlockCase(layer="two_way"),
    "csp_stage": StageCase(),
    "partial_transition": TransitionCase(),
    "no bypass": TransitionCase(part=0, fusion="last"),
    "concat_conv": ConcatConvCase(),
    "stage": GraphCase(graph=graph()),
}
operators = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    csp.empty_cache()
    _repeated._known.clear()
    with torch.no_grad():
        yield


class Arguments:
    """Of a case whose norms are frozen, unless others are given."""

    def __init__(self, case: Case, frozen: tuple[bool, ...] = (True,)) -> None:
        torch.manual_seed(3)
        self.case = replace(case, frozen=frozen)
        self.leaves, self.running = self.case.leaves(), self.case.running()

    def params(self) -> list[str]:
        return [*self.leaves][len(self.case.inputs) :]

    def call(self) -> list[Tensor]:
        outputs, stats = self.case(csp.ops, self.leaves, self.running)
        return [*outputs, stats]

    def unchecked(self) -> bool:
        """Whether the call skips the checks."""
        with patch.object(_checks, "check_tensors", side_effect=AssertionError("checked")):
            try:
                self.call()
            except AssertionError:
                return False
        return True

    def known(self) -> list[Tensor]:
        """What calls give; afterwards they skip the checks."""
        found = [self.call() for _ in range(4)]
        assert self.unchecked()
        assert all(same(found[0], other) for other in found)
        return found[0]

    def as_new(self) -> list[Tensor]:
        with patch.object(_packed, "SHARES", False):
            outputs, stats = self.case(csp.ops, self.leaves, self.running)
        return [*outputs, stats]


def same(ours: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(ours, expected, strict=True)
    return all(torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype for a, b in pairs)


@operators
@pytest.mark.parametrize("frozen", [(True,), (False,), (True, False)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_as_checked(name: str, frozen: tuple[bool, ...], layout: torch.memory_format) -> None:
    """Bit by bit, also the statistics of norms that are not frozen."""
    arguments = Arguments(CASES[name], frozen)
    for key in arguments.case.inputs:
        arguments.leaves[key] = arguments.leaves[key].contiguous(memory_format=layout)
    assert same(arguments.known(), arguments.as_new())


@operators
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    arguments = Arguments(replace(CASES[name], dtype=dtype))
    assert same(arguments.known(), arguments.as_new())


def other_size(arguments: Arguments) -> None:
    for key in arguments.case.inputs:
        arguments.leaves[key] = torch.randn(1, *arguments.leaves[key].shape[1:])


def strides(arguments: Arguments) -> None:
    for key in arguments.case.inputs:
        arguments.leaves[key] = arguments.leaves[key].transpose(2, 3).contiguous().transpose(2, 3)


def layout(arguments: Arguments) -> None:
    for key in arguments.case.inputs:
        arguments.leaves[key] = arguments.leaves[key].contiguous(memory_format=torch.channels_last)


def no_weight_of_a_norm(arguments: Arguments) -> None:
    key = next(k for k in arguments.params() if k.endswith("weight") and arguments.leaves[k].dim() == 1)
    arguments.leaves[key] = None  # type: ignore[assignment]


def weights_with_gaps(arguments: Arguments) -> None:
    for key in arguments.params():
        t = arguments.leaves[key]
        arguments.leaves[key] = torch.stack((t, t), -1)[..., 0]


def other_eps(arguments: Arguments) -> None:
    arguments.case = replace(arguments.case, options={**arguments.case.options, "eps": 0.1})


def running_statistics(arguments: Arguments) -> None:
    for t in arguments.running:
        t += 0.5


def values(arguments: Arguments) -> None:
    for t in arguments.leaves.values():
        t *= 1.5


def options(arguments: Arguments) -> None:
    """Where the operator has some that change what it gives."""
    case = arguments.case
    if isinstance(case, (StageCase, TransitionCase)):
        arguments.case = replace(case, pool=None)
    elif isinstance(case, ConcatConvCase):
        arguments.case = replace(case, options={"act": "silu"})


CHANGES = [
    other_size, strides, layout, no_weight_of_a_norm, weights_with_gaps, other_eps, running_statistics, values, options,
]  # fmt: skip


@operators
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes(name: str, change: Callable[[Arguments], None]) -> None:
    arguments = Arguments(CASES[name])
    arguments.known()
    change(arguments)
    expected = arguments.as_new()
    for _ in range(4):
        assert same(arguments.call(), expected)


def vector(arguments: Arguments) -> str:
    """The last parameter of a norm."""
    return [k for k in arguments.params() if arguments.leaves[k].dim() == 1][-1]


def shape_of_a_parameter(arguments: Arguments) -> None:
    key = vector(arguments)
    t = arguments.leaves[key]
    arguments.leaves[key] = t.new_ones((t.shape[0] + 1, *t.shape[1:]))


def dtype_of_a_parameter(arguments: Arguments) -> None:
    key = arguments.params()[-1]
    arguments.leaves[key] = arguments.leaves[key].double()


def in_place(arguments: Arguments) -> None:
    key = vector(arguments)
    arguments.leaves[key].data = arguments.leaves[key].data[:-1]


def no_tensor(arguments: Arguments) -> None:
    arguments.leaves[arguments.params()[-1]] = 1.0  # type: ignore[assignment]


def on_no_device(arguments: Arguments) -> None:
    key = arguments.params()[-1]
    arguments.leaves[key] = arguments.leaves[key].to("meta")


def one_more_running(arguments: Arguments) -> None:
    arguments.running.append(arguments.running[0])


def running_of_another_shape(arguments: Arguments) -> None:
    arguments.running[-1] = torch.ones(len(arguments.running[-1]) + 1)


def freed(arguments: Arguments) -> None:
    arguments.leaves[arguments.params()[-1]].untyped_storage().resize_(0)


WRONG = [
    shape_of_a_parameter, dtype_of_a_parameter, in_place, no_tensor, on_no_device, one_more_running,
    running_of_another_shape, freed,
]  # fmt: skip


@operators
@pytest.mark.parametrize("change", WRONG, ids=lambda f: f.__name__)
def test_errors(name: str, change: Callable[[Arguments], None]) -> None:
    """What has become wrong since is refused in the words of a new call."""
    arguments = Arguments(CASES[name])
    arguments.known()
    change(arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as new:
        arguments.as_new()
    for _ in range(3):
        with pytest.raises(type(new.value)) as again:
            arguments.call()
        assert str(again.value).replace("_inference", "") == str(new.value)


def test_where_nothing_may_be_skipped() -> None:
    """Gradients, autocast, another backend and transforms see a call as if it were the first."""
    arguments = Arguments(CASES["csp_stage"])
    expected = arguments.known()
    with torch.enable_grad():
        assert not arguments.unchecked()
    arguments.known()
    with torch.autocast("cpu", torch.bfloat16):
        assert not arguments.unchecked() and arguments.call()[0].dtype is torch.bfloat16
    arguments.known()
    with csp.use_backend("reference"):
        assert not arguments.unchecked()
    x = arguments.leaves["x"]
    with csp.use_backend("auto"):
        for _ in range(3):
            y = torch.func.vmap(lambda t: _stage(arguments, t))(x[None])[0]
            torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-4)


@torch.enable_grad()
def test_tangents() -> None:
    """Of torch.func and of torch.autograd.forward_ad, although autograd is off inside."""
    arguments = Arguments(replace(CASES["csp_stage"], dtype=torch.float64))
    x = arguments.leaves["x"]
    with torch.no_grad():
        arguments.known()
    with csp.use_backend("auto"):
        _, tangent = torch.func.jvp(torch.no_grad()(lambda t: _stage(arguments, t)), (x,), (x,))
        _, expected = torch.func.jvp(lambda t: _stage(arguments, t), (x,), (x,))
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            y = _stage(arguments, torch.autograd.forward_ad.make_dual(x, x))
            other = torch.autograd.forward_ad.unpack_dual(y).tangent
    for t in (tangent, other):
        torch.testing.assert_close(t, expected)


def test_what_was_converted_is_not_known() -> None:
    """The compiled operator would refuse it each time."""
    arguments = Arguments(CASES["concat_conv"])
    key = vector(arguments)
    arguments.leaves[key] = torch.stack((arguments.leaves[key],) * 2, -1)[..., 0]
    for _ in range(4):
        arguments.call()
    assert not _repeated._known


@operators
def test_holds_no_tensors(name: str) -> None:
    arguments = Arguments(CASES[name])
    arguments.known()
    alive = [weakref.ref(t) for t in (*arguments.leaves.values(), *arguments.running)]
    del arguments
    gc.collect()
    assert _repeated._known and not any(ref() is not None for ref in alive)


def test_layers_are_known() -> None:
    """Each of these calls its operator in a way of its own."""
    for layer in (
        csp.C2f(8, 8, 1),
        csp.CSPStage(8, 8, 1, stride=1),
        csp.DenseBlock(2, 8, 4, 2),
        csp.ConcatConv([8], 6),
    ):
        _repeated._known.clear()
        layer.eval()
        for _ in range(2):
            layer(torch.randn(1, 8, 6, 5))
        assert len(_repeated._known) == 1


def test_which_norms_are_frozen() -> None:
    build = Builder(4)
    build.write([conv_norm(build, [conv_norm(build, [build.read(0)], 4, 1)], 4, 1)])
    arguments = Arguments(GraphCase(graph=build.graph()), (True, False))
    arguments.known()
    arguments.case = replace(arguments.case, frozen=(False, True))
    assert same(arguments.call(), arguments.as_new())


def _stage(arguments: Arguments, x: Tensor) -> Tensor:
    arguments.leaves["x"] = x
    return arguments.call()[0]


def test_tensors_as_options() -> None:
    """What they are now counts, and nothing holds them."""
    arguments = Arguments(CASES["concat_conv"])
    slope = torch.tensor(0.1)
    arguments.case = replace(arguments.case, options={"act": "leaky_relu", "negative_slope": slope})
    for _ in range(4):
        arguments.call()
    slope.fill_(0.7)
    assert same(arguments.call(), arguments.as_new())
    stage = Arguments(CASES["stage"])
    eps = [torch.tensor(1e-5) for _ in stage.case.norms]
    stage.case = replace(stage.case, options={"eps": eps})
    for _ in range(4):
        stage.call()
    eps[0].fill_(3.0)
    assert same(stage.call(), stage.as_new()) and not _repeated._known


def test_arguments_of_other_kinds() -> None:
    """The checks see them first, also where a right call is known: 1 is not True."""
    arguments = Arguments(CASES["concat_conv"])
    arguments.known()
    x, y, *params = arguments.leaves.values()
    wrong: list[tuple[Any, Any, Any]] = [
        ([x, y], arguments.running, 1),
        ([torch.nested.nested_tensor([x[0], x[1]]), y], arguments.running, True),
        (x, arguments.running, True),
    ]
    for inputs, running, frozen in wrong:
        with pytest.raises(TypeError, match=r"^(frozen|inputs(\[0\])?): got"):
            csp.ops.concat_conv(inputs, *params, running, frozen=frozen)
    graph = CASES["stage"].graph  # type: ignore[attr-defined]
    for params in (torch.ones(3), {"a": 1}):
        with pytest.raises(ValueError, match=r"^params"):
            csp.ops.stage(graph, [torch.randn(1, c, 4, 4) for c in graph.inputs], params)


def test_biases_are_checked() -> None:
    """A stage with biases is run as one without them, with other parameters: nothing of it is known."""
    arguments = Arguments(GraphCase(graph=graph(bias=True)))
    expected = arguments.as_new()
    for _ in range(4):
        assert same(arguments.call(), expected)
    assert not _repeated._known


def test_two_modules_of_one_kind() -> None:
    """Other channels behind the same options: one does not take the other's program."""
    narrow, wide = Arguments(BlockCase(width=4)), Arguments(BlockCase(width=8))
    expected = narrow.as_new(), wide.as_new()
    for _ in range(4):
        assert same(narrow.call(), expected[0]) and same(wide.call(), expected[1])
    assert narrow.unchecked() and wide.unchecked()


def test_not_too_many() -> None:
    with patch.object(_repeated, "MOST", 2):
        for n in range(1, 6):
            Arguments(replace(CASES["stage"], size=(n, 4, 4))).known()
            assert len(_repeated._known) <= 2
