"""Whether an operator may stand for the children of a layer, or somebody would notice that they are not called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from csp_kernels._tracing import constant_when_traced
from csp_kernels.backends import selected
from csp_kernels.ops._packed import forget
from csp_kernels.reference.dense_block import DenseLayer
from csp_kernels.reference.partial_transition import Unit
from csp_kernels.reference.post_dense_block import PostDenseLayer
from csp_kernels.reference.two_way_dense_block import Branch, TwoWayDenseLayer

_LAYERS: dict[str, type[nn.Module]] = {"pre": DenseLayer, "post": PostDenseLayer, "two_way": TwoWayDenseLayer}
# (name, size of the kernel, 0 for a norm) of the children of a layer or branch, in the order of the operator's params
_LEAVES = {
    "pre": (("norm1", 0), ("conv1", 1), ("norm2", 0), ("conv2", 3)),
    "post": (("conv1", 1), ("norm1", 0), ("conv2", 3), ("norm2", 0)),
    "branch1": (("conv1", 1), ("norm1", 0), ("conv2", 3), ("norm2", 0)),
    "branch2": (("conv1", 1), ("norm1", 0), ("conv2", 3), ("norm2", 0), ("conv3", 3), ("norm3", 0)),
}
_METHODS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_conv_forward")
_PLAIN = {  # kernel_size, stride, padding, dilation, groups, padding_mode of a convolution that keeps H and W
    size: ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros") for size in (1, 3)
}
_TRACKERS = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")


def layer_children(block: nn.Module, kind: str, prefix: str = "") -> tuple[list[Any], str]:
    """The convolutions and norms of every layer, in order, and why the operator cannot stand for them.

    "" if it can; otherwise some may be missing.
    Past nn.Module.__getattr__, which costs as much as a small operator.
    """
    if reason := hooked_globally():
        return [], reason
    children: list[Any] = []
    base = _LAYERS[kind]
    for name, layer in block._modules.items():
        if layer is None:
            continue
        if not _acts_as(layer, base):
            return children, _why_not(f"{prefix}{name}", layer, base)
        if kind != "two_way":
            if leaf := _add_leaves(children, layer, _LEAVES[kind]):
                return children, not_plain(f"{prefix}{name}.{leaf[0]}", layer._modules.get(leaf[0]), leaf[1])
            continue
        for path in ("branch1", "branch2"):
            branch, leaves = layer._modules.get(path), _LEAVES[path]
            if not _acts_as(branch, Branch):
                return children, _why_not(f"{prefix}{name}.{path}", branch, Branch)
            assert branch is not None
            if len(branch._modules) != len(leaves):
                return children, f"{prefix}{name}.{path} has {len(branch._modules)} children, not {len(leaves)}"
            if leaf := _add_leaves(children, branch, leaves):
                return children, not_plain(f"{prefix}{name}.{path}.{leaf[0]}", branch._modules.get(leaf[0]), leaf[1])
    return children, ""


def _add_leaves(children: list[Any], layer: nn.Module, leaves: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
    """Append the leaves of a layer; return the first one that is not plain."""
    modules = layer._modules
    for leaf in leaves:
        child = modules.get(leaf[0])
        if not (is_plain_conv(child, leaf[1]) if leaf[1] else is_plain_norm(child)):
            return leaf
        children.append(child)
    return None


def weight_shapes(block: nn.Module, kind: str) -> list[tuple[int, ...]]:
    """Of the convolutions of every layer, in order, also where the operator cannot stand for all children."""
    branches = {"branch1.": "branch1", "branch2.": "branch2"} if kind == "two_way" else {"": kind}
    paths = [f"{prefix}{leaf}" for prefix, key in branches.items() for leaf, size in _LEAVES[key] if size]
    names = [name for name, layer in block._modules.items() if layer is not None]
    return [weight_shape(block, f"{name}.{path}") for name in names for path in paths]


def weight_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Of the convolution of this name below a module. Raises RuntimeError where it is something else."""
    child = dict(module.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(child, nn.Conv2d):
        raise RuntimeError(f"{name}: got {_kind(child)}, expected an nn.Conv2d")
    return tuple(child.weight.shape)


def _kind(module: nn.Module | None) -> str:
    return "no module" if module is None else f"a {type(module).__name__}"


# --- one child ---


def is_plain_norm(norm: Any, act: str = "relu") -> bool:
    """An nn.BatchNorm2d, or timm's BatchNormAct2d where `act`, which follows, makes its activation one too many."""
    if type(norm) is nn.BatchNorm2d:
        return _untouched(norm)
    if _acts_as(norm, nn.BatchNorm2d):
        return True
    timm = getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None)
    if timm is None or not _acts_as(norm, timm) or type(norm.drop) is not nn.Identity or not _untouched(norm.drop):
        return False
    idempotent = type(norm.act) is nn.ReLU and act == "relu"
    return (idempotent or type(norm.act) is nn.Identity) and _untouched(norm.act)


def is_plain_conv(conv: Any, size: int) -> bool:
    """A convolution without bias that keeps H and W, size x size."""
    return (
        (type(conv) is nn.Conv2d or _behaves(type(conv), nn.Conv2d))
        and _untouched(conv)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode) == _PLAIN[size]
        and conv._parameters.get("bias", conv) is None
    )


def not_plain(name: str, child: Any, size: int = 0, act: str = "relu") -> str:
    """Why an operator cannot stand for this norm (size 0) or convolution; "" if it can."""
    if is_plain_conv(child, size) if size else is_plain_norm(child, act):
        return ""
    if isinstance(child, nn.Module) and (reason := why_touched(child)):
        return f"{name} {reason}"
    if not size:
        return f"{name} is a {type(child).__name__}, not an nn.BatchNorm2d"
    pad = (size // 2, size // 2)
    return f"{name} is not a plain nn.Conv2d {size}x{size} with stride 1, padding {pad}, one group and no bias"


def not_plain_unit(name: str, unit: Any) -> str:
    """Why an operator cannot stand for this transition unit; "" if it can."""
    if not _acts_as(unit, Unit):
        return _why_not(name, unit, Unit)
    modules = unit._modules
    return not_plain(f"{name}.norm", modules["norm"]) or not_plain(f"{name}.conv", modules["conv"], 1)


def not_a(name: str, module: Any, base: type[nn.Module]) -> str:
    """Why this module cannot be passed over as one of that class; "" if it can."""
    return "" if _acts_as(module, base) else _why_not(name, module, base)


def hooked_globally() -> str:
    """Whether torch.nn.modules.module.register_module_*_hook is in use, in words; "" if not."""
    if not (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks):
        return ""
    used = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
    # those of FlopCounterMode and MemTracker follow the names of modules that run: true without the children
    seen = all(getattr(hook, "__module__", "") in _TRACKERS for hooks in used for hook in hooks.values())
    return "" if seen else "a hook of all modules is registered"


def _behaves(cls: type, base: type) -> bool:
    """A call of cls does what a call of base does (a parametrized module, a subclass with more attributes)."""
    return issubclass(cls, base) and all(getattr(cls, n, None) is getattr(base, n, None) for n in _METHODS)


def _acts_as(module: Any, base: type) -> bool:
    cls = type(module)
    return (cls is base or _behaves(cls, base)) and _untouched(module)


def _untouched(module: Any) -> bool:
    """No hook, no forward of its own: nobody sees whether it is called."""
    own = module.__dict__
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in own
        or "_conv_forward" in own
    )


def _why_not(name: str, module: Any, base: type) -> str:
    touched = why_touched(module) if isinstance(module, nn.Module) and _behaves(type(module), base) else ""
    return f"{name} {touched or f'is a {type(module).__name__}, not a {base.__name__}'}"


def why_touched(module: nn.Module) -> str:
    """What _untouched found; "" if nothing."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    return "" if _untouched(module) else "has a forward of its own"


# --- a tree of children ---


class Shape(NamedTuple):
    """What a module was made as: of which class, with which numbers, by name, and children; its name among all, "a.b".
    `shape_of` makes it. It is walked at every call, so nothing is looked up that need not be."""

    path: str
    kind: type[nn.Module]
    is_norm: bool
    numbers: dict[str, object]
    children: dict[str, Shape]

    def differs(self, module: nn.Module, found: dict[str, Any], called: Sequence[str] = ()) -> str:
        """Why nobody could pass over the children of this module; "" if one can. found: they are added by their names.
        called: those that are called."""
        modules = module._modules
        for name, shape in self.children.items():
            child = modules.get(name)
            if child is None:
                return f"{shape.path} is gone"
            if reason := "" if shape.path in called else shape._not_as_made(child):
                return reason
            if (shape.children or child._modules) and (reason := shape.differs(child, found, called)):
                return reason
            found[shape.path] = child
        if len(modules) > len(self.children):
            new = [name for name, child in modules.items() if child is not None and name not in self.children]
            if new:
                return f"{self.path}{'.' * bool(self.path)}{new[0]} is new"
        return ""

    def _not_as_made(self, child: nn.Module) -> str:
        if self.is_norm:
            return "" if is_plain_norm(child, "") else not_plain(self.path, child, 0, "")
        if not _acts_as(child, self.kind):
            return _why_not(self.path, child, self.kind)
        own = child.__dict__
        for name, number in self.numbers.items():
            if own.get(name) != number:
                return f"{self.path} has another {name} than it was made with"
        bias = child._parameters.get("bias")
        return "" if bias is None else f"{self.path} has a bias"


# What changes what a call does, and no parameter shows.
_NUMBERS = (
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "negative_slope", "act", "splits",
    "missing", "block",
)  # fmt: skip


def shape_of(module: nn.Module, path: str = "") -> Shape:
    """Of a module and all its children; those that are None are no children."""
    before = f"{path}." if path else ""
    children = {name: shape_of(m, f"{before}{name}") for name, m in module._modules.items() if m is not None}
    numbers = {name: module.__dict__[name] for name in _NUMBERS if name in module.__dict__}
    return Shape(path, type(module), isinstance(module, nn.BatchNorm2d), numbers, children)


# --- the layer ---


def recorded(x: object) -> bool:
    """This call is recorded to run elsewhere: torch.jit.trace, torch.onnx.export, torch.fx.symbolic_trace.

    Then layers call their children: what runs the record knows convolutions, but not this package's operators.
    """
    if torch.compiler.is_compiling():  # torch.export takes the operators, the ONNX exporter on top of it does not
        return torch.onnx.is_in_onnx_export()
    return isinstance(x, Proxy) or torch.jit.is_tracing()


def warn_once(module: Any, reason: str) -> None:
    """Say that the module runs as its reference does, the first time; RuntimeError if "native" was chosen."""
    choice = selected()
    if choice == "native":
        raise RuntimeError(f"backend 'native': {reason}; choose use_backend('auto') or 'reference'")
    if choice != "reference" and not module._warned:
        module._warned = True
        _warn(f"csp.{type(module).__name__} runs its plain PyTorch reference: {reason}")


@constant_when_traced  # under torch.compile: warns while it compiles, without a graph break
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)


class Fused:
    """What the layers have in common."""

    _warned = False

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's; packed weights of inference are made anew."""
        module: Any = self
        forget(module.parameters())
        return nn.Module.train(module, mode)

    def __prepare_scriptable__(self) -> Callable[..., Any]:
        raise RuntimeError(
            f"csp.{type(self).__name__} cannot be compiled by torch.jit.script; "
            "use torch.jit.trace, torch.export.export or torch.onnx.export, which can take it"
        )


def fits(x: object, channels: int) -> bool:
    """Not a [N, channels, H, W] of another number of channels: what else is wrong the operator says."""
    return not isinstance(x, Tensor) or x.is_nested or x.dim() != 4 or x.shape[1] == channels
