"""The dense blocks under test: shapes, inputs, candidates and how one step of each runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Thunk
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import csp_kernels as csp

BN_SIZE = 4


@dataclass(frozen=True)
class Block:
    """A dense block's shape: input [batch, channels, size, size]."""

    batch: int
    channels: int
    size: int
    layers: int
    growth: int = 32

    @classmethod
    def parse(cls, text: str) -> Block:
        """From 'batch,channels,size,layers[,growth]'."""
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) not in (4, 5) or min(numbers) < 1:
            raise ValueError(f"block: expected batch,channels,size,layers[,growth], all positive, got {text!r}")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.batch},{self.channels},{self.size},{self.layers},{self.growth}"

    @property
    def out_channels(self) -> int:
        """Channels of the block's output."""
        return self.channels + self.layers * self.growth

    @property
    def pixels(self) -> int:
        """batch * size * size."""
        return self.batch * self.size**2

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of a forward pass, convolutions done directly; a step does three times that."""
        width = BN_SIZE * self.growth
        one = sum(2 * self.pixels * (self.channels + i * self.growth) * width for i in range(self.layers))
        three = self.layers * 2 * self.pixels * 9 * width * self.growth
        return one + three

    @property
    def eager_bytes(self) -> int:
        """Rough float32 bytes that the naive block keeps for backward: 2K + 2b of every layer, and its result."""
        width = BN_SIZE * self.growth
        kept = sum(2 * (self.channels + i * self.growth) + 2 * width for i in range(self.layers))
        return 4 * self.pixels * (kept + 2 * self.out_channels)


DEFAULT_BLOCKS = (Block(16, 128, 28, 12), Block(16, 256, 14, 24), Block(16, 64, 56, 6))


class Checkpointed(nn.Module):
    """The naive block with torch.utils.checkpoint around concatenation, norms and 1x1 of every layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.block.children():
            features.append(checkpoint(_naive_layer, layer, *features, use_reentrant=False))
        return torch.cat(features, 1)


def _naive_layer(layer: nn.Module, *features: Tensor) -> Tensor:
    return layer(torch.cat(features, 1))


def make_block(block: Block, naive: bool, dtype: torch.dtype, channels_last: bool = True) -> nn.Module:
    """A block, fused or naive, with the same random weights and running statistics; parameters in dtype."""
    source = _source(block)
    made = source if naive else csp.DenseBlock(block.layers, block.channels, block.growth, BN_SIZE)
    made.load_state_dict(source.state_dict())
    made = made.to(dtype)
    return made.to(memory_format=torch.channels_last) if channels_last else made


def _source(block: Block) -> nn.Module:
    torch.manual_seed(0)
    source = csp.reference.DenseBlock(block.layers, block.channels, block.growth, BN_SIZE)
    for norm in source.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    return source


def make_input(block: Block, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    """x [batch, channels, size, size] and a gradient of the output, the same numbers whatever the layout."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(block.batch, block.channels, block.size, block.size, generator=generator).to(dtype)
    grad = torch.randn(block.batch, block.out_channels, block.size, block.size, generator=generator).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Candidate:
    """A way to run the block: `call` maps x to the output, `owner` holds the parameters."""

    owner: nn.Module
    call: Callable[[Tensor], Tensor]
    x: Tensor
    grad: Tensor

    def step(self) -> list[Tensor]:
        """Forward and backward: [output, dx, parameter gradients in order]."""
        x = self.x.detach().requires_grad_()
        self.owner.zero_grad(set_to_none=True)
        y = self.call(x)
        y.backward(self.grad)
        assert x.grad is not None
        return [y.detach(), x.grad, *(p.grad for p in self.owner.parameters() if p.grad is not None)]

    @torch.no_grad()
    def infer(self) -> list[Tensor]:
        """[output] without gradients."""
        return [self.call(self.x)]

    def work(self, mode: str) -> Thunk:
        """What is timed: 'train' a step, 'infer' a forward pass."""
        return self.step if mode == "train" else self.infer


def candidates(block: Block, mode: str, dtype: torch.dtype, with_compile: bool) -> dict[str, Candidate]:
    """Name -> candidate: ours, ours recomputing, the naive block in both layouts, checkpointed, compiled."""
    found = {"csp": _candidate(block, False, dtype, True)}
    if mode == "train":
        found["csp recompute"] = _recomputing(block, dtype)
    for layout, last in (("NCHW", False), ("channels_last", True)):
        found[f"eager {layout}"] = _candidate(block, True, dtype, last)
    if mode == "train":
        owner = make_block(block, True, dtype)
        found["checkpointed"] = Candidate(owner, Checkpointed(owner), *make_input(block, dtype, True))
    if with_compile:
        torch._dynamo.reset()
        for layout, last in (("NCHW", False), ("channels_last", True)):
            plain = _candidate(block, True, dtype, last)
            found[f"compile {layout}"] = Candidate(plain.owner, torch.compile(plain.owner), plain.x, plain.grad)
    for candidate in found.values():
        candidate.owner.train(mode == "train")
    return found


def _candidate(block: Block, naive: bool, dtype: torch.dtype, last: bool) -> Candidate:
    owner = make_block(block, naive, dtype, last)
    return Candidate(owner, owner, *make_input(block, dtype, last))


def _recomputing(block: Block, dtype: torch.dtype) -> Candidate:
    owner = csp.DenseBlock(block.layers, block.channels, block.growth, BN_SIZE, recompute="bottleneck")
    owner.load_state_dict(_source(block).state_dict())
    owner = owner.to(dtype).to(memory_format=torch.channels_last)
    return Candidate(owner, owner, *make_input(block, dtype, True))


def exact(block: Block, mode: str, dtype: torch.dtype) -> list[Tensor]:
    """The naive block's results in float64 from the same numbers, after their rounding to dtype."""
    owner = make_block(block, True, dtype).double().train(mode == "train")
    x, grad = make_input(block, dtype, True)
    candidate = Candidate(owner, owner, x.double(), grad.double())
    return candidate.step() if mode == "train" else candidate.infer()


__all__ = ["BN_SIZE", "DEFAULT_BLOCKS", "Block", "Candidate", "candidates", "exact", "make_block", "make_input"]
