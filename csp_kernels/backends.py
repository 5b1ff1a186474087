"""Which implementation runs: the choice, the rule of "auto", and a report of what is available here and why not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType

from csp_kernels import native

NAMES = ("auto", "native", "triton", "reference")
ENVIRONMENT = "CSP_KERNELS_BACKEND"
_NO_TRITON = "not part of this version of csp_kernels; choose 'native' (CPU) or 'reference' (any device)"


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


def backends() -> Backends:
    """What is available here, and why not where not."""
    if native.available():
        compiled = f"CPU, C++ for {native.isa()} (compiled in: {', '.join(native.isas())})"
    else:
        compiled = native.why_not()
    return Backends(
        native=Backend(native.available(), compiled),
        triton=Backend(False, _NO_TRITON),
        reference=Backend(True, "any device, plain PyTorch"),
    )


def _checked(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}, expected one of {', '.join(NAMES)}")
    return name


_selected = _checked(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


class use_backend:
    """Choose the backend of every operator: "auto", "native", "triton" or "reference".

    A plain call sets it for the process; as a context manager it restores the previous choice on exit:

        csp.use_backend("reference")
        with csp.use_backend("native"): ...

    "auto" (the default, or the environment variable CSP_KERNELS_BACKEND) takes "native" for tensors on the CPU if the
    library is loaded, otherwise "reference". Raises ValueError for an unknown name, RuntimeError for a backend that is
    not available here.
    """

    def __init__(self, name: str) -> None:
        global _selected
        _require(_checked(name, "name"))
        self._previous, _selected = _selected, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _selected
        _selected = self._previous


def selected() -> str:
    """The current choice, "auto" included."""
    return _selected


def _require(name: str) -> None:
    if name == "native" and not native.available():
        raise RuntimeError(f"backend 'native' is not available: {native.why_not()}")
    if name == "triton":
        raise RuntimeError(f"backend 'triton' is not available: {_NO_TRITON}")


def resolve(device_type: str) -> str:
    """The backend that runs an operator on tensors of this device type: "native" or "reference".

    Raises RuntimeError if the chosen backend is not available or does not run on that device.
    """
    if _selected == "auto":
        return "native" if device_type == "cpu" and native.available() else "reference"
    _require(_selected)
    if _selected == "native" and device_type != "cpu":
        raise RuntimeError(
            f"backend 'native': got tensors on {device_type!r}, expected 'cpu'; choose backend 'auto' or 'reference'"
        )
    return _selected
