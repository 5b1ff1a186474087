"""The choices that follow from the planners' constants, made by a clock: CUDA C++ against Triton for a 3x3, and a dense
layer in one kernel against two."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import csp_kernels as csp
from csp_kernels.backends import why_not_cuda
from csp_kernels.kernels import activate, conv3x3, cuda, mix
from csp_kernels.kernels.launch import Correction, Geometry, Norm

Works = dict[str, Callable[[], object]]


class Layer:
    """Tensors of a dense layer's 3x3, weights in float32. b: bottleneck, g: growth, channels: that enter its 1x1 (0: it
    has none)."""

    def __init__(
        self, dtype: torch.dtype, n: int, h: int, w: int, b: int, g: int, channels: int = 0, precision: str = "ieee",
        make: Callable[..., Tensor] = torch.randn,
    ) -> None:  # fmt: skip
        pixels, self.precision, self.geometry = n * h * w, precision, Geometry(n, h, w)
        self.weight, self.dz = make(g, b, 3, 3) / (9 * b) ** 0.5, make(pixels, b, dtype=dtype)
        self.z, self.grown, self.gradient = (make(pixels, c, dtype=dtype) for c in (b, g, g))
        self.norm, self.owed = Norm(*make(3, b).unbind()), Correction(*make(3, g).unbind())
        self.moments = make(2, g, dtype=torch.float64)
        if channels:
            self.features, self.norm1 = make(pixels, channels, dtype=dtype), Norm(*make(3, channels).unbind())
            self.weight1 = make(b, channels) / channels**0.5

    def forward(self, statistics: bool = True) -> None:
        into = self.moments if statistics else None
        conv3x3.forward(self.z, self.norm, self.weight, self.grown, self.geometry, self.precision, into)

    def dgrad(self) -> None:
        given = self.grown, self.gradient, self.owed, self.weight, self.z, self.norm
        conv3x3.dgrad(*given, self.dz, self.geometry, self.precision)

    def wgrad(self) -> None:
        given = self.grown, self.gradient, self.owed, self.weight, self.z, self.norm
        conv3x3.wgrad(*given, self.geometry, self.precision)

    def two_kernels(self) -> None:
        """In inference."""
        after = mix.After(self.norm, activate.RELU)
        mix.forward([mix.Segment(self.features, self.norm1)], self.weight1, self.z, self.geometry, after=after)
        conv3x3.forward(self.z, self.identity, self.weight, self.grown, self.geometry)

    @property
    def identity(self) -> Norm:
        """A norm that does nothing: the bottleneck has been normalised."""
        b = self.z.shape[1]
        return Norm(self.z.new_zeros(b).float(), self.z.new_ones(b).float(), self.z.new_zeros(b).float())

    def one_kernel(self) -> None:
        given = self.features, self.norm1, self.weight1, self.norm, self.weight
        cuda.layer(*given, self.grown, self.geometry)


def on(backend: str, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with csp.use_backend(backend):
            work()

    return run


@dataclass(frozen=True)
class Comparison:
    """CUDA C++ against Triton for a 3x3 (channels 0), or one kernel against two for a layer in inference."""

    kind: str
    size: tuple[int, int, int]
    channels: int = 0

    @property
    def key(self) -> str:
        n, h, w = self.size
        entering = f", {self.channels} channels enter" if self.channels else ""
        return f"{self.kind}, {n} x {h}x{w}{entering}, bottleneck 128, growth 32"

    @property
    def name(self) -> str:
        return f"{'dense layer' if self.channels else 'conv3x3'}: {self.key}"

    def layer(self, n: int, make: Callable[..., Tensor]) -> Layer:
        dtype = torch.bfloat16 if self.kind == "bfloat16" else torch.float32
        precision = "tf32" if self.kind == "tf32" else "ieee"
        return Layer(dtype, n, *self.size[1:], 128, 32, self.channels, precision, make)

    def launch(self) -> None:
        """What Triton compiles, on memory that nobody reads."""
        layer = self.layer(self.size[0], torch.empty)
        for work in [layer.two_kernels] if self.channels else [layer.forward, layer.dgrad, layer.wgrad]:
            work()

    def works(self, device: str) -> Iterator[tuple[str, Works, str]]:
        """(kernel, what is to be compared, what runs untuned). On the CPU of one image, and by Triton alone."""
        gpu = device == "cuda"
        layer = self.layer(self.size[0] if gpu else 1, torch.randn if gpu else torch.empty)
        compiled = gpu and not why_not_cuda()
        taken = compiled and cuda.takes(layer.z, layer.weight, layer.grown, layer.geometry, layer.precision)
        if self.channels:
            yield "dense layer", *self._layer(layer, compiled)
            return
        for name in ("forward", "dgrad", "wgrad"):
            work: Callable[[], object] = getattr(layer, name)
            found: Works = {"CUDA C++": on("native", work)} if taken else {}
            found["Triton"] = on("triton", work) if gpu else work
            yield f"conv3x3.{name}: who", found, next(iter(found))

    def _layer(self, layer: Layer, compiled: bool) -> tuple[Works, str]:
        if not compiled:
            return {"two kernels": layer.two_kernels}, "two kernels"
        with csp.use_backend("native"):
            wins = cuda.takes_layer(layer.features, layer.weight, layer.grown, layer.geometry)
        works: Works = {"one kernel": on("native", layer.one_kernel), "two kernels": on("native", layer.two_kernels)}
        return works, "one kernel" if wins else "two kernels"


def comparisons(args: argparse.Namespace) -> list[Comparison]:
    sizes = [(64, 56, 56), (64, 28, 28), (64, 14, 14), (64, 7, 7)]
    made = [Comparison(kind, size) for kind in ("bfloat16", "float32", "tf32") for size in sizes]
    made += [Comparison("bfloat16", sizes[0], k) for k in (64, 128, 256, 512, 1024)]
    made += [Comparison("bfloat16", size, 256) for size in sizes[1:]]
    return [c for c in made if args.only in c.name and c.kind in args.kinds]
