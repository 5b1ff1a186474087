"""Puts plans into the place of forwards, by the class of the modules alone."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csp_kernels._tracing import constant_when_traced
from csp_kernels.backends import selected
from csp_kernels.fusion.make_plan import make_plan
from csp_kernels.fusion.plan import Bound, Plan
from csp_kernels.fusion.trace import STATE, Channels, Constant, Several, modes
from csp_kernels.layers._children import recorded
from csp_kernels.ops._checks import ACCUMULATE
from csp_kernels.ops._packed import forget
from csp_kernels.ops._transforms import transforming

# --- the class ---

_SET = object.__dict__["__class__"].__set__
_LOCK = threading.RLock()


class Inside(NamedTuple):
    """What of a fused module is fused, too. called: children that its plan calls, and how often their images are
    halved; parts: all others, for calls that it has no plan for."""

    called: tuple[tuple[str, int], ...] = ()
    parts: bool = False


class State:
    """Of one fused module: its modules that may be in training mode or not, and the plan for each such case."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module  # a shallow copy has the state of another one
        self.switched = list(module.modules())
        self.bound: dict[Any, Bound | str] = {}  # by flags and arguments
        self.said: set[str] = set()

    def flags(self) -> tuple[bool, ...]:
        return tuple([m.training for m in self.switched])


def original_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that csp.fuse found; None for a module that it has not changed."""
    found: type[nn.Module] | None = type(module).__dict__.get("_csp_original")
    return found


def swap(module: nn.Module, plans: dict[Any, Plan | str], inside: Inside) -> None:
    original: Any = type(module)
    members = {
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
        "forward": _like(original), "train": _train, "_apply": _apply,
        "__reduce_ex__": _reduce, "__deepcopy__": _deepcopy,
        "__class__": property(lambda self: original, _become), "_csp_original": original, "_csp_plans": plans,
        "_csp_inside": inside,
    }  # fmt: skip
    _SET(module, type(original.__name__, (original,), members))


def _become(self: nn.Module, cls: Any) -> None:
    """Somebody gives it another class, as parametrizations and FSDP do: its next call fuses it as one of that."""
    original: Any = original_of(self)
    inside = type(self)._csp_inside  # type: ignore[attr-defined]
    restore(self, cls)
    if cls.forward is original.forward:
        swap(self, {}, inside)


def restore(module: nn.Module, original: type[nn.Module]) -> None:
    _SET(module, original)
    module.__dict__.pop(STATE, None)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """As the original: whoever loads it needs nothing of this package."""
    cls, original = type(self), original_of(self)
    reduced: Any = super(cls, self).__reduce_ex__(protocol)
    function, arguments, *rest = reduced
    arguments = tuple(original if item is cls else item for item in arguments)
    if rest and isinstance(rest[0], dict):
        rest[0] = {name: value for name, value in rest[0].items() if name != STATE}
    return (function, arguments, *rest)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """By what the original says of copies; they are fused too."""
    cls, original = type(self), original_of(self)
    own: Any = getattr(original, "__deepcopy__", None)
    made: Any = own(self, memo) if own else copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]
    if type(made) in (original, cls):
        made.__dict__.pop(STATE, None)
        _SET(made, cls)
    return made


def _train(self: Any, *args: Any, **kwargs: Any) -> Any:
    forget(self.parameters())
    return type(self)._csp_original.train(self, *args, **kwargs)


def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of .to() and its kind, which may swap weights: nothing that is kept of them may refer to them."""
    forget(self.parameters())
    return type(self)._csp_original._apply(self, *args, **kwargs)


MOST_CALLS = 16  # kinds of arguments for which one module has plans


def _bound(module: nn.Module, spec: Any) -> Bound | str:
    """The plan for the present training flags and such arguments, with the modules."""
    state: State | None = module.__dict__.get(STATE)
    if state is None or state.module is not module:
        state = module.__dict__[STATE] = State(module)
    key = state.flags(), modes(), spec
    found = state.bound.get(key)
    if found is None:
        plans: dict[Any, Plan | str] = type(module)._csp_plans  # type: ignore[attr-defined]
        with _LOCK:
            if key not in plans:
                made = "" if len(plans) >= MOST_CALLS else make_plan(module, given=spec)
                plans[key] = made if isinstance(made, str) else made.plan if made.regions else ""
        plan = plans[key]
        try:
            found = state.bound[key] = plan if isinstance(plan, str) else Bound(module, plan)
        except (KeyError, AttributeError):
            return "it has other children than when it was fused"
    return found


# --- a call ---


@lru_cache(maxsize=1024)
def _like(original: Any) -> Callable[..., Any]:
    """A forward with the signature of the original's, which torch.fx and exporters read."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    given: list[str] = []
    taken: list[str] = []
    named: list[str] = []
    defaults: dict[str, Any] = {}
    for p in parameters:
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        if p.kind is p.KEYWORD_ONLY and "*" not in [text[:1] for text in given]:
            given.append("*")
        given.append(f"{star}{p.name}" + (f"=_defaults[{p.name!r}]" if p.default is not p.empty else ""))
        if p.default is not p.empty:
            defaults[p.name] = p.default
        if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD):
            named.append(f"**{p.name}" if star else f"{p.name!r}: {p.name}")
        else:
            taken.append(f"{star}{p.name}")
    positional = ", ".join([*taken, ""]) if taken else ""
    text = (
        f"def forward(self, {', '.join(given)}):\n    return _forward(self, ({positional}), {{{', '.join(named)}}})\n"
    )
    scope: dict[str, Any] = {"_forward": _forward, "_defaults": defaults}
    exec(text, scope)
    made: Callable[..., Any] = scope["forward"]
    return made


@lru_cache(maxsize=1024)
def _defaults(original: Any) -> tuple[Any, ...]:
    """Of its positional arguments, in order; no default: a value that nothing is."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    return tuple(p.default for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _forward(self: Any, args: Any, kwargs: Any) -> Any:
    found = _ready(self, args, kwargs)
    if isinstance(found, tuple):
        return found[0].run(found[1])
    if found:
        _say(self, found)
    return type(self)._csp_original.forward(self, *args, **kwargs)


def _ready(self: Any, args: Any, kwargs: Any) -> tuple[Bound, list[Tensor]] | str:
    """The plan and its inputs; or why forward runs as it was, "" if that is no news."""
    if torch.compiler.is_compiling() or kwargs or selected() == "reference" or transforming():
        return ""
    known = _defaults(type(self)._csp_original)
    while args and len(args) <= len(known) and args[-1] is known[len(args) - 1]:
        args = args[:-1]
    if not args:
        return ""
    inputs: list[Any] = []
    _collect(args, inputs)
    if not inputs or recorded(inputs[0]) or not _fit(inputs):
        return ""
    spec = _spec(args, (max(x.shape[2] for x in inputs), max(x.shape[3] for x in inputs)))
    if spec is None:
        return ""
    bound = _bound(self, spec.items)
    if isinstance(bound, str):
        return "" if type(self)._csp_inside.parts else bound
    return bound.differs() or (bound, inputs)


_PLAIN = (Tensor, nn.Parameter)
_CONSTANTS = (bool, int, float, str, type(None))


def _collect(arg: Any, inputs: list[Any]) -> None:
    """The tensors among arguments."""
    if isinstance(arg, Tensor):
        inputs.append(arg)
    elif isinstance(arg, (list, tuple)):
        for item in arg:
            _collect(item, inputs)


def _fit(inputs: Sequence[Any]) -> bool:
    """Whether these are what kernels run; whatever else is wrong the forward itself says."""
    if any(type(x) not in _PLAIN or x.dim() != 4 for x in inputs):
        return False
    first = inputs[0]
    if first.dtype not in ACCUMULATE or first.numel() == 0 or not (first.is_cpu or selected() != "auto"):
        return False
    return all(
        x.dtype == first.dtype
        and x.device == first.device
        and x.layout == torch.strided
        and x.shape[0] == first.shape[0]
        for x in inputs
    )


def _spec(arg: Any, largest: tuple[int, int]) -> Any:
    """What a trace is to be made with for such an argument; largest: height and width. None: that is not known."""
    if isinstance(arg, Tensor):
        for halved in range(7):
            pairs = zip(largest, arg.shape[2:], strict=True)
            if all(-(-n >> halved) >= m >= n >> halved and m > 0 for n, m in pairs):
                return Channels(arg.shape[1], halved)
        return None
    if type(arg) in (list, tuple):
        items = tuple(_spec(item, largest) for item in arg)
        return None if any(item is None for item in items) else Several(type(arg), items)
    return Constant(type(arg), arg) if type(arg) in _CONSTANTS else None


@constant_when_traced
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def _say(module: nn.Module, reason: str) -> None:
    """Each reason once a module."""
    state: State = module.__dict__[STATE]
    if reason not in state.said:
        state.said.add(reason)
        how = "part by part" if type(module)._csp_inside.parts else "as it was before"  # type: ignore[attr-defined]
        _warn(f"csp.fuse: a {type(module).__name__} runs {how}: {reason}")
