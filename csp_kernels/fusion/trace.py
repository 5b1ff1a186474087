"""What a module's forward does, as a list of operations: it runs once, on symbols that stand for tensors.

A symbol knows its shape, but shows the forward its channels alone: what asks for more (a condition on a size, a value)
cannot be traced, since it might do something else with another input. Children that cannot be traced are one operation.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from csp_kernels.fusion import functions, leaves
from csp_kernels.fusion.symbols import Dim, Symbol, Untraceable, has_symbols
from csp_kernels.layers._children import why_touched

SIZE = 256, 320  # of the images that symbols stand for: no map of a network is 1 x 1 or square by chance
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """An image among the arguments of a forward: its channels, and how often it is halved as against the largest."""

    count: int
    halved: int = 0


@dataclass(frozen=True)
class Constant:
    """An argument that is no tensor: True is not 1."""

    kind: type
    value: Any


@dataclass(frozen=True)
class Several:
    """A list or a tuple among the arguments of a forward."""

    kind: type
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Value:
    """Stands for a symbol among the arguments of an operation."""

    number: int


@dataclass(frozen=True)
class Operation:
    """kind: "conv", "norm", "act", "add", "cat", "slice", "max_pool", "avg_pool", "dropout"; "call": anything else.

    inputs, outputs: numbers of values. options: what its kind needs. path: of the module that is called; "" for a
    function. call: path or function, with arguments that contain `Value`s: how to do it without kernels. frame: path of
    the module whose forward does it.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]
    path: str
    frame: str
    call: tuple[Any, Any, Any]  # module path or function, positional arguments, named arguments
    result: Any = None  # of a "call": the structure of what it returns, with `Value`s
    fresh: bool = False  # of a "call": what it returns shares no memory with what it was given


@dataclass
class Trace:
    """inputs: values of the arguments. result: what forward returns, with `Value`s. modules: those that were called, by
    path; descended: those whose forward was traced. left: why that of others was not."""

    operations: list[Operation] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    inputs: tuple[Any, ...] = ()
    result: Any = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    descended: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)


_LOCK = threading.RLock()
_NEW = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.Linear,
)  # their results are their own


def trace(module: nn.Module, channels: Sequence[Any]) -> Trace:
    """Of module(*inputs); channels: for each, a `Channels`, or `Several`; anything else is passed on as it is.

    Raises Untraceable.
    """
    with _LOCK:
        tracer = Tracer(module)
        inputs = [tracer.arguments(c) for c in channels]
        given = tuple(tracer.as_values(x) for x in inputs)
        before = _random_states()
        with tracer.patched(), _Strangers(tracer):
            result = tracer.descend(module, "", tuple(inputs), {})
        if _random_states() != before:
            raise Untraceable("it draws random numbers")
        found = tracer.trace
        if tuple(tracer.as_values(x) for x in inputs) != given:
            raise Untraceable("it changes a list that it is given")
        tracer.check_result(result)
        found.inputs = given
        found.result = tracer.as_values(result)
        return found


def _random_states() -> tuple[object, ...]:
    """Of the generators that a forward might ask: what it does would differ from call to call."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()
    return (
        random.getstate(),
        *(item.tobytes() if hasattr(item, "tobytes") else item for item in drawn),
        (torch.get_rng_state().numpy().tobytes()),
    )


class _Strangers(TorchFunctionMode):
    """Refuses functions of tensors that a trace knows nothing of: values of parameters and buffers, new tensors."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.tracer.aside and not has_symbols((args, kwargs)):
            name = getattr(func, "__self__", func) if getattr(func, "__name__", "") == "__get__" else func
            raise Untraceable(f"it looks at tensors of its own, or makes some: {getattr(name, '__name__', name)}")
        return func(*args, **(kwargs or {}))


_CONTAINERS = (list, dict, set)


def _same(a: Any, b: Any) -> bool:
    """The same items, in the same order."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and (isinstance(a, set) or all(x is y for x, y in zip(a, b, strict=True)))


def modes() -> tuple[bool, ...]:
    """What of PyTorch's state of a thread decides what operations do."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class Tracer:
    def __init__(self, root: nn.Module) -> None:
        self.trace = Trace()
        self.paths = {id(m): name for name, m in reversed(list(root.named_modules()))}
        self.frames: list[str] = []
        self.undo: list[tuple[Symbol, int]] = []
        self.given: set[int] = set()  # values that forward was given: not its own to change
        self.root, self.aside = root, False  # aside: what is called now belongs to no trace
        self.modes = modes()
        self.unsure: set[int] = set()  # values of which a symbol may be a copy, or may not

    def arguments(self, channels: Any) -> Any:
        if isinstance(channels, Channels):
            symbol = self.symbol((2, channels.count, *(n >> channels.halved for n in SIZE)))
            self.given.add(symbol.number)
            return symbol
        if isinstance(channels, Constant):
            return channels.value
        if isinstance(channels, Several):
            return channels.kind([self.arguments(c) for c in channels.items])
        return channels

    def symbol(self, shape: Sequence[int]) -> Symbol:
        self.trace.shapes.append(tuple(shape))
        return Symbol.of(self, len(self.trace.shapes) - 1)

    def shape(self, symbol: Symbol) -> Shape:
        return self.trace.shapes[symbol.number]

    def as_values(self, tree: Any) -> Any:
        """With `Value`s for symbols; Untraceable where the rest could not be said again later."""
        leaves_, spec = tree_flatten(tree)
        for leaf in leaves_:
            if isinstance(leaf, Dim):
                raise Untraceable("a size of its input goes into an operation")
            if isinstance(leaf, Tensor) and not isinstance(leaf, Symbol):
                raise Untraceable("it computes with a tensor that is no module's parameter of a known kind")
        made = [Value(leaf.number) if isinstance(leaf, Symbol) else leaf for leaf in leaves_]
        return tree_unflatten(made, spec)

    # --- operations ---

    def record(
        self, kind: str, inputs: Sequence[Symbol], shapes: Sequence[Shape], call: tuple[Any, Any, Any], path: str = "",
        **options: Any,
    ) -> list[Symbol]:  # fmt: skip
        """One more operation; a symbol for each shape that it gives."""
        if modes() != self.modes:
            raise Untraceable("it switches gradients or autocast on or off")
        outputs = [self.symbol(shape) for shape in shapes]
        target, args, kwargs = call
        known = target, self.as_values(args), self.as_values(kwargs)
        numbers = tuple(s.number for s in inputs), tuple(s.number for s in outputs)
        self.trace.operations.append(Operation(kind, *numbers, options, path, self.frames[-1], known))
        return outputs

    def opaque(self, target: Any, args: Any, kwargs: Any, run: Callable[..., Any], path: str = "") -> Any:
        """A call that is done as it is; run: on meta tensors, for the shapes of what it returns."""

        made: list[Tensor] = []

        def meta(x: Any) -> Any:
            if not isinstance(x, Symbol):
                return x
            with torch.inference_mode(False):  # inference tensors have no version
                made.append(torch.empty(self.shape(x), device="meta"))
            return made[-1]

        self.aside = True
        try:
            with torch.no_grad():  # or hooks of saved tensors, a checkpoint's, would see what autograd saves here
                found = run(*tree_map(meta, args), **tree_map(meta, kwargs))
            changed = any(t._version for t in made)
            tensors = tree_flatten(found)[0]
            known = bool(tensors) and all(isinstance(t, Tensor) and t.is_meta for t in tensors)
            shapes = [tuple(t.shape) for t in tensors] if known else []
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        finally:
            self.aside = False
        if changed:
            raise Untraceable(f"{path or getattr(target, '__name__', target)} changes its input in place")
        spec = tree_flatten(found)[1]
        if not known:
            raise Untraceable(f"{path or getattr(target, '__name__', target)} returns something else than tensors")
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Symbol)]
        symbols = self.record("call", inputs, shapes, (target, args, kwargs), path)
        result = tree_unflatten(symbols, spec)
        last = self.trace.operations[-1]
        fresh = getattr(target, "__name__", "") in _FRESH or isinstance(self.trace.modules.get(path), _NEW)
        self.trace.operations[-1] = replace(last, result=self.as_values(result), fresh=fresh)
        return result

    def in_place(self, symbol: Symbol, result: Symbol) -> Symbol:
        """From now on the symbol is what the operation made of it."""
        old = symbol.number
        if old in self.unsure:
            raise Untraceable("it changes in place what may be a copy, or may not")
        if old in self.given:
            raise Untraceable("it changes its input in place")
        if any(old in op.inputs or (old in op.outputs and not _is_fresh(op)) for op in self.trace.operations[:-1]):
            raise Untraceable("it changes in place what was read before, or may share memory with something else")
        self.undo.append((symbol, old))
        symbol.number = result.number
        return symbol

    # --- modules ---

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Calls of modules come here, in this thread."""
        original, thread = nn.Module.__call__, threading.get_ident()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.aside or threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            return self.call(module, args, kwargs)

        apply = torch.autograd.Function.__dict__["apply"]

        def refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if self.aside or threading.get_ident() != thread:
                return apply.__get__(None, cls)(*args, **kwargs)
            raise Untraceable(f"it applies {cls.__name__}, which has a backward of its own")

        nn.Module.__call__ = call  # type: ignore[method-assign]
        torch.autograd.Function.apply = classmethod(refuse)
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if path is None:
            raise Untraceable(f"it calls a {type(module).__name__} that is none of its children")
        if not any(isinstance(x, Symbol) for x in tree_flatten((args, kwargs))[0]):
            raise Untraceable(f"{path} is called with no tensor of the input")
        if type(module).__call__ is not nn.Module.__call__:
            raise Untraceable(f"{path} has a __call__ of its own")
        self.trace.modules[path] = module
        if why := why_touched(module):
            self.trace.left[path] = why
        else:
            found = leaves.operation(self, module, path, args, kwargs)
            if found is not NotImplemented:
                return found
            found = self.try_to_descend(module, path, args, kwargs)
            if found is not NotImplemented:
                return found
        if hooked := [name for name, inner in module.named_modules() if name and _is_watched(inner)]:
            raise Untraceable(f"{path}.{hooked[0]} has a forward hook")  # which would be called on meta tensors
        self.aside = True
        try:
            twin = on_meta(module)
        finally:
            self.aside = False
        # on meta tensors a SyncBatchNorm raises if processes are connected
        run = torch.empty_like if isinstance(module, nn.SyncBatchNorm) else twin.forward
        return self.opaque(path, args, kwargs, run, path)

    def try_to_descend(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        """NotImplemented, and nothing has happened, where that cannot be."""
        if not module._modules and not isinstance(module, nn.Sequential) and leaves.is_torchs_own(module):
            return NotImplemented
        before = len(self.trace.operations), len(self.trace.shapes), len(self.undo), len(self.frames)
        known = dict(self.trace.modules), set(self.trace.descended)
        try:
            return self.descend(module, path, args, kwargs)
        except Untraceable as error:
            self.trace.left[path] = str(error)
        except RecursionError:
            self.trace.left[path] = "its modules call each other in a circle"
        operations, shapes, undo, frames = before
        for symbol, number in reversed(self.undo[undo:]):
            symbol.number = number
        del self.trace.operations[operations:], self.trace.shapes[shapes:], self.undo[undo:], self.frames[frames:]
        self.trace.modules, self.trace.descended = known
        return NotImplemented

    def descend(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        before = own_attributes(module)
        held = {name: value.copy() for name, value in before.items() if isinstance(value, _CONTAINERS)}
        forward = getattr(type(module), "_csp_original", type(module)).forward
        if "forward" in module.__dict__:
            raise Untraceable("it has a forward of its own")
        self.frames.append(path)
        try:
            result = forward(module, *args, **kwargs)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        finally:
            after = own_attributes(module)
            for name in after.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
            changed = [name for name, content in held.items() if not _same(before[name], content)]
            for name in changed:
                before[name].clear()
                getattr(before[name], "extend" if isinstance(before[name], list) else "update")(held[name])
        if changed or after.keys() != before.keys() or any(after[name] is not value for name, value in before.items()):
            raise Untraceable("it changes attributes of its own")
        self.frames.pop()
        self.trace.modules[path] = module
        self.trace.descended.add(path)
        return result

    def check_result(self, result: Any) -> None:
        """What is returned shares memory with nothing else that is, as far as whoever called may know."""
        symbols = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Symbol)]
        numbers = {symbol.number for symbol in symbols}
        views = {op.outputs[0]: op.inputs[0] for op in self.trace.operations if not _is_fresh(op) and op.kind != "call"}
        if any(symbol.copied for symbol in symbols) or any(views.get(n) in numbers for n in numbers):
            raise Untraceable("it returns a copy of a tensor, or a tensor and a part of it")

    # --- functions ---

    def function(self, function: Any, args: Any, kwargs: Any) -> Any:
        found = functions.operation(self, function, args, kwargs)
        if found is not NotImplemented:
            return found
        name = getattr(function, "__name__", str(function))
        if functions.changes(name, kwargs):
            raise Untraceable(f"{name} changes a tensor in place")
        self.as_values((args, kwargs))
        return self.opaque(function, args, kwargs, function)


STATE = "_csp_state"  # of a fused module: an attribute that copies, pickles and comparisons leave out
_OF_EVERY_MODULE = frozenset({*nn.Module().__dict__, STATE})
_OF_WRAPPERS = "__composable_api_state_key"  # what fully_shard and the like keep of a module


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Those that nn.Module does not have itself."""
    own = {name: value for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE}
    return {name: value for name, value in own.items() if not name.startswith(_OF_WRAPPERS)}


_FRESH = ("mul", "__mul__", "sub", "div", "sigmoid", "interpolate", "conv2d", "linear", "adaptive_avg_pool2d")


def _is_fresh(op: Operation) -> bool:
    """Whether what it gives shares no memory with what it was given."""
    if op.kind != "call":
        return op.kind != "slice" and not (op.kind == "max_pool" and op.options["size"] == 1)
    return op.fresh


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without memory."""
    memo: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        made = torch.empty_like(t, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype)
        memo[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
    for m in module.modules():  # weights that hooks compute are attributes, and cannot be copied
        memo.update({id(v): v.detach().to("meta") for v in m.__dict__.values() if isinstance(v, Tensor)})
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise Untraceable(f"a {type(module).__name__} cannot be copied") from error
