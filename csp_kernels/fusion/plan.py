"""What a fused module runs instead of its forward, and as long as which of its attributes are what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from csp_kernels import ops
from csp_kernels.fusion.cut import Region
from csp_kernels.fusion.leaves import NUMBERS
from csp_kernels.fusion.trace import STATE, Operation, Trace, Value, own_attributes
from csp_kernels.layers._children import hooked_globally, why_touched
from csp_kernels.layers._norms import consecutive, frozen_norms, parameters, update_running
from csp_kernels.ops.stage import stage_sizes
from csp_kernels.stage.cost import side
from csp_kernels.stage.graph import Graph

_SIMPLE = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Guard:
    """What a module was when it was traced. numbers: attributes that may matter; children: what `_modules` held, by
    name; None: they do not matter. called: its forward ran, or would have run."""

    path: str
    kind: type
    forward: Any  # of its class
    numbers: tuple[tuple[str, Any], ...]
    children: tuple[str, ...] | None
    called: bool
    bias: bool | None  # of a convolution
    weight: torch.Size | None  # of the known kinds, its shape
    attributes: int | None = None  # how many it had; None: that is no matter


@dataclass(frozen=True)
class Plan:
    """steps: regions, and operations that are done as they are, in an order in which they can be."""

    steps: tuple[Region | Operation, ...]
    values: int
    inputs: tuple[Any, ...]
    result: Any
    guards: tuple[Guard, ...]
    given: tuple[int, ...]  # the values of the tensors among the inputs

    @property
    def regions(self) -> list[Region]:
        return [step for step in self.steps if isinstance(step, Region)]


def plan_of(root: nn.Module, trace: Trace, regions: Sequence[Region]) -> Plan:
    inside = {i for region in regions for i in region.operations}
    rest = [(i, op) for i, op in enumerate(trace.operations) if i not in inside]
    waiting: list[tuple[int, Region | Operation]] = [*((min(r.operations), r) for r in regions), *rest]
    waiting.sort(key=lambda pair: pair[0])
    flat = [leaf.number for leaf in tree_flatten(trace.inputs)[0] if isinstance(leaf, Value)]
    there, steps = set(flat), list[Region | Operation]()
    while waiting:  # the first whose inputs are there
        pair = next(pair for pair in waiting if there.issuperset(pair[1].inputs))
        waiting.remove(pair)
        steps.append(pair[1])
        there.update(pair[1].outputs)
    guards = tuple(_guards(root, trace))
    return Plan(tuple(_useful(trace, steps)), len(trace.shapes), trace.inputs, trace.result, guards, tuple(flat))


def _useful(trace: Trace, steps: Sequence[Region | Operation]) -> list[Region | Operation]:
    """Without slices and concatenations that only regions would have read."""
    needed = {leaf.number for leaf in tree_flatten(trace.result)[0] if isinstance(leaf, Value)}
    kept = []
    for step in reversed(steps):
        if isinstance(step, Region) or step.kind == "call" or step.path or needed.intersection(step.outputs):
            kept.append(step)
            needed.update(step.inputs)
    return kept[::-1]


def _guards(root: nn.Module, trace: Trace) -> list[Guard]:
    modules = dict(root.named_modules(remove_duplicate=False))
    called = {op.path for op in trace.operations if op.kind == "call" and op.path}
    apart = tuple(f"{path}." for path in called)  # what is in them is theirs
    paths = {path for path in modules if not path.startswith(apart)} if apart else set(modules)
    for path in list(paths):
        while path:
            path = path.rpartition(".")[0]
            paths.add(path)
    return [_guard(path, modules[path], trace) for path in sorted(paths)]


def _guard(path: str, module: nn.Module, trace: Trace) -> Guard:
    called = path in trace.modules
    descended = path in trace.descended or not called  # or its forward may have been asked otherwise
    own = module.__dict__
    if descended:
        names = list(own_attributes(module))
    else:
        names = [name for name in NUMBERS if name in own]
    numbers = tuple((name, _simple(own[name])) for name in names)
    inner = descended or not called
    children, weight = tuple(module._modules) if inner else None, module._parameters.get("weight")
    return Guard(
        path, _class_of(module), _forward_of(module), numbers, children, called and path in _known(trace),
        module._parameters.get("bias") is not None if isinstance(module, nn.Conv2d) else None,
        None if descended or weight is None else weight.shape,
        _attributes(module) if descended else None,
    )  # fmt: skip


def _class_of(module: nn.Module) -> Any:
    """Of a fused module that which it had."""
    cls = type(module)
    return getattr(cls, "_csp_original", cls)


def _forward_of(module: nn.Module) -> Any:
    return _class_of(module).forward


def _known(trace: Trace) -> set[str]:
    """Modules that are not called: by a region, or because their forward was traced."""
    own = {op.path for op in trace.operations if op.kind != "call"}
    return trace.descended | own | {f"{path}.act" for path in own}  # of a norm that applies an activation


class _Content(tuple[Any, ...]):
    """What an attribute holds that may change and stay the same object."""


def _simple(value: Any, depth: int = 6) -> Any:
    """Lists, dictionaries and objects by what they hold, others as they are: also tuples of what cannot change. A
    tensor as one: a forward that looks into it, or computes with it, is not traced."""
    if type(value) is Tensor:
        return _Content((Tensor,))
    if type(value) is tuple and all(type(item) in _SIMPLE for item in value):
        return value
    if depth and isinstance(value, (list, tuple, set)):
        return _Content((type(value), *(_typed(_simple(item, depth - 1)) for item in value)))
    if depth and isinstance(value, dict):
        return _Content((dict, *((_typed(key), _typed(_simple(item, depth - 1))) for key, item in value.items())))
    known = (nn.Module, Tensor, type, FunctionType, BuiltinFunctionType, MethodType, *_SIMPLE)
    if depth and hasattr(value, "__dict__") and not isinstance(value, known):
        items = vars(value).items()
        return _Content((type(value), *((key, _typed(_simple(item, depth - 1))) for key, item in items)))
    return value


def _typed(value: Any) -> Any:
    """Not equal to the same number of another type: True is not 1, nor is (True,) (1,)."""
    if type(value) is tuple:
        return (*map(type, value), value)
    return (type(value), value) if type(value) in (bool, float) else value


class Bound:
    """A plan with the modules of one owner."""

    def __init__(self, owner: nn.Module, plan: Plan) -> None:
        self.plan, self.result = plan, _filler(plan.result)
        modules = dict(owner.named_modules(remove_duplicate=False))
        self.guarded: list[tuple[Guard, nn.Module, list[tuple[str, Any]]]] = [
            (guard, modules[guard.path], [(n, modules[guard.path]._modules[n]) for n in guard.children or ()])
            for guard in plan.guards
        ]
        self.steps = [
            _Stage(step, [modules[path] for path in step.holders])
            if isinstance(step, Region)
            else _Call(step, modules[step.call[0]] if isinstance(step.call[0], str) else step.call[0])
            for step in plan.steps
        ]

    def differs(self) -> str:
        """Why the plan is not what forward would do now; "" if it is."""
        if reason := hooked_globally():
            return reason
        for guard, module, children in self.guarded:
            own, path = module.__dict__, guard.path
            if path and _class_of(module) is not guard.kind:
                return f"{path} is a {type(module).__name__} now"
            if _forward_of(module) is not guard.forward:
                return f"the forward of {type(module).__name__} is another one now"
            if path and guard.called and (why := why_touched(module)):
                return f"{path} {why}"
            for name, number in guard.numbers:
                now = own.get(name, _MISSING)
                if now is not number and not _equal(now, number):
                    return f"{path or 'it'} has another {name} than when it was fused"
            if guard.attributes is not None and _attributes(module) != guard.attributes:
                return f"{path or 'it'} has other attributes than when it was fused"
            weight = module._parameters.get("weight")
            if guard.weight is not None and weight is not None and weight.shape != guard.weight:
                return f"{path} has a weight of another shape"
            if guard.bias is not None and (module._parameters.get("bias") is not None) != guard.bias:
                return f"{path} has {'no' if guard.bias else 'a'} bias now"
            if guard.children is not None:
                held = module._modules
                if len(held) != len(children) or any(held.get(name) is not child for name, child in children):
                    return f"{path or 'it'} has other children than when it was fused"
        return ""

    def run(self, inputs: Sequence[Tensor]) -> Any:
        values: list[Any] = [None] * self.plan.values
        for number, x in zip(self.plan.given, inputs, strict=True):
            values[number] = x
        for step in self.steps:
            step.run(values)
        return self.result(values)


def is_of_now(owner: nn.Module, plan: Plan) -> bool:
    """Whether a plan is what its owner's forward would do now."""
    try:
        return not Bound(owner, plan).differs()
    except (KeyError, AttributeError):
        return False  # children are gone


def _attributes(module: nn.Module) -> int:
    """How many the instance has: one more may hide one of its class."""
    own = module.__dict__
    return len(own) - (STATE in own)


_MISSING = object()


def _equal(now: Any, number: Any) -> bool:
    if isinstance(number, _Content):
        return bool(_simple(now) == number)
    same = type(now) is type(number) and isinstance(now, (*_SIMPLE, tuple)) and bool(now == number)
    return same and (type(now) is not tuple or [*map(type, now)] == [*map(type, number)])


_Filler = Callable[[Sequence[Any]], Any]


def _filler(tree: Any) -> _Filler:
    """What makes of all values the tree with those in the places of its `Value`s."""
    if isinstance(tree, Value):
        return itemgetter(tree.number)
    if type(tree) is tuple:
        fillers = [_filler(item) for item in tree]
        if len(fillers) == 1:
            return lambda values: (fillers[0](values),)
        return lambda values: tuple([fill(values) for fill in fillers])
    if type(tree) in _SIMPLE:
        return lambda values: tree
    return lambda values: tree_map(lambda leaf: values[leaf.number] if isinstance(leaf, Value) else leaf, tree)


class _Call:
    def __init__(self, op: Operation, target: Callable[..., Any]) -> None:
        self.op, self.target = op, target
        _, args, kwargs = op.call
        self.args, self.kwargs = _filler(args), _filler(kwargs) if kwargs else None

    def run(self, values: list[Any]) -> None:
        if self.kwargs is None:
            result = self.target(*self.args(values))
        else:
            result = self.target(*self.args(values), **self.kwargs(values))
        if self.op.result is None or isinstance(self.op.result, Value):
            values[self.op.outputs[0]] = result
            return
        for number, made in zip(self.op.outputs, tree_flatten(result)[0], strict=True):
            values[number] = made


class _Stage:
    """A region. holders: modules with the parameters of its graph, in its order."""

    def __init__(self, region: Region, holders: Sequence[Any]) -> None:
        self.region, self.holders = region, holders
        graph = region.graph
        norms = {item.index: m for item, m in zip(graph.order, holders, strict=True) if item.kind == "norm"}
        self.norms = [norms[i] for i in range(len(norms))]
        convs = [m for item, m in zip(graph.order, holders, strict=True) if item.kind == "conv"]
        self.alone = convs[0] if len(convs) == 1 else None

    def run(self, values: list[Any]) -> None:
        graph, inputs = self.region.graph, [values[v] for v in self.region.inputs]
        if self.alone is not None and not self.alone.weight.is_contiguous():
            # What a convolution with channels_last weights gives is channels_last for NCHW images too, and so would be
            # all behind it; what a stage gives is as its input.
            inputs = [x.contiguous(memory_format=torch.channels_last) if x.is_contiguous() else x for x in inputs]
        frozen, running = frozen_norms(self.norms)
        eps = [norm.eps for norm in self.norms]
        outputs, stats = ops.stage(graph, inputs, parameters(self.holders), running, frozen=frozen, eps=eps)
        if not all(frozen):
            self.advance(graph, stats, inputs[0])
        for number, y in zip(self.region.outputs, outputs, strict=True):
            values[number] = y

    def advance(self, graph: Graph, stats: Tensor, x: Tensor) -> None:
        n, _, height, width = x.shape
        counts = [(n * side(size, height) * side(size, width), 1) for _, size in stage_sizes(graph)[1]]
        update_running(self.norms, consecutive(self.norms), stats, counts)
