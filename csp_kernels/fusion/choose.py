"""csp.fuse and csp.unfuse: which modules of a network are fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from csp_kernels.fusion.leaves import is_conv
from csp_kernels.fusion.make_plan import make_plan
from csp_kernels.fusion.plan import Plan, is_of_now
from csp_kernels.fusion.report import Left, Report, Row
from csp_kernels.fusion.swap import Inside, State, original_of, restore, swap
from csp_kernels.fusion.symbols import is_image
from csp_kernels.fusion.trace import SIZE, STATE, Trace, modes
from csp_kernels.layers._children import Fused as CspLayer

MOST = 512  # convolutions of a module that is fused as a whole
OF_A_BLOCK = 5  # convolutions of one whose children are not fused besides
LIST = "it only calls its children"


def fuse(model: nn.Module) -> Report:
    """Let the operators run what they can of a network, in place; it stays the network that it was.

    Modules, parameters, state_dict, hooks, optimizers, pickles and deep copies of the model stay; `isinstance` sees the
    classes that were there. What is fused is found by what forwards do, not by names: they are traced. A forward that
    could do something else with another input is left alone, and a fused one runs as it was where its attributes, its
    children or their hooks have changed since, with a warning that says which. So it does under torch.compile,
    torch.jit.trace, torch.fx and the exporters. Weights of convolutions become channels_last in place.
    A model that was fused before stays fused, and what has changed in it since is fused as it is now. Raises TypeError
    for what is no module.
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
        original = original_of(module)
        if original is not None:
            restore(module, original)
    _back_to_contiguous(model)
    return model


@contextmanager
def fused(model: nn.Module) -> Iterator[Report]:
    """csp.fuse inside the block, csp.unfuse behind it; a model that was fused before stays fused."""
    before = any(original_of(module) is not None for module in model.modules())
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
    known = original_of(module)
    if known is not None:
        plans = [plan for plan in type(module)._csp_plans.values() if isinstance(plan, Plan)]  # type: ignore[attr-defined]
        module.__dict__.pop(STATE, None)  # what is bound may be children that were replaced since
        if not plans or is_of_now(module, plans[0]):
            rows.append(Row(path, known.__name__, tuple(plans[0].regions) if plans else (), halved))
            _visit_inside(module, path, rows, left, seen, halved)
            return
        restore(module, known)  # it has changed since
    reason = _why_not_here(module, convs)
    if not reason:
        made = make_plan(module)
        if isinstance(made, str):
            reason = made
        elif made.regions:
            inside = Inside(_not_traced(made.trace), convs > OF_A_BLOCK)
            swap(module, {(State(module).flags(), modes(), made.spec): made.plan}, inside)
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
    if len(rows) == before and (not deeper or reason != LIST):
        left.append(Left(path, reason))


def _visit_inside(
    module: nn.Module, path: str, rows: list[Row], left: list[Left], seen: set[int], halved: int
) -> None:  # fmt: skip
    inside: Inside = type(module)._csp_inside  # type: ignore[attr-defined]
    for name, less in inside.called:
        _visit(module.get_submodule(name), f"{path}.{name}" if path else name, rows, left, seen, halved + less)
    for child in module.children() if inside.parts else ():
        _visit(child, path, [], [], seen)


def _why_not_here(module: nn.Module, convs: int) -> str:
    """Why a module is not to be fused as a whole, though its children may be; "" if it may be."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if type(module).forward is nn.Module.forward:  # a list of modules
        return LIST
    return f"it has {convs} convolutions" if convs > MOST else ""


def _convolutions(module: nn.Module) -> int:
    """In it, but for those of layers of this package, which are operators already."""
    if isinstance(module, CspLayer):
        return 0
    return isinstance(module, nn.Conv2d) + sum(_convolutions(child) for child in module.children())


def _not_traced(found: Trace) -> tuple[tuple[str, int], ...]:
    """Children that are called as they are: there may be something to fuse inside them. With how often the largest of
    the images that they are called with is halved as against those of the forward."""
    sizes: dict[str, list[int]] = {}
    for op in found.operations:
        if op.kind == "call" and op.path:
            heights = [found.shapes[v][2] for v in op.inputs if is_image(found.shapes[v])]
            sizes[op.path] = [*sizes.get(op.path, []), *heights]
    return tuple((path, (SIZE[0] // max(those, default=SIZE[0])).bit_length() - 1) for path, those in sizes.items())


# --- weights ---

_CONVERTED: Any = WeakIdKeyDictionary()  # convolutions whose weights were contiguous before they were channels_last
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
