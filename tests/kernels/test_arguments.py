"""The launchers called directly with a wrong argument: an exception that names it, before anything is launched. On a
GPU a kernel would read what is not there, which ends the process' use of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stage_cases import GRAPHS, Case, arguments, seed
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from csp_kernels.kernels import stage as kernels
from csp_kernels.ops.stage import unsupported
from csp_kernels.stage.build import Builder
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.text import encode


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def wrong_tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "dtype", t.to(torch.float32 if t.dtype == torch.float64 else torch.float64)
    yield "size", torch.cat([t, t], t.dim() - 1)
    yield "device", t.to("meta")
    yield "freed", freed(t)


def wrong_lists(items: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    if items:
        yield "short", items[:-1]
    for i, item in enumerate(items):
        if isinstance(item, Tensor) and item.numel():
            for fault, t in wrong_tensors(item):
                yield f"{i}, {fault}", [*items[:i], t, *items[i + 1 :]]


def wrong_calls(args: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    for i, given in enumerate(args):
        faults = wrong_lists(given) if isinstance(given, list) else ()
        if isinstance(given, Tensor) and given.numel():
            faults = wrong_tensors(given)
        for fault, value in faults:
            yield f"argument {i}: {fault}", [*args[:i], value, *args[i + 1 :]]


@pytest.mark.parametrize("name", ["dropout", "concat, three inputs, two outputs", "stage, two_way, csp", "joins"])
@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_wrong_arguments(name: str, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TypeError or ValueError that names the argument."""
    case = Case(GRAPHS[name], (False, True))
    a = arguments(case)
    given: list[Any] = [a.inputs, a.params, a.running, seed(), encode(case.program), case.eps, 2]
    launchers: dict[str, Callable[..., Any]] = {"forward": kernels.forward, "backward": kernels.backward}
    if operator == "backward":
        outputs, kept, stats = kernels.forward(*given)
        given = [a.grads, a.inputs, outputs, kept, stats, *given[1:]]

    def launched(*_: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launched)
    tried = 0
    for fault, wrong in wrong_calls(given):
        if fault == "argument 0: 0, size" and operator == "forward" and len(a.inputs) == 1:
            continue  # a wider image
        tried += 1
        with pytest.raises((TypeError, ValueError), match=r"^[\w\[\], ]+: (got|expected|its memory was freed)"):
            launchers[operator](*wrong)
    assert tried > 20


def test_a_program_that_drops_needs_a_seed() -> None:
    case = Case(GRAPHS["dropout"])
    a = arguments(case)
    with pytest.raises(ValueError, match="seed: got none"):
        kernels.forward(a.inputs, a.params, a.running, None, encode(case.program), case.eps, 2)


@pytest.mark.parametrize("options", [{"groups": 2}, {"kernel": 3, "groups": 2, "drop_rate": 0.5},
                                     {"kernel": 3, "stride": 2, "drop_rate": 0.5}], ids=str)  # fmt: skip
def test_what_the_reference_alone_runs(options: dict[str, Any]) -> None:
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 8, **options))])
    case = Case(build.graph())
    a, program = arguments(case), encode(compile_stage(case.graph, ()))
    assert unsupported(case.graph)
    with pytest.raises(ValueError, match=r"^program: got groups"):
        kernels.forward(a.inputs, a.params, a.running, torch.tensor([1]), program, case.eps, 2)


def test_a_text_that_is_no_program() -> None:
    case = Case(GRAPHS["dense"])
    a = arguments(case)
    with pytest.raises(ValueError, match="program: got"):
        kernels.forward(a.inputs, a.params, a.running, None, encode(case.program)[:100], case.eps, 2)
