"""A module made from any graph, run as one operator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from csp_kernels import ops
from csp_kernels.layers._children import Fused, not_a, recorded, shape_of, warn_once
from csp_kernels.layers._norms import consecutive, frozen_norms, parameters, update_running
from csp_kernels.ops.stage import stage_sizes, unsupported
from csp_kernels.reference.stage import stage as reference_stage
from csp_kernels.stage.check import check
from csp_kernels.stage.cost import side
from csp_kernels.stage.graph import Conv, Graph, without_dropout
from csp_kernels.vocabulary import RECOMPUTE


class Stage(Fused, nn.Module):
    """What a graph computes: [N, graph.inputs[i], H, W] each -> a tensor, or a tuple of them if it has several outputs.

    graph: made with `csp_kernels.stage.build.Builder` (docs/stages.md). Children are nn.Conv2d and nn.BatchNorm2d under
    the names of the graph's parameters, where dots make levels; they hold parameters and running statistics and are not
    called. A norm counts as a plain nn.BatchNorm2d: momentum, eps, affine, track_running_stats, train and eval act as
    usual. Dropout is on in training mode.
    recompute: what backward computes again instead of keeping it, "none", "bottleneck" (1x1 convolutions that 3x3 ones
    alone read) or "all" (all but inputs and outputs).
    dtypes, memory formats and errors: `csp.ops.stage`. A graph that the kernels cannot run whole runs as the reference
    does, with one warning; RuntimeError if "native" was chosen. RuntimeError also for children that would do something
    else if they were called: of another kind (SyncBatchNorm), with a forward of their own. Hooks on them are not
    called, with one warning.
    """

    def __init__(self, graph: Graph, *, eps: float = 1e-5, momentum: float = 0.1, recompute: str = "none") -> None:
        super().__init__()
        check(graph)
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: got {recompute!r}, expected one of {', '.join(RECOMPUTE)}")
        self.graph, self.recompute = graph, recompute
        self._evaluated = without_dropout(graph)
        self._geometries: dict[int, tuple[object, ...]] = {}
        names = [item.name.split(".")[:-1] for item in graph.order]
        self._levels = sorted({".".join(name[:i]) for name in names for i in range(1, len(name) + 1)})
        for item in graph.order:
            node = graph.nodes[item.index] if item.kind == "conv" else None
            child: nn.Module
            if isinstance(node, Conv):
                child = nn.Conv2d(
                    node.in_channels, node.out_channels, node.kernel, node.stride, node.kernel // 2,
                    groups=node.groups, bias=node.bias,
                )  # fmt: skip
                self._geometries[item.index] = _geometry(child)
            else:
                child = nn.BatchNorm2d(graph.norms[item.index], eps=eps, momentum=momentum)
            _attach(self, item.name, child)
        self._shape = shape_of(self)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        children, reason = self.holders()
        norms = self._norms(children)
        frozen, running = frozen_norms(norms)
        params = parameters(children)
        graph = self.graph if self.training else self._evaluated
        eps = [norm.eps for norm in norms]
        if any(isinstance(x, Proxy) for x in inputs):
            raise RuntimeError(
                "csp.Stage: torch.fx cannot record it; make it a leaf (Tracer.is_leaf_module), or torch.export"
            )
        if recorded(inputs[0] if inputs else None):
            outputs, stats = reference_stage(graph, inputs, params, running, frozen=frozen, eps=eps)
        else:
            if reason:
                warn_once(self, reason)
            outputs, stats = ops.stage(
                graph, inputs, params, running, frozen=frozen, eps=eps, recompute=self.recompute
            )  # fmt: skip
        if not all(frozen):
            self._update(norms, stats, inputs[0])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def holders(self) -> tuple[list[Any], str]:
        """What holds the operator's parameters, in order, and why the operator cannot stand for it; "" if it can.
        Raises RuntimeError if a child, called, would do something else."""
        found: dict[str, Any] = {}
        if self._shape.differs(self, found):
            found = {item.name: self.get_submodule(item.name) for item in self.graph.order}
            self._check_children([found[item.name] for item in self.graph.order])
        children = [found[item.name] for item in self.graph.order]
        return children, unsupported(self.graph if self.training else self._evaluated)

    def _check_children(self, children: Sequence[Any]) -> None:
        """Nobody calls them, nor the levels of their names."""
        for item, child in zip(self.graph.order, children, strict=True):
            self._check(item.name, child, nn.Conv2d if item.kind == "conv" else nn.BatchNorm2d)
            if item.kind == "conv" and _geometry(child) != self._geometries[item.index]:
                why = f"{item.name} has another stride, padding, dilation or groups than the graph"
                raise RuntimeError(f"csp.Stage: {why}, but it does not call its children; make it what it was")
        for level in self._levels:
            self._check(level, self.get_submodule(level), nn.Module)

    def _check(self, name: str, child: nn.Module, base: type[nn.Module]) -> None:
        why = not_a(name, child, base)
        if why and not _is_hooked(child):
            raise RuntimeError(f"csp.Stage: {why}, but it does not call its children; make it what it was")
        if why and not self._warned:
            self._warned = True
            text = f"csp.Stage: {why}, which is not called, since it does not call its children; hook the stage"
            warnings.warn(text, RuntimeWarning, stacklevel=6)

    def _norms(self, children: Sequence[Any]) -> list[Any]:
        """In the order of the graph's norms."""
        pairs = zip(self.graph.order, children, strict=True)
        found = {item.index: child for item, child in pairs if item.kind == "norm"}
        return [found[i] for i in range(len(found))]

    def _update(self, norms: Sequence[Any], stats: Tensor, x: Tensor) -> None:
        n, _, height, width = x.shape
        sizes = (size for _, size in stage_sizes(self.graph)[1])  # of each norm, in order
        counts = [(n * side(size, height) * side(size, width), 1) for size in sizes]
        update_running(norms, consecutive(norms), stats, counts)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"


def _geometry(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _attach(parent: nn.Module, name: str, child: nn.Module) -> None:
    *levels, last = name.split(".")
    for level in levels:
        if level not in parent._modules:
            _add(parent, level, nn.Module(), name)
        parent = parent.get_submodule(level)
    _add(parent, last, child, name)


def _add(parent: nn.Module, name: str, child: nn.Module, path: str) -> None:
    """Raises ValueError for a name that modules use themselves."""
    if not name or hasattr(parent, name):
        raise ValueError(f"name {path!r}: got {name!r} in it, expected words that are no attribute of a module")
    parent.add_module(name, child)
