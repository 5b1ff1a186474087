"""Bytes that kernels load and store, counted under Triton's interpreter, and what must move according to the algorithm.

Counted per tensor argument of each launch: issued (every access of every program, what caches see) and unique (each
element once, what DRAM must move). Images are the arguments of as many rows as pixels; weights, vectors and partial
sums are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import guard
import numpy as np
import torch
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.kernels import activate, conv3x3, elementwise, launch, mix, stage, statistics
from csp_kernels.kernels.launch import Correction, Geometry, Norm
from csp_kernels.kernels.norm import pay

GEOMETRY, POOL = Geometry(2, 14, 14), Geometry(2, 14, 14, pool=True)
DTYPE = torch.float16
K, B, G = 320, 128, 32  # channels that enter a layer, of the bottleneck, of the growth


@dataclass(eq=False)
class Use:
    """One tensor argument of one launch, loaded or stored."""

    kernel: str
    argument: str
    kind: str
    tensor: Tensor
    issued: int = 0  # elements
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def issued_bytes(self) -> int:
        return self.issued * self.tensor.element_size()

    @property
    def unique_bytes(self) -> int:
        return int(self.seen.sum()) * self.tensor.element_size()


@contextmanager
def counted() -> Iterator[list[Use]]:
    """The uses of what is launched inside."""
    uses: list[Use] = []
    known: dict[tuple[int, str], Use] = {}
    arguments: list[guard.Argument] = []  # kept: no id is used twice

    def observe(kind: str, argument: guard.Argument, elements: np.ndarray) -> None:
        key = id(argument), kind
        if key not in known:
            arguments.append(argument)
            known[key] = Use(argument.kernel, argument.name, kind, argument.tensor, seen=np.zeros(argument.span, bool))
            uses.append(known[key])
        known[key].issued += elements.size
        known[key].seen[elements] = True

    with guard.observed(observe):
        yield uses


@dataclass(frozen=True)
class Totals:
    """Per pixel: images once, all their accesses; of the call: everything else, once."""

    unique: float
    issued: float
    others: int


def totals(uses: list[Use], geometry: Geometry) -> Totals:
    rows = {geometry.pixels, geometry.outputs}
    images = [u for u in uses if u.tensor.dim() == 2 and u.tensor.shape[0] in rows]
    others = sum(u.unique_bytes for u in uses if u not in images)
    unique, issued = (sum(getattr(u, f"{key}_bytes") for u in images) for key in ("unique", "issued"))
    return Totals(unique / geometry.pixels, issued / geometry.pixels, others)


@dataclass(frozen=True)
class Case:
    """What runs, the elements a pixel that it must move, what these are."""

    uses: Callable[[], list[Use]]
    elements: float
    formula: str
    geometry: Geometry = GEOMETRY
    only: tuple[str, ...] = ("",)  # beginnings of the names of the kernels that count

    def count(self) -> Totals:
        return totals([u for u in self.uses() if u.kernel.startswith(self.only)], self.geometry)

    @property
    def floor(self) -> float:
        """Bytes a pixel."""
        return self.elements * DTYPE.itemsize


def _launched(launch: Callable[[], object]) -> list[Use]:
    with counted() as uses:
        launch()
    return uses


def _image(channels: int, pixels: int = GEOMETRY.pixels, pitch: int = 0) -> Tensor:
    return torch.randn(pixels, max(pitch, channels)).to(DTYPE)[:, :channels]


def _vectors(channels: int) -> tuple[Tensor, ...]:
    return torch.rand(3, channels).unbind()


def _mix_forward(geometry: Geometry = GEOMETRY) -> list[Use]:
    segments, weight = [mix.Segment(_image(K, pitch=512), Norm(*_vectors(K)))], torch.randn(B, K)
    out, stats = _image(B, geometry.outputs), torch.empty(2, B, dtype=torch.float64)
    return _launched(lambda: mix.forward(segments, weight, out, geometry, statistics=stats))


def _mix_backward(passes: int) -> list[Use]:
    segments = [mix.Segment(_image(K, pitch=512), Norm(*_vectors(K)), _image(K, pitch=512), add=True)]
    given = segments, _image(B), _image(B), Correction(*_vectors(B)), torch.randn(B, K), GEOMETRY
    with patch.object(launch, "one_pass_tiles", launch.one_pass_tiles if passes == 1 else lambda *_: [None]):
        return _launched(lambda: mix.backward(*given))


def _conv_forward() -> list[Use]:
    z, norm, weight, out = _image(B), Norm(*_vectors(B)), torch.randn(G, B, 3, 3), _image(G, pitch=512)
    stats = torch.empty(2, G, dtype=torch.float64)
    return _launched(lambda: conv3x3.forward(z, norm, weight, out, GEOMETRY, statistics=stats))


def _conv_backward(weights: bool) -> list[Use]:
    slices = _image(G, pitch=512), _image(G, pitch=512), Correction(*_vectors(G))
    given, dn = (*slices, torch.randn(G, B, 3, 3), _image(B), Norm(*_vectors(B))), _image(B)
    return _launched(lambda: conv3x3.wgrad(*given, GEOMETRY) if weights else conv3x3.dgrad(*given, dn, GEOMETRY))


def _activate(backward: bool, geometry: Geometry = GEOMETRY) -> list[Use]:
    z, dz, norm, y = _image(B), _image(B), Norm(*_vectors(B)), _image(B, geometry.outputs, 512)
    if backward:
        return _launched(lambda: activate.backward(y, z, norm, dz, geometry, activate.RELU))
    return _launched(lambda: activate.forward(z, norm, y, geometry, activate.RELU))


def _copy_split() -> list[Use]:
    x, out, stats = _image(K), _image(K, pitch=512), torch.empty(2, K, dtype=torch.float64)
    return _launched(lambda: statistics.copy_split(x, out, stats))


def _add(terms: int) -> list[Use]:
    """One term: a copy with statistics."""
    read, out = [elementwise.Term(_image(K, pitch=512)) for _ in range(terms)], _image(K, pitch=512)
    stats = torch.empty(2, K, dtype=torch.float64)
    return _launched(lambda: elementwise.add(read, activate.IDENTITY, out, stats))


def _add_backward() -> list[Use]:
    d, y, out, owed = _image(K), _image(K, pitch=512), _image(K), Correction(*_vectors(K))
    return _launched(lambda: elementwise.backward(d, y, owed, [], activate.IDENTITY, out))


def _pay() -> list[Use]:
    grad, x, out, owed = _image(K), _image(K, pitch=512), _image(K), Correction(*_vectors(K))
    return _launched(lambda: pay(grad, x, owed, out))


def step(module: nn.Module, channels: int, geometry: Geometry = GEOMETRY) -> tuple[list[Use], list[Use]]:
    """Uses of forward and of backward of a fused layer with the launchers in place of the compiled operator."""
    x = _image(channels, geometry.pixels).unflatten(0, (geometry.n, geometry.h, geometry.w)).permute(0, 3, 1, 2)
    with torch.library._scoped_library("csp_kernels", "IMPL") as library, csp.use_backend("native"):
        library.impl("stage", stage.forward, "CPU", allow_override=True)
        library.impl("stage_backward", stage.backward, "CPU", allow_override=True)
        with counted() as forward:
            y = module(x.requires_grad_())
        with counted() as backward:
            y.backward(torch.ones_like(y))
    return forward, backward


def _layer() -> tuple[list[Use], list[Use]]:
    return step(csp.DenseBlock(1, K, G), K)


def _concat_conv() -> tuple[list[Use], list[Use]]:
    return step(csp.ConcatConv([K], B), K)


PRODUCTS = ("mix.", "conv3x3.")  # without what enters and leaves the block
CASES = {
    "mix.forward": Case(_mix_forward, K + B, "K + b"),
    "mix.forward, pooled": Case(lambda: _mix_forward(POOL), K + B / 4, "K + b/4", POOL),
    "mix.backward, one pass": Case(lambda: _mix_backward(1), 3 * K + 2 * B, "3K + 2b"),
    "mix.backward, two passes": Case(lambda: _mix_backward(2), 4 * K + 4 * B, "4K + 4b"),
    "conv3x3.forward": Case(_conv_forward, B + G, "b + g"),
    "conv3x3.dgrad": Case(lambda: _conv_backward(False), 2 * B + 2 * G, "2b + 2g"),
    "conv3x3.wgrad": Case(lambda: _conv_backward(True), B + 2 * G, "b + 2g"),
    "activate.forward": Case(lambda: _activate(False), 2 * B, "2b"),
    "activate.forward, pooled": Case(lambda: _activate(False, POOL), B + B / 4, "b + b/4", POOL),
    "activate.backward": Case(lambda: _activate(True), 3 * B, "3b"),
    "activate.backward, pooled": Case(lambda: _activate(True, POOL), 2 * B + B / 4, "2b + b/4", POOL),
    "copy_split": Case(_copy_split, 2 * K, "2K"),
    "add, one term": Case(lambda: _add(1), 2 * K, "2K"),
    "add, two terms": Case(lambda: _add(2), 3 * K, "3K"),
    "add, backward": Case(_add_backward, 3 * K, "3K"),
    "pay": Case(_pay, 3 * K, "3K"),
    "dense layer, forward": Case(lambda: _layer()[0], K + 2 * B + G, "K + 2b + g", only=PRODUCTS),
    # no norm uses what it adds, which owes nothing
    "dense layer, backward": Case(lambda: _layer()[1], 3 * K + 5 * B + 2 * G, "3K + 5b + 2g", only=PRODUCTS),
    "concat_conv, forward": Case(lambda: _concat_conv()[0], K + 3 * B, "K + 3b"),
    "concat_conv, backward": Case(lambda: _concat_conv()[1], 2 * K + 4 * B, "2K + 4b"),
}
