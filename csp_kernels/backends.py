"""Which implementation runs: the choice, the rule of "auto", and a report of what is available here and why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import TracebackType

import torch

from csp_kernels import native, winners
from csp_kernels._tracing import constant_when_traced

NAMES = ("auto", "native", "triton", "reference")
ENVIRONMENT = "CSP_KERNELS_BACKEND"
OLDEST_TRITON = (3, 6)
_ASKED = "(only where chosen, or measured to be faster)"
_DEVICES = {"native": ("cpu", "cuda"), "triton": ("cuda",)}  # that backends run on, if not on any


@dataclass(frozen=True)
class Backend:
    """One backend on this machine; `reason` says what it is, or why it is not available and how to get it."""

    available: bool
    reason: str


class Backends(dict[str, Backend]):
    """Backend name -> `Backend`; prints as a table."""

    def __str__(self) -> str:
        rows = [f"{name:<10} {'yes' if b.available else 'no':<4} {b.reason}" for name, b in self.items()]
        return "\n".join(rows)


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "{}.{}".format(*OLDEST_TRITON)  # installed, but not as a package: let it try


def _find_triton() -> str:
    """Why the Triton kernels cannot run here, found out without an import of triton; "" if they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; choose 'native' (CPU) or 'reference' (any device)"
    if not native.available():  # it defines the operators that the kernels implement
        return native.why_not()
    needed = "triton>={}.{}".format(*OLDEST_TRITON)
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed; `pip install '{needed}'`, or choose 'reference'"
    version = _triton_version()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"triton {version} is too old; `pip install '{needed}'`, or choose 'reference'"
    return ""


_WHY_NOT_TRITON = _find_triton()


def why_not_triton() -> str:
    """Why the Triton kernels cannot run here and what to do about it; "" if they can."""
    return _WHY_NOT_TRITON


@cache
def why_not_cuda(device: int | None = None) -> str:
    """Why the CUDA C++ kernels cannot run on this GPU (the current one) and what to do about it; "" if they can.
    Initialises CUDA."""
    compiled = native.cuda_architectures()
    if native.available() and not compiled:
        return "built without CUDA kernels; rebuild where nvcc is on PATH, or with CSP_KERNELS_CUDA=1 to learn why not"
    if why_not_triton():  # they are a part of operators, Triton's are the rest
        return why_not_triton()
    if torch.version.hip:
        return "CUDA kernels do not run on AMD; choose 'triton'"
    if error := native.cuda_error():
        return f"CUDA kernels: {error}; rebuild with a CUDA that the driver supports, or choose 'triton'"
    major, minor = torch.cuda.get_device_capability(device)
    here = 10 * major + minor
    if not any(c // 10 == major and c <= here for c in compiled) and here < max(compiled):
        return f"CUDA kernels are compiled for {compiled}, not for {here}; rebuild with CSP_KERNELS_CUDA_ARCHS={here}"
    return ""


def backends() -> Backends:
    """What is available here, and why not where not."""
    if native.available():
        cpu = f"CPU: C++ for {native.isa()} (compiled in: {', '.join(native.isas())})"
        compiled = f"{cpu}; GPU: {_cuda()}"
    else:
        compiled = native.why_not()
    return Backends(
        auto=Backend(True, _auto()),
        native=Backend(native.available(), compiled),
        triton=Backend(not why_not_triton(), why_not_triton() or _gpu()),
        reference=Backend(True, "any device, plain PyTorch"),
    )


def _auto() -> str:
    """What the choice "auto" does here, and why."""
    cpu = "CPU: native" if native.available() else "CPU: reference, for want of the library"
    if not torch.cuda.is_available():
        return f"{cpu}; no GPU here"
    if why_not_triton():
        return f"{cpu}; GPU: reference: {why_not_triton()}"
    here = torch.device("cuda", torch.cuda.current_device())
    return f"{cpu}; GPU: {winners.summary(winners.family(here))}"


def _cuda() -> str:
    archs, why = native.cuda_architectures(), why_not_cuda().partition("; choose")[0]
    if not archs:
        return why
    built = f"CUDA C++ for {', '.join(f'sm_{a}' for a in archs)}"
    widths = "3x3 of layers whose bottleneck and growth are multiples of 8 (float32: 4)"
    return f"{built}; {why}" if why else f"{built}, {widths}; the rest in triton {_ASKED}"


def _gpu() -> str:
    return f"{torch.cuda.get_device_name()}, triton {_triton_version()} {_ASKED}"


def _checked(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}, expected one of {', '.join(NAMES)}")
    return name


_selected = _checked(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)  # the process's choice
# (object, choice, entered as a context). Every call looks like a plain one until it is entered.
_Choice = tuple[Callable[[], "use_backend | None"], str, bool]
_calls: list[_Choice] = [(lambda: None, _selected, False)]  # plain ones for the process, in order; the last one counts
_lock = threading.RLock()
# Those of this thread or asyncio task: contexts, innermost last, each followed by the plain calls inside it.
_contexts: ContextVar[tuple[_Choice, ...]] = ContextVar("csp_kernels_backend", default=())
_traced = ""  # the choice of a context inside a compiled function, while Dynamo traces it: it cannot set a ContextVar
_latest = _selected  # of any thread, for compiled functions where Dynamo cannot read a ContextVar either


class use_backend:
    """Choose the backend of every operator: "auto", "native", "triton" or "reference".

    A plain call sets it for the process; a context for its thread or asyncio task, until it ends:

        csp.use_backend("reference")
        with csp.use_backend("native"): ...

    Other threads do not see a context, and a thread started inside one does not inherit it; an asyncio task does.
    Inside a context a plain call holds until that context ends and does not reach the process. Backward passes run as
    their forward passes did, in whatever thread.

    "auto" (the default, or the environment variable CSP_KERNELS_BACKEND) takes "native" for tensors on the CPU if the
    library is loaded. On a GPU it takes "native" (CUDA C++ for the 3x3 of the layers it takes, Triton for the rest) or
    "triton" (Triton alone) where csp_kernels/winners.json says that such calls were measured to be faster on such a
    device, otherwise "reference": so they have to be asked for where nothing has been measured.
    Raises ValueError for an unknown name, RuntimeError for a backend that is not available here.
    """

    def __init__(self, name: str) -> None:
        global _selected, _latest
        _require(_checked(name, "name"))
        self.name = name
        if torch.compiler.is_compiling():
            self._outside, _selected = _selected, name
            return
        _latest = name
        contexts = _contexts.get()
        if contexts:
            _contexts.set((*_possible(contexts), (weakref.ref(self), name, False)))
            return
        with _lock:
            _calls[:] = [*_possible(_calls), (weakref.ref(self), name, False)]
            _selected = name

    def __enter__(self) -> use_backend:
        global _selected, _traced, _latest
        if torch.compiler.is_compiling():
            _selected, self._around, _traced = self._outside, _traced, self.name
            return self
        with _lock:
            _calls[:] = [call for call in _calls if call[0]() is not self]
            _selected = _calls[-1][1]
        contexts = (c for c in _contexts.get() if c[2] or c[0]() is not self)
        _contexts.set((*contexts, (weakref.ref(self), self.name, True)))
        _latest = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _traced, _latest
        if torch.compiler.is_compiling():
            _traced = self._around
            return
        contexts = _contexts.get()
        mine = [i for i, (owner, _, entered) in enumerate(contexts) if entered and owner() is self]
        if mine:  # none: it was entered in another thread or task, whose context it stays
            after = contexts[mine[-1] + 1 :]
            plain = next((i for i, (_, _, entered) in enumerate(after) if entered), len(after))
            _contexts.set((*contexts[: mine[-1]], *after[plain:]))
        _latest = selected()


def _possible(choices: Sequence[_Choice]) -> Sequence[_Choice]:
    """Without the plain calls that can never count again: below one that nobody can enter any more."""
    start = max((i for i, c in enumerate(choices) if c[2]), default=-1) + 1
    final = max((i for i, c in enumerate(choices) if i >= start and c[0]() is None), default=start)
    return [*choices[:start], *choices[final:]]


def selected() -> str:
    """The current choice, "auto" included."""
    if torch.compiler.is_compiling() and not _dynamo_reads_contexts():
        return _traced or _latest
    contexts = _contexts.get()
    return _traced or (contexts[-1][1] if contexts else _selected)


@constant_when_traced
def _dynamo_reads_contexts() -> bool:
    """Since some release after torch 2.11, with a guard that is checked in the calling thread."""
    return hasattr(sys.modules.get("torch._dynamo.source"), "ContextVarGetSource")


class _Running(threading.local):
    name = ""


_running = _Running()


@contextmanager
def running_as(name: str) -> Iterator[None]:
    """Backward, in whatever thread: by the choice that its forward pass ran with."""
    before, _running.name = _running.name, name
    try:
        yield
    finally:
        _running.name = before


def running() -> str:
    """The choice that the operator which runs now was called with."""
    return _running.name or selected()


def _require(name: str) -> None:
    if name == "native" and not native.available():
        raise RuntimeError(f"backend 'native' is not available: {native.why_not()}")
    if name == "triton" and why_not_triton():
        raise RuntimeError(f"backend 'triton' is not available: {why_not_triton()}")


def resolve(device_type: str) -> str:
    """The backend that runs operators on tensors of this device type: "native", "triton" or "reference".

    Raises RuntimeError if the chosen backend is not available or does not run on that device.
    """
    choice = selected()
    if choice == "auto":
        return "native" if device_type == "cpu" and native.available() else "reference"
    _require(choice)
    if device_type not in _DEVICES.get(choice, (device_type,)):
        expected = " or ".join(repr(name) for name in _DEVICES[choice])
        raise RuntimeError(
            f"backend {choice!r}: got tensors on {device_type!r}, expected {expected}; "
            "choose backend 'auto' or 'reference'"
        )
    if choice == "native" and device_type == "cuda" and why_not_cuda():
        raise RuntimeError(f"backend 'native' is not available on 'cuda': {why_not_cuda()}")
    return choice
