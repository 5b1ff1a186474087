"""The Triton launchers called directly with a wrong argument: an exception that names it, before anything is launched.
On a GPU a kernel would read what is not there, which ends the process' use of the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from cases import BlockCase
from test_nan import OPERATORS, Small, every
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import csp_kernels as csp

pytestmark = pytest.mark.usefixtures("native")
NAMES = ["dense block", "two outputs", "post block", "two_way block", "stage, pre", "stage, post"]
NAMES += [f"transition, {kind}" for kind in ("pre, csp", "post, csp", "post, first", "pre, last", "post, last")]


class Recorder(TorchDispatchMode):
    """Calls of the package's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "csp_kernels":
            self.calls.append((func._opname, list(args)))
        return result


def calls(name: str) -> list[tuple[str, list[Any]]]:
    """Forward, backward and inference, with arguments that are right."""
    found: list[tuple[str, list[Any]]] = []
    for frozen in ((False,), (True,)):
        case = every(Small(frozen=frozen, size=(2, 3, 4)))[name]
        case = replace(case, layers=2) if isinstance(case, BlockCase) else case
        with Recorder() as recorder:
            cases.run(case, csp.ops, case.leaves(), case.running())
            if all(frozen):
                with torch.no_grad():
                    case(csp.ops, case.leaves(), case.running())
        found += recorder.calls
    return found


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


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launched)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(name: str) -> None:
    tried = 0
    for operator, args in calls(name):
        stem = next(m.__name__.rpartition(".")[2] for m in OPERATORS if operator.startswith(m.__name__.split(".")[-1]))
        module = next(m for m in OPERATORS if m.__name__.endswith(f".{stem}"))
        launcher = getattr(module, operator.removeprefix(stem).removeprefix("_") or "forward")
        for fault, wrong in wrong_calls(args):
            if fault == "argument 0: size" and launcher is not module.backward:
                continue  # a wider image
            tried += 1
            caught: Exception | None = None
            try:
                launcher(*wrong)
            except Exception as error:
                caught = error
            said = f"{type(caught).__name__}: {caught}"  # no traceback: it would print tensors that have no memory
            assert isinstance(caught, TypeError | ValueError), f"{operator}, {fault}: {said}"
            assert re.match(r"[\w\[\], ]+: (got|expected|its memory was freed)", str(caught)), said
    assert tried > 50
