"""Layers that run programs: which they are, what their calls compile to, and the calls that a network makes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csp_kernels.backends import use_backend
from csp_kernels.layers import (
    ConcatConv,
    CSPDenseStage,
    CSPStage,
    DenseBlock,
    PartialTransition,
    PostDenseBlock,
    Stage,
    Transition,
    TwoWayDenseBlock,
)
from csp_kernels.stage.biases import has_biases, without_biases
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.graph import Graph, without_dropout
from csp_kernels.stage.program import Program, Wanted

Layer = (
    ConcatConv | CSPDenseStage | CSPStage | DenseBlock | PartialTransition | PostDenseBlock | Stage | Transition
    | TwoWayDenseBlock
)  # fmt: skip


def operator_of(layer: Layer) -> str:
    """The function of csp.ops that it calls: "csp_stage" of a CSPDenseStage."""
    kinds = {ConcatConv: "concat_conv", CSPDenseStage: "csp_stage", DenseBlock: "dense_block", Stage: "stage"}
    kinds |= {CSPStage: "stage", PartialTransition: "partial_transition", PostDenseBlock: "post_dense_block"}
    kinds |= {Transition: "stage"}
    return next((name for kind, name in kinds.items() if isinstance(layer, kind)), "two_way_dense_block")


def graph_of(layer: Layer) -> Graph:
    """What a call computes in the layer's present mode."""
    return without_dropout(layer.graph) if isinstance(layer, Stage) and not layer.training else layer.graph


def images_of(layer: Layer, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """The inputs of the graph among the arguments of a call."""
    return layer.images(*inputs) if isinstance(layer, (ConcatConv, CSPStage, PartialTransition)) else inputs


def holders_of(layer: Layer, graph: Graph) -> list[Any]:
    """The modules that hold the graph's parameters, in its order, whatever they are."""
    return [layer.get_submodule(item.name) for item in graph.order]


def recompute_of(layer: Layer) -> str:
    """What backward computes again; "none" where the layer has no such choice."""
    choice: str = getattr(layer, "recompute", "none")
    return choice


def program_of(layer: Layer, graph: Graph, wanted: Wanted | None) -> Program:
    """What a call compiles to, with the norms that are frozen now and the layer's `recompute`. wanted: of backward,
    None: nothing."""
    pairs = zip(graph.order, holders_of(layer, graph), strict=True)
    norms = {item.index: norm for item, norm in pairs if item.kind == "norm"}
    frozen = tuple(_frozen(norms[i]) for i in range(len(norms)))
    if has_biases(graph):
        lowered = without_biases(graph)
        own = range(len(graph.norms), len(lowered.graph.norms))  # norms that are nothing but a bias
        if wanted is not None:
            trained = {i for i in own if {piece.node for piece in lowered.pieces[i]} & {*wanted.nodes}}
            wanted = replace(wanted, norms=(*wanted.norms, *sorted(trained)))
        graph, frozen = lowered.graph, frozen + (True,) * len(own)
    return compile_stage(graph, frozen, wanted, recompute_of(layer))


def _frozen(norm: Any) -> bool:
    """As layers/_norms.py has it; here it may be a norm of any kind."""
    return getattr(norm, "running_mean", None) is not None and not norm.training


class Call(NamedTuple):
    """One call of a layer by a network. inputs: as the layer takes them, on the meta device."""

    name: str
    layer: Layer
    inputs: tuple[Any, ...]


def calls(model: nn.Module, x: Tensor) -> list[Call]:
    """Those of the outermost layers of a network that run programs (`holders` finds nothing against it), in order.

    Found by running a copy of the network, in eval mode, on the meta device. Inputs require gradients where they depend
    on parameters that do.
    """
    copied = copy.deepcopy(model).to("meta").eval()
    found: list[Call] = []

    def watch(name: str, layer: Layer, module: nn.Module) -> None:
        def record(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = inspect.signature(type(layer).forward).bind(layer, *inputs, **options).args[1:]
            found.append(Call(name, layer, _leaves(given)))

        module.register_forward_pre_hook(record, with_kwargs=True)

    outer: str | None = None  # begins the names of all that is inside the latest of them
    modules = dict(copied.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, Layer) and not (outer is not None and name.startswith(outer)) and not layer.holders()[1]:
            outer = f"{name}." if name else ""
            watch(name, layer, modules[name])
    with use_backend("reference"), torch.enable_grad():
        copied(x.to("meta"))
    return found


def _leaves(value: Any) -> Any:
    """Tensors in lists and tuples without their history."""
    if isinstance(value, (list, tuple)):
        return type(value)(_leaves(item) for item in value)
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
