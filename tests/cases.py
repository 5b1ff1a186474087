"""Random arguments of the operators, and the comparison of an operator and its twin with the twin in float64."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import error, limit
from torch import Tensor

import csp_kernels as csp
from csp_kernels.ops.stage import parameter_shapes
from csp_kernels.reference.stage import stage as reference_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph

Shape = tuple[int, ...]
Results = dict[str, Tensor]
Errors = dict[str, list[tuple[float, float]]]  # name -> (ours, naive) of each seed
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@dataclass(frozen=True)
class Case(ABC):
    """Arguments of one operator; subclasses say which."""

    size: tuple[int, int, int] = (3, 7, 5)  # N, H, W
    dtype: torch.dtype = torch.float32
    frozen: tuple[bool, ...] = ()  # repeated over the norms
    mean: float = 0.0
    std: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    kinks: bool = True  # False: biases keep every ReLU away from zero

    @property
    @abstractmethod
    def inputs(self) -> dict[str, int]:
        """Name -> channels."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Of the parameters, in order."""

    @abstractmethod
    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        """Outputs and statistics of the operator in csp.ops or csp.reference."""

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def norms(self) -> list[int]:
        """Channels of each."""
        return [shape[0] for name, shape in self.shapes.items() if name.endswith("weight") and len(shape) == 1]

    @property
    def flags(self) -> list[bool]:
        return [bool(self.frozen) and self.frozen[i % len(self.frozen)] for i in range(len(self.norms))]

    @property
    def reduction(self) -> int:
        """Terms of the longest sum."""
        n, h, w = self.size
        products = [shape[1] * shape[2] * shape[3] for shape in self.shapes.values() if len(shape) == 4]
        return max(n * h * w, *products)

    def leaves(self) -> dict[str, Tensor]:
        """Inputs, then parameters."""
        n, h, w = self.size
        leaves = {k: (torch.randn(n, c, h, w) * self.std + self.mean).to(self.dtype) for k, c in self.inputs.items()}
        for name, shape in self.shapes.items():
            if len(shape) == 4:
                t = torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
            elif name.endswith("weight"):
                t = (torch.rand(shape) + 0.5) * (1.0 if self.kinks else 0.5)
            else:
                t = torch.randn(shape) * 0.3 if self.kinks else torch.where(torch.arange(shape[0]) % 4 == 0, -4.0, 4.0)
            leaves[name] = t.to(self.wide)
        return leaves

    def running(self) -> list[Tensor]:
        pairs = [
            (torch.randn(c) * 0.2, torch.rand(c) + 0.5) for c, flag in zip(self.norms, self.flags, strict=True) if flag
        ]
        return [t.to(self.wide) for pair in pairs for t in pair]

    def __call__(self, where: Any, leaves: Mapping[str, Tensor], running: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        values = list(leaves.values())
        outputs, stats = self.call(where, values[: len(self.inputs)], values[len(self.inputs) :], running)
        return ([outputs] if isinstance(outputs, Tensor) else list(outputs)), stats


def grads(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(y.shape, generator=generator).to(case.dtype) for y in outputs]


def run(
    case: Case,
    where: Any,
    leaves: Mapping[str, Tensor],
    running: list[Tensor],
    given: Sequence[Tensor] | None = None,
) -> Results:
    """Outputs, statistics and every gradient by name; given: gradients of the outputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    outputs, stats = case(where, leaves, running)
    assert not stats.requires_grad and stats.dtype == torch.float64 and stats.shape == (2, stats.shape[1])
    given = [g.to(y.dtype) for g, y in zip(given or grads(case, outputs), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    named = {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, "stats": stats, **named}


def scales(exact: Results) -> dict[str, float]:
    """Size of each tensor; a norm's bias gradient can vanish by cancellation, so it counts with its weight's."""
    sizes = {name: t.double().norm().item() for name, t in exact.items()}
    return {name: max(size, sizes.get(name.replace("bias", "weight"), 0.0)) for name, size in sizes.items()}


def measure(case: Case, seeds: Sequence[int]) -> Errors:
    """Errors of the operator and of its twin against the twin in float64."""
    errors: Errors = {}
    for seed in seeds:
        torch.manual_seed(seed)
        leaves, running = case.leaves(), case.running()
        ours, naive = (run(case, where, leaves, running) for where in (csp.ops, csp.reference))
        wide = {name: t.double() for name, t in leaves.items()}
        exact = run(case, csp.reference, wide, [t.double() for t in running])
        assert ours["y0"].dtype == case.dtype
        for name, scale in scales(exact).items():
            if name.startswith("grad"):
                assert ours[name].dtype == leaves[name.removeprefix("grad ")].dtype
            pair = error(ours[name], exact[name], scale), error(naive[name], exact[name], scale)
            errors.setdefault(name, []).append(pair)
    if any(case.flags):  # statistics that no norm needs are unspecified
        del errors["stats"]
    return errors


def too_large(case: Case, errors: Errors) -> list[str]:
    """Tensors whose median error over the seeds is: one ReLU that changes sides by rounding does not count.

    In 16 bits many change sides, in our run or in the twin's. With kinks, all gradients of a seed count together there,
    and a typical seed of ours may be no worse than the twin's worst.
    """
    sizes = {name: [statistics.median(p[i] for p in pairs) for i in (0, 1)] for name, pairs in errors.items()}
    if case.dtype.itemsize == 2 and case.kinks:
        pooled = [errors[name] for name in errors if name.startswith("grad")]
        sizes = {name: pair for name, pair in sizes.items() if not name.startswith("grad")}
        seeds = zip(*pooled, strict=True)
        both = [[statistics.fmean(p[i] ** 2 for p in pairs) ** 0.5 for i in (0, 1)] for pairs in seeds]
        sizes["gradients"] = [statistics.median(ours for ours, _ in both), max(naive for _, naive in both)]
    bounds = {name: limit(naive, case.dtype, case.reduction) for name, (_, naive) in sizes.items()}
    return [
        f"{name}: error {ours:.1e}, allowed {bounds[name]:.1e}"
        for name, (ours, _) in sizes.items()
        if not ours <= bounds[name]
    ]


def compare(case: Case) -> None:
    """Three seeds; nine where these leave a doubt."""
    errors = measure(case, range(3))
    if too_large(case, errors):
        for name, pairs in measure(case, range(3, 9)).items():
            errors[name] += pairs
    failures = too_large(case, errors)
    assert not failures, failures


def check_inference(case: Case) -> None:
    """Without gradients, against the twin in float64."""
    leaves, running = case.leaves(), case.running()
    with torch.no_grad():
        (ours, stats), (naive, _) = (case(where, leaves, running) for where in (csp.ops, csp.reference))
        wide = {name: t.double() for name, t in leaves.items()}
        exact, _ = case(csp.reference, wide, [t.double() for t in running])
    assert not stats.requires_grad
    for y, near, far in zip(ours, naive, exact, strict=True):
        assert y.dtype == case.dtype and not y.requires_grad
        assert error(y, far) <= limit(error(near, far), case.dtype, case.reduction)


def check_gradients(case: Case) -> None:
    """gradcheck; case in float64."""
    leaves, running = case.leaves(), case.running()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(case(csp.ops, dict(zip(leaves, tensors, strict=True)), running)[0])

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves.values()])


def check_repeats(case: Case) -> None:
    leaves, running = case.leaves(), case.running()
    first, *others = [run(case, csp.ops, leaves, running) for _ in range(3)]
    for name, value in first.items():
        assert all(torch.equal(value, other[name]) for other in others), name


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values behind different strides."""
    n, c, h, w = x.shape
    wide = torch.full((n, 2 * c, h, w), float("nan"), dtype=x.dtype)
    wide[:, c:] = x
    padded = torch.full((n, c, h + 2, w + 3), float("nan"), dtype=x.dtype)
    padded[:, :, 1:-1, 1:-2] = x
    return {
        "NCHW": x.contiguous(),
        "NHWC": x.contiguous(memory_format=torch.channels_last),
        "slice of NCHW": wide[:, c:],
        "slice of NHWC": wide.contiguous(memory_format=torch.channels_last)[:, c:],
        "window": padded[:, :, 1:-1, 1:-2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


LAYOUTS = ["NCHW", "NHWC", "slice of NCHW", "slice of NHWC", "window", "transposed"]


def is_channels_last(y: Tensor) -> bool:
    """True for a channel slice too."""
    return y.stride(1) == 1 and y.stride(3) >= y.shape[1]


def check_layout(case: Case, layout: str) -> None:
    """Inputs and gradients with these strides give the same, in the memory format of the first input."""
    leaves, running = case.leaves(), case.running()
    plain = run(case, csp.ops, leaves, running)
    outputs, _ = case(csp.ops, leaves, running)
    moved = {name: layouts(t)[layout] if name in case.inputs else t for name, t in leaves.items()}
    given = run(case, csp.ops, moved, running, [layouts(g)[layout] for g in grads(case, outputs)])
    assert is_channels_last(given["y0"]) == ("NHWC" in layout)
    for name, value in plain.items():
        torch.testing.assert_close(given[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def check_expanded(case: Case) -> None:
    """Inputs that repeat one image, a gradient that repeats one number."""
    leaves, running = case.leaves(), case.running()
    n = case.size[0]
    wide = {k: t[:1].expand(n, -1, -1, -1) if k in case.inputs else t for k, t in leaves.items()}
    outputs, _ = case(csp.ops, leaves, running)
    ones = [torch.ones(1, 1, 1, 1, dtype=case.dtype).expand(y.shape) for y in outputs]
    given = run(case, csp.ops, wide, running, ones)
    plain = run(case, csp.ops, {k: t.contiguous() for k, t in wide.items()}, running, [g.contiguous() for g in ones])
    for name, value in plain.items():
        torch.testing.assert_close(given[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, k=name: f"{k}: {m}")


def check_empty(case: Case) -> None:
    """No image: the right shapes, zero gradients."""
    leaves = {name: t.requires_grad_() for name, t in case.leaves().items()}
    outputs, stats = case(csp.ops, leaves, case.running())
    assert all(y.shape[0] == 0 for y in outputs) and stats.isfinite().all()
    sum(y.sum() for y in outputs).backward()
    assert all(t.grad is not None and t.grad.shape == t.shape and not t.grad.any() for t in leaves.values())


def check_storage_dtype(case: Case) -> None:
    """16-bit parameters count as their float32 values; their gradients are rounded."""
    leaves, running = case.leaves(), case.running()
    leaves = {name: t.to(case.dtype) for name, t in leaves.items()}
    full = {name: t if name in case.inputs else t.float() for name, t in leaves.items()}
    low, high = (run(case, csp.ops, values, running) for values in (leaves, full))
    for name, value in high.items():
        assert torch.equal(low[name], value.to(low[name].dtype)), name


def check_autocast(case: Case, backend: str) -> None:
    """float32 inputs run in the dtype of autocast, float64 ones as they are."""
    csp.use_backend(backend)
    leaves, running = {name: t.requires_grad_() for name, t in case.leaves().items()}, case.running()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = case(csp.ops, leaves, running)
        wide, _ = case(csp.ops, {name: t.double() for name, t in leaves.items()}, [t.double() for t in running])
    assert all(y.dtype == torch.bfloat16 for y in outputs) and all(y.dtype == torch.float64 for y in wide)
    sum(y.float().sum() for y in outputs).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves.values())
    if backend == "native":
        cast = {name: t.bfloat16() if name in case.inputs else t for name, t in leaves.items()}
        again, _ = case(csp.ops, cast, running)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


# --- the operators ---


def norm(prefix: str, channels: int) -> dict[str, Shape]:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def layer_shapes(layer: str, channels: int, layers: int, growth: int, width: int) -> dict[str, Shape]:
    """Parameters of dense layers; width: the bottleneck, or inter of a two-way layer."""
    shapes: dict[str, Shape] = {}
    for i in range(layers):
        k = channels + i * growth
        if layer == "pre":
            shapes |= {**norm(f"{i}.norm1", k), f"{i}.conv1.weight": (width, k, 1, 1)}
            shapes |= {**norm(f"{i}.norm2", width), f"{i}.conv2.weight": (growth, width, 3, 3)}
            continue
        for branch, convs in (("", 2),) if layer == "post" else (("branch1.", 2), ("branch2.", 3)):
            half = growth if layer == "post" else growth // 2
            sizes = [(width, k, 1, 1), (half, width, 3, 3), (half, half, 3, 3)][:convs]
            for j, size in enumerate(sizes, 1):
                shapes |= {f"{i}.{branch}conv{j}.weight": size, **norm(f"{i}.{branch}norm{j}", size[0])}
    return shapes


def transition_shapes(part: int, dense: int, mid: int, out: int, fusion: str, order: str) -> dict[str, Shape]:
    sizes = {"t": (mid, dense), "u": (out, part + (dense if fusion == "first" else mid))}
    absent = {"csp": "", "first": "t", "last": "u"}[fusion]
    shapes: dict[str, Shape] = {}
    for name, (rows, columns) in sizes.items():
        if name != absent:
            shapes |= {**norm(f"{name}.norm", rows if order == "post" else columns)}
            shapes[f"{name}.conv.weight"] = rows, columns, 1, 1
    return shapes


@dataclass(frozen=True)
class ConcatConvCase(Case):
    channels: tuple[int, ...] = (12, 5)
    out: int = 17

    @property
    def inputs(self) -> dict[str, int]:
        return {f"inputs.{i}": c for i, c in enumerate(self.channels)}

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"weight": (self.out, sum(self.channels), 1, 1), **norm("norm", self.out)}

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        return where.concat_conv(inputs, *params, running, frozen=self.flags[0], **self.options)


@dataclass(frozen=True)
class TransitionCase(Case):
    part: int = 12  # 0: None
    dense: int = 24
    mid: int = 17
    out: int = 20
    fusion: str = "csp"
    order: str = "post"
    pool: str | None = "avg"

    @property
    def inputs(self) -> dict[str, int]:
        return {"part": self.part, "dense": self.dense} if self.part else {"dense": self.dense}

    @property
    def shapes(self) -> dict[str, Shape]:
        return transition_shapes(self.part, self.dense, self.mid, self.out, self.fusion, self.order)

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        both = inputs if self.part else [None, *inputs]
        choices = {"fusion": self.fusion, "order": self.order, "pool": self.pool}
        return where.partial_transition(*both, params, running, **choices, frozen=self.flags, **self.options)


@dataclass(frozen=True)
class BlockCase(Case):
    """Dense layers; layer: post or two_way."""

    layer: str = "post"
    layers: int = 2
    channels: int = 24
    growth: int = 12
    width: int = 20

    @property
    def inputs(self) -> dict[str, int]:
        return {"x": self.channels}

    @property
    def shapes(self) -> dict[str, Shape]:
        return layer_shapes(self.layer, self.channels, self.layers, self.growth, self.width)

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        block = getattr(where, f"{self.layer}_dense_block")
        return block(*inputs, params, running, frozen=self.flags, **self.options)


@dataclass(frozen=True)
class StageCase(BlockCase):
    layer: str = "pre"
    part: int = 12
    mid: int = 17
    out: int = 20
    fusion: str = "csp"
    pool: str | None = "avg"

    @property
    def shapes(self) -> dict[str, Shape]:
        c = self.channels - self.part
        first = layer_shapes(self.layer, c, self.layers, self.growth, self.width)
        order, dense = "pre" if self.layer == "pre" else "post", c + self.layers * self.growth
        return {**first, **transition_shapes(self.part, dense, self.mid, self.out, self.fusion, order)}

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        choices = {"part_channels": self.part, "layer": self.layer, "fusion": self.fusion, "pool": self.pool}
        return where.csp_stage(*inputs, params, running, **choices, frozen=self.flags, **self.options)


@dataclass(frozen=True)
class GraphCase(Case):
    """Any stage."""

    graph: Graph = field(default_factory=lambda: dense_block(1, 24, 12, 20))

    @property
    def inputs(self) -> dict[str, int]:
        return {f"inputs.{i}": c for i, c in enumerate(self.graph.inputs)}

    @property
    def shapes(self) -> dict[str, Shape]:
        return dict(zip(*parameter_shapes(self.graph), strict=True))

    def call(self, where: Any, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> Any:
        function = csp.ops.stage if where is csp.ops else reference_stage
        return function(self.graph, inputs, params, running, frozen=self.flags, **self.options)
