"""What benchmarks/gpu_speed.py measures, most valuable first: layers and networks, types, and who runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from bench_concat_conv import case as join
from bench_csp_stage import case as stage
from bench_partial_transition import case as transition
from blocks import BN_SIZE, Block
from race import Case
from torch import nn

import csp_kernels as csp

DTYPES = {  # name -> storage, float32 matmul precision
    "bfloat16": (torch.bfloat16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
}
BLOCKS = (  # of densenet121, and the one that the CPU's tables begin with
    Block(64, 128, 28, 12), Block(64, 64, 56, 6), Block(64, 256, 14, 24), Block(64, 512, 7, 16), Block(16, 128, 28, 12)
)  # fmt: skip
NETWORKS = ("densenet121", "csp_peleenet", "csp_darknet53")
EAGER, COMPILED = "eager channels_last", "compile channels_last"
CUDNN = ("cudnn graph", "cudnn graph, cat")


@dataclass(frozen=True)
class Item:
    """One layer or network. kind: "layer" or "network"; operator: of csp.ops, or the network's name."""

    kind: str
    operator: str
    case: Case

    @property
    def batch(self) -> int:
        return self.case.inputs[0][0]


@dataclass(frozen=True)
class Task:
    """An item in one type, by one candidate; training and inference."""

    item: Item
    dtype: str
    candidate: str

    def __str__(self) -> str:
        return f"{self.item.operator}, {self.item.case.name}, batch {self.item.batch}, {self.dtype}, {self.candidate}"


# --- the items ---


def plain(model: nn.Module) -> nn.Module:
    """The model with its fused layers made plain PyTorch twins, in place: the same parameters and state_dict keys."""
    for module in model.modules():
        name = type(module).__name__
        if type(module) is getattr(csp.layers, name, None):
            module.__class__ = getattr(csp.reference, name)
    return model


def dense_block(block: Block) -> Item:
    sizes = block.layers, block.channels, block.growth, BN_SIZE
    name = f"{block.layers} layers, {block.channels} channels, {block.size}x{block.size}"
    shape = block.batch, block.channels, block.size, block.size
    return Item(
        "layer",
        "dense_block",
        Case(name, lambda: csp.DenseBlock(*sizes), lambda: csp.reference.DenseBlock(*sizes), [shape]),
    )


def layer(operator: str, case: Case, images: int = 64) -> Item:
    return Item("layer", operator, replace(case, inputs=[(images, c, h, w) for _, c, h, w in case.inputs]))


def post(operator: str, name: str, *sizes: int) -> Item:
    def build(where: object) -> nn.Module:
        made: nn.Module = getattr(where, name)(*sizes)
        return made

    text = f"{sizes[0]} layers, {sizes[1]} channels, 28x28"
    return layer(
        operator, Case(text, lambda: build(csp), lambda: build(csp.reference), [(64, sizes[1], 28, 28)])
    )  # fmt: skip


def network(name: str, images: int = 32, size: int = 224) -> Item:
    build = getattr(csp.models, name)
    return Item("network", name, Case(f"{size}x{size}", build, lambda: plain(build()), [(images, 3, size, size)]))


def layers() -> list[Item]:
    """Dense blocks, stages, transitions, joins, and what has no other."""
    return [
        *(dense_block(block) for block in BLOCKS),
        layer("csp_stage", stage("pre", 0.5)),
        layer("csp_stage", stage("two_way", 0.5)),
        *(
            layer("partial_transition", transition(*kind))
            for kind in (("pre", "csp"), ("post", "csp"), ("pre", "last"))
        ),
        layer("concat_conv", join(2, 128, 256, 28)),
        layer("concat_conv", join(4, 64, 128, 28, "mish")),
        layer("concat_conv", join(2, 64, 64, 56)),
        post("post_dense_block", "PostDenseBlock", 4, 128, 32, BN_SIZE),
        post("two_way_dense_block", "TwoWayDenseBlock", 4, 128, 32, 2),
    ]


def tiny(item: Item) -> Item:
    """Of a few pixels, for the CPU."""
    inputs: list[tuple[int, int, int, int]] = [(2, c, 14, 14) for _, c, _, _ in item.case.inputs]
    return replace(item, case=replace(item.case, name=f"{item.case.name}, but 14x14", inputs=inputs))


def items(device: str) -> tuple[list[Item], list[Item]]:
    """Layers and networks; on the CPU one of each kind, tiny."""
    if device == "cuda":
        return layers(), [network(name) for name in NETWORKS]
    block = dense_block(Block(2, 16, 14, 2, 8))
    others = {item.operator: tiny(item) for item in layers() if item.operator != "dense_block"}
    return [block, *others.values()], [network("csp_peleenet", 4, 64)]


# --- their order ---


def tasks(device: str, ours: Sequence[str]) -> Iterator[Task]:
    """Everything, most valuable first. ours: the candidates "csp <backend>" that can run on this device."""
    parts, networks = items(device)
    base = [EAGER, *ours]
    yield from _each([*parts, *networks], "bfloat16", base)
    yield from _each(parts[:1], "bfloat16", CUDNN)
    compiled = _important(parts) if device == "cuda" else [item for item in parts if item.operator == "concat_conv"]
    yield from _each(compiled, "bfloat16", [COMPILED])
    yield from _each([*parts, *networks], "float32", base)
    if device == "cuda":  # torch.compile takes a minute for a network
        yield from _each([item for item in parts[1:] if item.operator == "dense_block"], "bfloat16", CUDNN)
        yield from _each(networks, "bfloat16", [COMPILED])
        yield from _each([item for item in parts if item not in compiled], "bfloat16", [COMPILED])
        yield from _each(parts, "float32", [COMPILED])
        yield from _each(parts, "tf32", base)
        yield from _each(networks, "float32", [COMPILED])


def _important(parts: Sequence[Item]) -> list[Item]:
    """The first of each of the first four operators."""
    first = {item.operator: item for item in reversed(parts)}
    return [first[name] for name in ("dense_block", "csp_stage", "partial_transition", "concat_conv")]


def _each(found: Sequence[Item], dtype: str, candidates: Sequence[str]) -> Iterator[Task]:
    for item in found:
        for candidate in candidates:
            yield Task(item, dtype, candidate)
