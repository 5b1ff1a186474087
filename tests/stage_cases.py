"""Stages of every builder, and of joins that none has: random arguments, what the reference makes of them, and the
operators on the same arguments, whoever runs them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import tf32
import torch
from tolerances import error, limit
from torch import Tensor

from csp_kernels.ops._program import Moments, _fake, _fake_backward
from csp_kernels.reference.stage import stage as reference
from csp_kernels.stage.build import Builder, conv_norm, through_norm
from csp_kernels.stage.c2f import c2f
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.csp_residual_stage import csp_residual_stage
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Conv, Graph
from csp_kernels.stage.osa_block import osa_block
from csp_kernels.stage.partial_transition import add_partial_transition, partial_transition, transition
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.program import Program, Wanted
from csp_kernels.stage.text import encode
from csp_kernels.stage.two_way_dense_block import two_way_dense_block

sys.path.insert(0, str(Path(__file__).parent / "stage"))

from random_graphs import arguments as random_arguments

from csp_kernels.vocabulary import ACTIVATIONS


def seed() -> Tensor:
    """Of dropout."""
    return torch.tensor([0x1234567890ABCDE])


def joins(width: int = 8) -> Graph:
    """Activations of every kind in front of both kinds of products, sums of two and of three, several segments in front
    of a 3x3, a 3x3 of what was not normalised, siblings, an output that is pooled."""
    build = Builder(5, 6)
    x, other = build.read(0), build.read(1)
    a = build.conv([build.read(0, act="silu"), other], width)
    sibling = build.conv([build.read(0, act="silu"), other], width)
    b = build.conv([x, build.read(a, build.norm(width), "mish")], width, 3)
    c = build.sum([build.read(a), build.read(b, build.norm(width), "hardswish")], "relu")
    d = build.sum([build.read(c), build.read(sibling, build.norm(width)), build.read(b, act="relu")], "silu")
    e = build.conv([build.read(c)], width, 3)
    f = conv_norm(build, [build.read(e, act="leaky_relu", slope=0.2)], width, 3, "silu")
    build.write([f, build.read(d, act="relu")])
    build.write([build.read(c), build.read(b, start=3, stop=7)], pool=True)
    build.write([build.read(build.sum([build.read(d), build.read(c)]))])
    return build.graph()


def slices() -> Graph:
    """An input that lies in an output, of which a norm uses channels in the middle alone, beside one that stays where
    it is; a sum that reads a value three times, and is normalised; an output that reads a value twice; one that reads
    some of a value that nothing else reads."""
    build = Builder(12, 12)
    through = [replace(build.read(i, build.norm(6), "relu", start=3, stop=9), at=0) for i in (0, 1)]
    a = build.conv([build.read(0), *through], 8)
    thrice = build.sum([build.read(a)] * 3)
    b = build.conv([build.read(thrice, build.norm(8), "silu"), build.read(1)], 8)
    c, norm = build.conv([build.read(0)], 8), build.norm(8)
    d = build.conv([build.read(1)], 9, 3)
    build.write([build.read(0), build.read(b), build.read(thrice)])
    build.write([build.read(c, norm, "relu"), build.read(c, norm, "relu"), build.read(d, start=2, stop=6)])
    return build.graph()


def strides(channels: int = 10, width: int = 12, groups: int = 3) -> Graph:
    """A downsampling block of ResNeXt: a 3x3 and a 1x1 with stride 2 of several reads, groups with and without a
    stride, and what only inference adds up: residuals through norms and activations, behind a 3x3 and a 1x1."""
    build = Builder(channels, 6)
    x, other = build.read(0), build.read(1)
    down = conv_norm(build, [build.read(build.conv([x, other], width, 3, stride=2))], width)
    a = build.conv([x, build.read(1, build.norm(6), "silu")], width, stride=2)
    shortcut = build.read(a, build.norm(width), "leaky_relu", 0.1)
    first = build.sum([conv_norm(build, [down], width, 3, "silu", groups=groups), shortcut])
    second = build.sum([conv_norm(build, [build.read(first)], width, 1, "relu"), build.read(first)])
    wide = conv_norm(build, [build.read(0, build.norm(channels), "relu"), x], width)
    b = build.conv([wide, build.read(0, act="silu", stop=2 * groups)], 2 * groups, 3, stride=2, groups=groups)
    c = build.conv([build.read(b, build.norm(2 * groups), "relu")], width, 3, stride=2)
    d = build.conv([build.read(second, act="relu")], width, 1, stride=2)
    build.write([build.read(second), build.read(b)])
    build.write([build.read(build.sum([build.read(c), build.read(d)]), build.norm(width), "relu")])
    return build.graph()


def maxima(channels: int = 10, size: int = 5) -> Graph:
    """Of what is normalised and activated, of maxima, of what is read elsewhere; normalised themselves; strides."""
    build = Builder(channels)
    pooled = build.max_pool(conv_norm(build, [build.read(0)], channels, 1, "silu"), size)
    again = build.max_pool(build.read(pooled), size)
    small = build.max_pool(build.read(0), 3, stride=2)
    each = build.max_pool(build.read(again, act="relu", stop=4), 1, stride=2)
    build.write([conv_norm(build, [build.read(pooled, build.norm(channels), "relu"), build.read(again)], channels)])
    build.write([build.read(small, build.norm(channels)), build.read(each)])
    return build.graph()


def siblings() -> Graph:
    """Products of the same reads, side by side in an output through one norm."""
    build = Builder(12)
    values, norm = [build.conv([build.read(0)], 16) for _ in range(2)], build.norm(32)
    build.write([replace(build.read(v, norm, "relu", stop=16), at=16 * i) for i, v in enumerate(values)])
    return build.graph()


def csp_stage_of_3x3(in_channels: int = 12, part: int = 4, growth_rate: int = 8, layers: int = 2) -> Graph:
    """CSPNet's stage (arXiv 1911.11929, Eq. 4) with dense layers of another kind: two 3x3, and a shortcut around the
    second. All that a new kind of stage takes."""
    build = Builder(in_channels)
    features = [build.read(0, start=part)]
    for _ in range(layers):
        first = build.conv(through_norm(build, features), growth_rate, 3)
        second = build.conv(through_norm(build, [build.read(first)]), growth_rate, 3)
        features.append(build.read(build.sum([build.read(first), build.read(second)])))
    add_partial_transition(
        build, [build.read(0, stop=part)], features, 8, 16, fusion="csp", order="pre", pool=True
    )  # fmt: skip
    return build.graph()


GRAPHS: dict[str, Graph] = {  # the first one, which is quick, is enough for some tests at each change
    "dense, one layer": dense_block(1, 12, 8, 16),
    "dense": dense_block(2, 12, 8, 16),
    "dense, odd widths": dense_block(2, 5, 3, 11),
    "dropout": dense_block(2, 12, 8, 16, 0.4),
    "csp stage of 3x3": csp_stage_of_3x3(),
    "transition": transition(12, 6),
    "transition, no pool": transition(12, 6, False),
    "concat, one input": concat_conv([17], [12]),
    "concat, three inputs, two outputs": concat_conv([5, 21, 12], [16, 7], "leaky_relu", 0.1),
    "concat, unaligned outputs": concat_conv([5, 12], [5, 12], "silu"),
    **{f"concat, {act}": concat_conv([5, 12], [17], act, 0.1) for act in ACTIVATIONS},
    "post": post_dense_block(12, 8, [5, 16]),
    "two_way": two_way_dense_block(12, 8, [16]),
    **{
        f"partial, {fusion}, {order}{', pool' if pool else ''}": partial_transition(
            5, 12, 9, 11, fusion=fusion, order=order, pool=pool
        )
        for fusion in ("csp", "first", "last")
        for order in ("post", "pre")
        for pool in (True, False)
    },
    "partial, no bypass": partial_transition(0, 12, 9, 11),
    **{
        f"stage, {layer}, {fusion}": csp_stage(12, 5, 6, [8], 9, 11, layer=layer, fusion=fusion, pool=fusion != "last")
        for layer in ("pre", "post", "two_way")
        for fusion in ("csp", "first", "last")
    },
    "stage, no bypass": csp_stage(12, 0, 6, [8, 8], 9, 11),
    "residual stage": csp_residual_stage(12, 5, 9, 9, 6, 11, 2, "dark", 1, -1, ("leaky_relu",), "main_first"),
    "residual stage, bottleneck": csp_residual_stage(
        12, 5, 7, 9, 6, 11, 2, "bottleneck", split_acts=("silu", "identity")
    ),
    "C2f": c2f(10, 12, 2, True),
    "OSA": osa_block(10, 6, 10, 2, True),
    "joins": joins(),
    "slices": slices(),
    "siblings": siblings(),
    "maxima": maxima(),
    "strides": strides(),
}


# Of every kind one, where time is short.
KINDS = [
    "dense, odd widths", "dropout", "csp stage of 3x3", "transition", "concat, three inputs, two outputs",
    "concat, unaligned outputs", "post", "two_way", "partial, csp, pre, pool", "partial, first, post",
    "partial, last, pre", "stage, pre, csp", "stage, post, last", "stage, two_way, first", "residual stage", "joins",
    "slices", "siblings", "maxima", "strides",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    graph: Graph
    frozen: tuple[bool, ...] = (False,)  # repeated over the norms
    recompute: str = "none"
    dtype: torch.dtype = torch.float64
    size: tuple[int, int, int] = (2, 5, 4)  # N, H, W
    mean: float = 0.0
    std: float = 1.0
    wanted: Wanted | None = field(default=None, compare=False)  # all
    tf32: bool = False  # float32 whose products read 10 bits of each fraction

    @property
    def coarse(self) -> bool:
        """Whether many ReLUs change sides by rounding."""
        return self.dtype.itemsize == 2 or self.tf32

    @property
    def winograd(self) -> int:
        """See csp_kernels.ops._node.winograd."""
        return 4 if self.tf32 else 2

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def flags(self) -> tuple[bool, ...]:
        return tuple(self.frozen[i % len(self.frozen)] for i in range(len(self.graph.norms)))

    @property
    def program(self) -> Program:
        return compile_stage(self.graph, self.flags, self.wanted or Wanted.all(self.graph), self.recompute)

    @property
    def eps(self) -> list[float]:
        return [10.0 ** -(3 + i % 3) for i in range(len(self.graph.norms))]

    @property
    def reduction(self) -> int:
        """The longest sum."""
        n, h, w = self.size
        terms = [c.in_channels * c.kernel**2 for c in self.graph.nodes if isinstance(c, Conv)]
        return max([n * h * w, *terms])


@dataclass
class Arguments:
    """inputs channels_last in the case's dtype; the others as wide as it takes."""

    inputs: list[Tensor]
    params: list[Tensor]
    running: list[Tensor]
    grads: list[Tensor]


def packed(t: Tensor) -> Tensor:
    return t.detach().contiguous(memory_format=torch.channels_last)


def arguments(case: Case) -> Arguments:
    inputs, params, running = random_arguments(case.graph, case.flags)
    n, h, w = case.size
    inputs = [packed(torch.randn(n, t.shape[1], h, w) * case.std + case.mean).to(case.dtype) for t in inputs]
    cast = [t.to(case.wide) for t in params], [t.to(case.wide) for t in running]
    outputs = exact_outputs(case, inputs, *cast)
    return Arguments(inputs, *cast, [packed(torch.randn(y.shape).to(case.dtype)) for y in outputs])


def exact_outputs(case: Case, inputs: list[Tensor], params: list[Tensor], running: list[Tensor]) -> list[Tensor]:
    return reference(case.graph, inputs, params, running, frozen=case.flags, eps=case.eps, seed=seed())[0]


@dataclass
class Result:
    outputs: list[Tensor]
    stats: Tensor  # [2, channels of all norms] of those that train
    gradients: list[Tensor]  # of inputs, then parameters

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.outputs, self.stats, *self.gradients]


def live(case: Case, stats: Tensor) -> Tensor:
    """Columns of norms that are not frozen."""
    channels = zip(case.graph.norms, case.flags, strict=True)
    return stats[:, torch.tensor([not flag for count, flag in channels for _ in range(count)], dtype=torch.bool)]


def order_of(case: Case, program: Program) -> list[int]:
    """Which input, or which parameter behind them, each result of backward is the gradient of."""
    count = len(case.graph.inputs)
    weights = [weight.position for i in program.wanted.nodes if (weight := program.weights[i]) is not None]
    norms = [program.norms[i].position + k for i in program.wanted.norms for k in (0, 1)]
    return [*program.wanted.inputs, *(count + i for i in (*weights, *norms))]


class Operators(NamedTuple):
    """Who runs torch.ops.csp_kernels.stage and stage_backward.

    padding: whether nobody reads what is kept behind a value's channels.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    padding: bool = True


def run(operators: Operators, case: Case, a: Arguments, winograd: int | None = None) -> Result:
    """The operators one after the other: what is kept has NaN in its padding, nothing given is written to. winograd:
    instead of the case's."""
    program = case.program
    text = encode(program)
    rest = a.params, a.running, seed(), text, case.eps, case.winograd if winograd is None else winograd
    outputs, kept, stats = operators.forward(a.inputs, *rest)
    check_layout([*outputs, *kept, stats], flat(_fake(a.inputs, *rest)))
    padded = zip(kept, (b for b in program.buffers if b.kind == "kept"), strict=True) if operators.padding else ()
    for t, buffer in padded:
        t[:, buffer.channels :] = torch.nan
    given = [*a.grads, *a.inputs, *outputs, stats, *a.params, *a.running]
    before = [t.clone() for t in given]
    found = operators.backward(a.grads, a.inputs, outputs, kept, stats, *rest)
    assert all(map(torch.equal, before, given))
    check_layout(found, _fake_backward(a.grads, a.inputs, outputs, kept, stats, *rest))
    if case.size[0]:
        assert len({t.untyped_storage().data_ptr() for t in found}) == len(found), "gradients share memory"
    gradients = dict(zip(order_of(case, program), found, strict=True))
    return Result(outputs, live(case, Moments(text, stats).of(None)), [gradients[i] for i in sorted(gradients)])


def flat(values: Sequence[Any]) -> list[Tensor]:
    return [t for value in values for t in (value if isinstance(value, list) else [value])]


def check_layout(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for t, other in zip(tensors, expected, strict=True):
        assert (t.shape, t.dtype) == (other.shape, other.dtype) and (t.stride() == other.stride() or not t.numel())


def twin(case: Case, a: Arguments, wide: bool) -> Result:
    """The reference; wide: in float64."""
    cast = (lambda t: t.double()) if wide else (lambda t: t)
    count = len(a.inputs)
    leaves = [cast(t).detach().requires_grad_() for t in (*a.inputs, *a.params)]
    running = [cast(t) for t in a.running]
    with tf32.truncated() if case.tf32 and not wide else nullcontext():
        outputs, stats = reference(
            case.graph, leaves[:count], leaves[count:], running, frozen=case.flags, eps=case.eps, seed=seed()
        )
    grads = [g.to(y.dtype) for g, y in zip(a.grads, outputs, strict=True)]
    wanted = order_of(case, case.program)
    sources = [leaves[i] for i in sorted(wanted)]
    found = torch.autograd.grad(outputs, sources, grads, materialize_grads=True) if sources else ()
    return Result([y.detach() for y in outputs], live(case, stats), list(found))


def errors(got: Result, exact: Result, case: Case) -> list[float]:
    """Of outputs, statistics and gradients, each by its size, a norm's bias by its weight's if that is larger. In 16
    bits and in TF32, where ReLUs change sides by rounding, of all gradients together."""
    values = [error(y, other) for y, other in zip(got.outputs, exact.outputs, strict=True)]
    values += [error(got.stats, exact.stats)] if got.stats.numel() else []
    sizes = [g.double().norm().item() for g in exact.gradients]
    alike = [i > 0 and g.shape == exact.gradients[i - 1].shape for i, g in enumerate(exact.gradients)]
    scales = [max(size, sizes[i - 1]) if alike[i] else size for i, size in enumerate(sizes)]
    each = [error(*t) for t in zip(got.gradients, exact.gradients, scales, strict=True)]
    return values + (each if not case.coarse else [statistics.fmean(e * e for e in each) ** 0.5])


Judgement = tuple[list[float], list[float]]  # errors, and what is allowed of each


def measured(operators: Operators, case: Case, seeds: Sequence[int]) -> Judgement:
    """Allowed is twice the naive form's in the same dtype, both by their medians over the seeds. In 16 bits many ReLUs
    change sides, in either form: there a typical seed's gradients may be no worse than the naive form's worst."""
    runs = []
    for number in seeds:
        torch.manual_seed(number)
        a = arguments(case)
        exact = twin(case, a, True)
        runs.append((errors(run(operators, case, a), exact, case), errors(twin(case, a, False), exact, case)))
    ours, naive = ([statistics.median(e) for e in zip(*r, strict=True)] for r in zip(*runs, strict=True))
    if case.coarse:
        naive[-1] = max(values[-1] for _, values in runs)
    return ours, [limit(n, case.dtype, case.reduction) for n in naive]


def failures(found: Judgement) -> list[str]:
    """Those that are not within what is allowed, NaN among them."""
    return [f"{i}: {e:.1e}, allowed {b:.1e}" for i, (e, b) in enumerate(zip(*found, strict=True)) if not e <= b]


def too_large(operators: Operators, case: Case, seeds: Sequence[int]) -> list[str]:
    return failures(measured(operators, case, seeds))


def judged(operators: Operators, case: Case) -> Judgement:
    """By one seed where that leaves no doubt: a ReLU that changes sides by rounding does not count."""
    if case.coarse:
        return measured(operators, case, range(3))
    found = measured(operators, case, [0])
    return measured(operators, case, range(3)) if failures(found) else found


def compare(operators: Operators, case: Case) -> None:
    found = failures(judged(operators, case))
    assert not found, found


def all_together(operators: Operators, case: Case) -> None:
    """As `compare`, by the mean of all tensors: where much of float32 is lost whoever computes."""
    a = arguments(case)
    exact = twin(case, a, True)
    ours, naive = (statistics.fmean(errors(r, exact, case)) for r in (run(operators, case, a), twin(case, a, False)))
    assert ours <= limit(naive, case.dtype, case.reduction)


def infer(operators: Operators, case: Case, a: Arguments) -> list[Tensor]:
    """Outputs of the program without gradients, which keeps nothing."""
    text = encode(compile_stage(case.graph, case.flags))
    outputs, kept, _ = operators.forward(a.inputs, a.params, a.running, seed(), text, case.eps, case.winograd)
    assert not kept
    return list(outputs)


def judged_inference(operators: Operators, case: Case) -> Judgement:
    """Of outputs, by one seed."""
    a = arguments(case)
    exact, naive = twin(case, a, True).outputs, twin(case, a, False).outputs
    ours = infer(operators, case, a)
    bounds = [limit(error(near, far), case.dtype, case.reduction) for near, far in zip(naive, exact, strict=True)]
    return [error(y, far) for y, far in zip(ours, exact, strict=True)], bounds


def compare_inference(operators: Operators, case: Case) -> None:
    found = failures(judged_inference(operators, case))
    assert not found, found


def same_but_for_rounding(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """In float64."""
    return all(error(t, other) <= 1e-12 for t, other in zip(got, expected, strict=True))


def sliced(t: Tensor) -> Tensor:
    """The same values between NaN."""
    n, c, h, w = t.shape
    wide = torch.full((n, c + 7, h, w), torch.nan, dtype=t.dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 3 : 3 + c] = t
    return wide[:, 3 : 3 + c]


def from_slices(a: Arguments, gradients: bool = True) -> Arguments:
    """Inputs and gradients with pixels further apart than their channels; weights as channels_last models have them."""
    turned = [packed(p) if p.dim() == 4 else p for p in a.params]
    return Arguments([sliced(t) for t in a.inputs], turned, a.running, [sliced(g) if gradients else g for g in a.grads])
