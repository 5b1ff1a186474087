"""csp.fuse: puts plans into the place of forwards, by the class of the modules alone."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from csp_kernels._tracing import constant_when_traced
from csp_kernels.backends import selected
from csp_kernels.fusion.cut import Region, cut
from csp_kernels.fusion.leaves import activation_of, is_conv, is_norm, is_norm_act
from csp_kernels.fusion.plan import Bound, Plan, plan_of
from csp_kernels.fusion.report import Left, Report, Row
from csp_kernels.fusion.symbols import Untraceable, is_image
from csp_kernels.fusion.trace import SIZE, STATE, Channels, Constant, Several, Trace, modes, trace
from csp_kernels.layers._children import Fused as CspLayer
from csp_kernels.layers._children import recorded
from csp_kernels.ops._checks import ACCUMULATE
from csp_kernels.ops._packed import forget
from csp_kernels.ops._transforms import transforming

MOST = 128  # convolutions of a module that is fused as a whole
OF_A_BLOCK = 5  # convolutions of what is fused across children that it only calls


def fuse(model: nn.Module) -> Report:
    """Let the operators run what they can of a network, in place; it stays the network that it was.

    Modules, parameters, state_dict, hooks, optimizers, pickles and deep copies of the model stay; `isinstance` sees the
    classes that were there. What is fused is found by what forwards do, not by names: they are traced. A forward that
    could do something else with another input is left alone, and a fused one runs as it was where its attributes, its
    children or their hooks have changed since, with a warning that says which. So it does under torch.compile,
    torch.jit.trace, torch.fx and the exporters. Weights of convolutions become channels_last in place.
    A model that was fused before stays fused. Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    rows: list[Row] = []
    left: list[Left] = []
    with torch.enable_grad():
        _visit(model, "", rows, left, set())
    if rows:
        _to_channels_last(model)
    return Report(type(model).__name__, tuple(rows), tuple(left), _convolutions(model))


def unfuse(model: nn.Module) -> nn.Module:
    """The model as it was before csp.fuse; its weights keep their values and their memory format."""
    for module in model.modules():
        original = _original(module)
        if original is not None:
            _restore(module, original)
    _back_to_contiguous(model)
    return model


@contextmanager
def fused(model: nn.Module) -> Iterator[Report]:
    """csp.fuse inside the block, csp.unfuse behind it; a model that was fused before stays fused."""
    before = any(_original(module) is not None for module in model.modules())
    report = fuse(model)
    try:
        yield report
    finally:
        if not before:
            unfuse(model)


# --- which modules ---


def _visit(
    module: nn.Module, path: str, rows: list[Row], left: list[Left], seen: set[int], halved: int = 0
) -> None:  # fmt: skip
    """Fuses a module as a whole, or what is in it; halved: how often its images are, as far as is known."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, (CspLayer, torch.jit.ScriptModule)):
        return
    convs = _convolutions(module)
    if convs == 0 or is_conv(module):
        return
    known = _original(module)
    if known is not None:
        plans = [plan for plan in type(module)._csp_plans.values() if isinstance(plan, Plan)]  # type: ignore[attr-defined]
        rows.append(Row(path, known.__name__, tuple(plans[0].regions) if plans else (), halved))
        _visit_inside(module, path, rows, left, seen, halved)
        return
    reason = _why_not_here(module, convs)
    if not reason:
        made = _traced(module)
        if isinstance(made, str):
            reason = made
        elif made.regions:
            inside = _Inside(_not_traced(made.trace), convs > OF_A_BLOCK and _assembles(module, made.trace))
            _swap(module, {(_State(module).flags(), modes(), made.spec): made.plan}, inside)
            rows.append(Row(path, type(module).__mro__[1].__name__, tuple(made.regions), halved))
            left += [Left(path, why) for why in made.reasons]
            _visit_inside(module, path, rows, left, seen, halved)
            return
        else:
            reason = "; ".join(made.reasons) or "nothing in it is a stage"
    before = len(rows)
    for name, child in module.named_children():
        _visit(child, f"{path}.{name}" if path else name, rows, left, seen, halved)
    deeper = any(_convolutions(child) for child in module.children() if not is_conv(child))
    if len(rows) == before and (not deeper or reason != "it only calls its children"):
        left.append(Left(path, reason))


def _visit_inside(
    module: nn.Module, path: str, rows: list[Row], left: list[Left], seen: set[int], halved: int
) -> None:  # fmt: skip
    inside: _Inside = type(module)._csp_inside  # type: ignore[attr-defined]
    for name, less in inside.called:
        _visit(module.get_submodule(name), f"{path}.{name}" if path else name, rows, left, seen, halved + less)
    for child in module.children() if inside.parts else ():
        _visit(child, path, [], [], seen)


def _why_not_here(module: nn.Module, convs: int) -> str:
    """Why a module is not to be fused as a whole, though its children may be; "" if it may be."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if type(module).forward is nn.Module.forward:  # a list of modules
        return "it only calls its children"
    if convs > MOST:
        return f"it has {convs} convolutions"
    if type(module).forward is nn.Sequential.forward:
        children = list(module.children())
        inner = [child for child in children if not _is_leaf(child)]
        if inner and convs > OF_A_BLOCK and any(_is_leaf(child) and _convolutions(child) for child in children):
            return "it only calls its children"
        if any(_convolutions(child) > OF_A_BLOCK for child in inner):
            return "it only calls its children"
    elif any(_convolutions(child) and not _is_leaf(child) for child in module.children()):
        found = _traced(module, regions=False)
        if isinstance(found, str):
            return found
        whole = convs <= OF_A_BLOCK or _joins(module, found.trace) or _assembles(module, found.trace)
        return "" if whole else "it only calls its children"
    return ""


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules or is_norm(module) or is_norm_act(module) or activation_of(module) is not None


def _convolutions(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in module.modules())


def _joins(module: nn.Module, found: Trace) -> bool:
    """Whether its own forward concatenates, adds or cuts, or that of a child which cannot be fused by itself."""
    frames = {op.frame for op in found.operations if op.kind in ("cat", "add", "slice")}
    children = [frame for frame in frames if frame and "." not in frame]
    return "" in frames or any(isinstance(_traced(module.get_submodule(f), regions=False), str) for f in children)


def _assembles(module: nn.Module, found: Trace) -> bool:
    """Whether its own forward calls modules that do nothing but join what others give, as a YOLO's does: what makes and
    what reads that is its other children. It is fused as a whole, and so are they, for where its forward cannot be
    traced (a YOLO's in evaluation) or somebody watches one of them."""
    joins = {op.frame for op in found.operations if op.kind in ("cat", "add", "slice") and op.frame}
    return any(not _convolutions(module.get_submodule(f)) and not _callers(f, found.descended) for f in joins)


def _callers(path: str, descended: set[str]) -> list[str]:
    """The modules that a module is in whose forwards were traced."""
    return [above for above in descended if above and path.startswith(f"{above}.")]


def _channels(module: nn.Module) -> int:
    """Those that its first convolution or norm takes; 0: it has none."""
    for m in module.modules():
        if is_conv(m):
            return int(m.in_channels)  # type: ignore[arg-type]
        if is_norm(m):
            return int(m.num_features)  # type: ignore[arg-type]
    return 0


class _Traced(NamedTuple):
    """reasons: why other convolutions are in no region. spec: what it was traced with."""

    plan: Plan
    regions: list[Region]
    reasons: list[str]
    trace: Trace
    spec: tuple[Any, ...]


def _traced(module: nn.Module, regions: bool = True, given: Any = None) -> str | _Traced:
    """The plan with its regions, what else there is to say, and the trace; or why there is none. given: what to trace
    it with; None: what it might take."""
    reasons = []
    for inputs in _guesses(module) if given is None else [given]:
        try:
            found = trace(module, inputs)
        except Untraceable as error:
            reasons.append(str(error))
            continue
        made, why = cut(found) if regions else ([], [])
        return _Traced(plan_of(module, found, made), made, why, found, inputs)
    return reasons[0] if reasons else "it has no convolution to begin with"


def _guesses(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs that it might take: an image, or lists and several images whose channels add up."""
    first = _channels(module)
    if not first:
        return
    yield (Channels(first),)
    for count in (2, 3, 4, 5, 6):
        if first % count == 0:
            several = (Channels(first // count),) * count
            yield (Several(list, several),)
            yield several


def _not_traced(found: Trace) -> tuple[tuple[str, int], ...]:
    """Children that are called as they are: there may be something to fuse inside them. With how often the largest of
    the images that they are called with is halved as against those of the forward."""
    sizes: dict[str, list[int]] = {}
    for op in found.operations:
        if op.kind == "call" and op.path:
            heights = [found.shapes[v][2] for v in op.inputs if is_image(found.shapes[v])]
            sizes[op.path] = [*sizes.get(op.path, []), *heights]
    return tuple((path, (SIZE[0] // max(found, default=SIZE[0])).bit_length() - 1) for path, found in sizes.items())


# --- the class ---

_SET = object.__dict__["__class__"].__set__
_CONVERTED: Any = WeakIdKeyDictionary()  # convolutions whose weights were contiguous before they were channels_last
_LOCK = threading.RLock()


class _Inside(NamedTuple):
    """What of a fused module is fused, too. called: children that its plan calls, and how often their images are
    halved; parts: all others, for calls that it has no plan for."""

    called: tuple[tuple[str, int], ...] = ()
    parts: bool = False


class _State:
    """Of one fused module: its modules that may be in training mode or not, and the plan for each such case."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module  # a shallow copy has the state of another one
        self.switched = list(module.modules())
        self.bound: dict[Any, Bound | str] = {}  # by flags and arguments
        self.said: set[str] = set()

    def flags(self) -> tuple[bool, ...]:
        return tuple([m.training for m in self.switched])


def _original(module: nn.Module) -> type[nn.Module] | None:
    """The class that csp.fuse found; None for a module that it has not changed."""
    found: type[nn.Module] | None = type(module).__dict__.get("_csp_original")
    return found


def _swap(module: nn.Module, plans: dict[Any, Plan | str], inside: _Inside) -> None:
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
    original: Any = _original(self)
    inside = type(self)._csp_inside  # type: ignore[attr-defined]
    _restore(self, cls)
    if cls.forward is original.forward:
        _swap(self, {}, inside)


def _restore(module: nn.Module, original: type[nn.Module]) -> None:
    _SET(module, original)
    module.__dict__.pop(STATE, None)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """As the original: whoever loads it needs nothing of this package."""
    cls, original = type(self), _original(self)
    reduced: Any = super(cls, self).__reduce_ex__(protocol)
    function, arguments, *rest = reduced
    arguments = tuple(original if item is cls else item for item in arguments)
    if rest and isinstance(rest[0], dict):
        rest[0] = {name: value for name, value in rest[0].items() if name != STATE}
    return (function, arguments, *rest)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """By what the original says of copies; they are fused too."""
    cls, original = type(self), _original(self)
    own: Any = getattr(original, "__deepcopy__", None)
    made: Any = own(self, memo) if own else copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]
    if type(made) in (original, cls):
        made.__dict__.pop(STATE, None)
        _SET(made, cls)
    return made


def _train(self: Any, mode: bool = True) -> Any:
    forget(self.parameters())
    return type(self)._csp_original.train(self, mode)


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """Of .to() and its kind, which may swap weights: nothing that is kept of them may refer to them."""
    forget(self.parameters())
    return type(self)._csp_original._apply(self, fn, recurse)


MOST_CALLS = 16  # kinds of arguments for which one module has plans


def _bound(module: nn.Module, spec: Any) -> Bound | str:
    """The plan for the present training flags and such arguments, with the modules."""
    state: _State | None = module.__dict__.get(STATE)
    if state is None or state.module is not module:
        state = module.__dict__[STATE] = _State(module)
    key = state.flags(), modes(), spec
    found = state.bound.get(key)
    if found is None:
        plans: dict[Any, Plan | str] = type(module)._csp_plans  # type: ignore[attr-defined]
        with _LOCK:
            if key not in plans:
                made = "" if len(plans) >= MOST_CALLS else _traced(module, given=spec)
                plans[key] = made if isinstance(made, str) else made.plan
        plan = plans[key]
        try:
            found = state.bound[key] = plan if isinstance(plan, str) else Bound(module, plan)
        except (KeyError, AttributeError):
            return "it has other children than when it was fused"
    return found


_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def _to_channels_last(model: nn.Module) -> None:
    """Weights of convolutions: what they give is channels_last then, whatever the images are. Not where they, or their
    gradients, lie in buffers that a wrapper has laid out already."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if classes & _WRAPPERS:
        return
    for module in model.modules():
        weight = module._parameters.get("weight") if is_conv(module) else None
        if type(weight) is nn.Parameter and not weight.is_contiguous(memory_format=torch.channels_last):
            if weight.is_contiguous():
                _CONVERTED[module] = True  # not the weight, which could not be swapped if it had weak references
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _back_to_contiguous(model: nn.Module) -> None:
    for module in model.modules():
        weight = module._parameters.get("weight") if _CONVERTED.pop(module, False) else None
        if weight is not None:
            weight.data = weight.data.contiguous()


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
    state: _State = module.__dict__[STATE]
    if reason not in state.said:
        state.said.add(reason)
        how = "part by part" if type(module)._csp_inside.parts else "as it was before"  # type: ignore[attr-defined]
        _warn(f"csp.fuse: a {type(module).__name__} runs {how}: {reason}")
