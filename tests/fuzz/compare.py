"""Random comparison of every layer with its plain PyTorch twin in float64.

python tests/fuzz/compare.py --cases 50000 [--seed 0] [--layers DenseBlock ConcatConv] [--minutes 30] [--only SEED]

A seed is a case: the layer, its sizes, dtypes, memory layouts, modes of its norms, what wants gradients, threads.
Outputs, gradients, running statistics and counters are compared; a failure prints its seed, and --only runs it again.
Exit status 1 if a case fails. To go on after an interruption, pass the seed that was last printed.

float64: 1e-8. Other dtypes: no worse than a few times the twin in the same dtype (and FLOOR of tests/tolerances.py), by
the median of five draws of values where one leaves a doubt. Fresh memory is NaN.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # more threads than cores must not spin; read when torch is imported

import argparse
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `tolerances`

import torch
from modes import norms, outputs
from tolerances import error, high_limit, limit
from torch import Tensor, nn

import csp_kernels as csp
from csp_kernels.vocabulary import ACTIVATIONS, BLOCKS

LAYERS = ("DenseBlock", "PostDenseBlock", "TwoWayDenseBlock", "Transition", "ConcatConv", "PartialTransition",
          "CSPDenseStage", "CSPStage")  # fmt: skip
PLAIN = ("Transition", "CSPStage")  # plain PyTorch in places: parameters in the dtype of x
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 16, 17, 20, 24, 31, 32, 32, 33, 40, 48, 64, 65)
GROWTHS = (1, 2, 3, 4, 5, 7, 8, 8, 12, 15, 16, 16, 17, 20, 32, 32, 33, 48)
SIDES = (1, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 10, 11, 13, 14, 15, 17, 20, 28)
LAYOUTS = ("NCHW", "NHWC", "slice of NCHW", "slice of NHWC", "window", "transposed", "expanded")
WANTED = ((1, 1, 1), (0, 1, 1), (1, 0, 1), (0.5, 0.5, 1), (1, 1, 0.5), (0.5, 1, 0.5))
EXACT = 1e-8  # in float64
MULTIPLE = {2: 8, 4: 4, 8: 0}  # of the twin's error in the same dtype, by its bytes
ROUNDS = 5
Errors = dict[str, tuple[float, float, float]]  # name -> (ours, the twin's in this dtype, allowed beside that)


@dataclass
class Case:
    """All that a seed decides, values apart."""

    seed: int
    layer: str
    arguments: dict[str, Any]
    channels: list[int]  # of the inputs; 0: None
    batch: list[int]  # of each step
    height: int
    width: int
    dtype: torch.dtype
    wide: bool  # float32 parameters with 16-bit inputs
    precision: str
    threads: int
    layout: str
    gradient_layout: str
    mean: float
    std: float
    kinks: bool  # False: biases keep activations away from their kinks
    training: bool
    norms: list[dict[str, Any]] = field(repr=False)
    wanted: tuple[float, float, float]  # shares of parameters, inputs and outputs that have a gradient
    context: str  # grad, no_grad, inference
    autocast: bool
    repeat: bool

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else self.dtype

    def __str__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        kind = str(self.dtype).removeprefix("torch.") + (", float32 parameters" if self.wide else "")
        rest = [self.precision, f"threads {self.threads}", self.layout, f"gradient {self.gradient_layout}"]
        rest += [f"mean {self.mean:g}", f"std {self.std:g}", self.context]
        rest += [name for name in ("training", "kinks", "autocast", "repeat") if getattr(self, name)]
        return f"--only {self.seed}: {self.layer}({arguments}) of {size}, {kind}, {', '.join(rest)}"


# --- a seed's case ---


def arguments(rng: random.Random, layer: str) -> tuple[dict[str, Any], list[int]]:
    """Of the constructor, and the channels of the inputs."""
    c = rng.choice(CHANNELS)
    growth = rng.choice(GROWTHS)
    layers = rng.choice((1, 1, 2, 2, 3, 4))
    if layer in ("DenseBlock", "PostDenseBlock"):
        made: dict[str, Any] = {"num_layers": layers, "in_channels": c, "growth_rate": growth}
        made["bn_size"] = rng.choice((1, 2, 3, 4))
        if layer == "DenseBlock":
            made["recompute"] = rng.choice(("none", "bottleneck"))
        return made, [c]
    if layer == "TwoWayDenseBlock":
        width = rng.choice((0.5, 1, 2, 4))
        return {"num_layers": layers, "in_channels": c, "growth_rate": 2 * growth, "bottleneck_width": width}, [c]
    if layer == "Transition":
        return {"in_channels": c, "out_channels": rng.choice(CHANNELS), "pool": rng.choice(("avg", None))}, [c]
    if layer == "ConcatConv":
        sizes = [rng.choice(CHANNELS) for _ in range(rng.choice((1, 2, 2, 3, 5)))]
        splits = [rng.choice(CHANNELS) for _ in range(rng.choice((1, 1, 2, 3)))]
        out = splits[0] if len(splits) == 1 and rng.random() < 0.8 else splits
        act = {"act": rng.choice(ACTIVATIONS), "negative_slope": rng.choice((0.01, 0.1, 0.3))}
        return {"in_channels": sizes, "out_channels": out, **act}, sizes
    fusion, pool = rng.choice(("csp", "first", "last")), rng.choice(("avg", None))
    if layer == "PartialTransition":
        part, dense, mid, out = (rng.choice(CHANNELS) for _ in range(4))
        part = 0 if rng.random() < 0.2 else part
        out = part + mid if fusion == "last" else out
        made = {"part_channels": part, "dense_channels": dense, "mid_channels": mid, "out_channels": out}
        return {**made, "fusion": fusion, "pool": pool, "order": rng.choice(("pre", "post"))}, [part, dense]
    if layer == "CSPDenseStage":
        c = max(2, c)
        kind, part = rng.choice(("pre", "post", "two_way")), rng.choice((0, *range(1, c)))
        out = rng.choice(CHANNELS) + (part if fusion == "last" else 0)
        made = {"in_channels": c, "out_channels": out, "num_layers": layers, "part_ratio": part / c}
        made |= {"growth_rate": 2 * growth if kind == "two_way" else growth, "bn_size": rng.choice((1, 2, 4))}
        made |= {"layer": kind, "fusion": fusion, "pool": pool, "recompute": rng.choice(("none", "bottleneck"))}
        return made, [c]
    c = max(2, c)
    made = {"in_channels": c, "out_channels": rng.choice(CHANNELS), "num_blocks": rng.choice((1, 2))}
    made |= {"block": rng.choice(BLOCKS), "act": rng.choice(ACTIVATIONS)}
    made |= {"stride": rng.choice((1, 2)), "order": rng.choice(("main_first", "part_first"))}
    made |= {"width": rng.choice(CHANNELS), "mid_channels": rng.choice(CHANNELS)}
    if rng.random() < 0.3:
        made |= {"split": "slice", "part_channels": rng.randrange(1, c)}
    else:
        made |= {"part_channels": rng.choice(CHANNELS), "entry_channels": rng.choice(CHANNELS)}
    return made, [c]


def norm_settings(rng: random.Random, count: int, low: bool) -> list[dict[str, Any]]:
    """Attributes of each norm, training among them. low: 16 bits, where every norm needs its bias against kinks."""
    training = rng.choices(("all", "none", "mixed"), (6, 1, 2))[0]
    momentum = rng.choices(((0.1,), (None,), (0.1, 0.3, None, 1.0, 0.0)), (6, 2, 2))[0]
    eps = (1e-5,) if rng.random() < 0.7 else (1e-5, 1e-3, 0.1)
    affine = 1.0 if low else rng.choices((1.0, 0.0, 0.5), (8, 1, 1))[0]
    tracked = rng.choices((1.0, 0.0, 0.7), (8, 1, 1))[0]
    made = []
    for _ in range(count):
        one: dict[str, Any] = {"momentum": rng.choice(momentum), "eps": rng.choice(eps)}
        one["training"] = {"all": True, "none": False, "mixed": rng.random() < 0.5}[training]
        if rng.random() >= affine:
            one |= {"weight": None, "bias": None}
        if rng.random() >= tracked:
            off = rng.choice(("built without", "switched off", "no counter"))
            if off == "built without":
                one |= {"running_mean": None, "running_var": None}
            if off != "switched off":
                one["num_batches_tracked"] = None
            one["track_running_stats"] = off == "no counter"
        made.append(one)
    return made


def make_case(seed: int) -> Case:
    rng = random.Random(seed)
    layer = rng.choice(LAYERS)
    made, channels = arguments(rng, layer)
    dtype = rng.choices((torch.float64, torch.float32, torch.bfloat16, torch.float16), (4, 4, 2, 2))[0]
    if layer == "CSPStage" and dtype.itemsize == 2:  # PyTorch's own 3x3 gives NaN from memory beside x
        dtype = torch.float32
    autocast = dtype == torch.float32 and layer != "CSPStage" and rng.random() < 0.1
    low = dtype.itemsize == 2 or autocast
    wide = dtype.itemsize == 2 and layer not in PLAIN and rng.random() < 0.5
    threads = rng.choices((1, 2, 3, 5), (16, 2, 1, 1))[0]
    height, width = rng.choice(SIDES), rng.choice(SIDES)
    if rng.random() < 0.1:
        height = width = 1
    with torch.device("meta"):
        module = twin(layer, made, True)
    settings = norm_settings(rng, len(list(norms(module))), low)
    training = rng.random() < 0.8
    settings = settings if training or rng.random() < 0.5 else [{**s, "training": False} for s in settings]
    halved = made.get("pool") == "avg" or made.get("stride") == 2
    if halved:
        height, width = max(2, height), max(2, width)
    # work: small, and now and then, or for several threads, enough that they share it
    large = threads > 1 or rng.random() < 0.02
    weights = sum(p.numel() for p in module.parameters())
    most = (1e7 if large else 5e5) / weights
    batch = rng.choice((1, 1, 2, 2, 3, 4, 5))
    if large:
        height, width = max(height, 9), max(width, 9)
    while batch > 1 and batch * height * width > most:
        batch -= 1
    while height * width > max(most, 4):
        height, width = (max(2, height // 2), width) if height > width else (height, max(2, width // 2))
    pixels = (height // 2) * (width // 2) if halved else height * width
    alone = training or any(s["training"] or "running_mean" in s for s in settings)
    # few values cancel
    deep = layer == "CSPStage"  # norms behind norms: what one loses the next enlarges
    fewest = 64 if low or (deep and dtype == torch.float32) else 16 if dtype != torch.float64 else 2 if alone else 1
    batch = max(batch, -(-fewest // pixels))
    steps = rng.choices((1, 2, 3), (6, 3, 1))[0]
    batches = [batch + rng.randrange(2) * step for step in range(steps)]
    elements = batches[-1] * height * width * sum(s.num_features for s in norms(module))
    plain = all("bias" not in s for s in settings)  # a bias in every norm
    kinks = not low and (not plain or elements < 2e4 or dtype == torch.float64) and rng.random() < 0.7
    kinks = kinks or not plain
    mean, std = rng.choices(((0.0, 1.0), (3.0, 2.0), (1000.0, 0.01), (0.0, 1e-3)), (6, 2, 2, 1))[0]
    pre = layer in ("DenseBlock", "Transition") or "pre" in (made.get("order"), made.get("layer"))
    if mean > 10 and not pre:  # the gradients of the convolution in front cancel
        mean, std = 30.0, 0.1
    if low or (dtype == torch.float32 and not all(s["training"] for s in settings)):
        mean, std = rng.choice(((0.0, 1.0), (3.0, 2.0)))
    wanted = rng.choices(WANTED, (6, 1, 1, 1, 1, 1))[0]
    context = rng.choices(("grad", "no_grad", "inference"), (8, 1, 1))[0]
    return Case(
        seed=seed, layer=layer, arguments=made, channels=channels, batch=batches, height=height, width=width,
        dtype=dtype, wide=wide, precision=rng.choices(("highest", "high"), (3, 1))[0], threads=threads,
        layout=rng.choice(LAYOUTS if pixels >= 6 else LAYOUTS[:-1]),  # some values have to differ
        gradient_layout=rng.choice(LAYOUTS if min(height, *batches) > 1 else LAYOUTS[:-1]),
        mean=mean, std=std, kinks=kinks,
        training=training, norms=settings, wanted=wanted, context=context,
        autocast=autocast, repeat=rng.random() < 0.1,
    )  # fmt: skip


# --- modules and values ---


def twin(layer: str, made: dict[str, Any], naive: bool) -> Any:
    """The layer, or the module that it is compared with; CSPStage is its own, on the reference backend."""
    made = dict(made)
    if naive and layer == "DenseBlock":
        del made["recompute"]
    return getattr(csp.reference if naive and layer != "CSPStage" else csp, layer)(**made)


def call(module: nn.Module, layer: str, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return outputs(module, [inputs] if layer == "ConcatConv" else inputs)


def images(case: Case, step: int, generator: torch.Generator) -> list[Tensor | None]:
    """float64 values of the inputs' dtype."""
    made: list[Tensor | None] = []
    for c in case.channels:
        x = torch.randn(case.batch[step], c, case.height, case.width, generator=generator, dtype=torch.float64)
        x = (x * case.std + case.mean).to(case.dtype).double()
        x = x[:1].expand(x.shape) if case.layout == "expanded" and case.batch[step] > 1 else x
        made.append(x if c else None)
    return made


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides, among NaN."""
    n, c, h, w = x.shape
    if layout == "expanded":
        return x
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "window":
        whole = x.new_full((n, c, h + 2, w + 3), math.nan)
        part = whole[:, :, 1:-1, 1:-2]
    elif "slice" in layout:
        whole = x.new_full((n, 2 * c, h, w), math.nan)
        part = (whole.contiguous(memory_format=torch.channels_last) if "NHWC" in layout else whole)[:, c:]
    else:
        return x.contiguous(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format)
    return part.copy_(x)


def exact_module(case: Case, inputs: Sequence[Tensor | None], generator: torch.Generator) -> Any:
    """The twin in float64: random parameters of the parameters' dtype, running statistics near those of the inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        module = twin(case.layer, case.arguments, True).double()
        for norm in norms(module):
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
            if not case.kinks and case.arguments.get("act") != "hardswish":  # its kinks are at -3 and 3
                norm.weight.data.mul_(0.5)
                far = 3.0 if case.arguments.get("act") == "relu6" else 4.0  # from 0, and from 6
                norm.bias.data = torch.where(torch.arange(norm.num_features) % 4 == 3, -far, far).double()
            elif not case.kinks:
                norm.weight.data.mul_(0.3)
        x = next(t for t in inputs if t is not None)
        if any(not s["training"] for s in case.norms) and x.numel() // x.shape[1] >= 8:
            with torch.no_grad(), csp.use_backend("reference"):
                call(module, case.layer, inputs)
        for norm in norms(module):
            norm.running_mean.add_(norm.running_var.sqrt() * 0.1 * torch.randn(norm.num_features))
            norm.running_var.mul_(torch.rand(norm.num_features) * 0.6 + 0.7)
            norm.num_batches_tracked.fill_(int(torch.randint(4, ())))
        for t in (*module.parameters(), *module.buffers()):
            t.data = t.to(case.parameter_dtype).to(t.dtype) if t.is_floating_point() else t.data
    return module


def settle(case: Case, module: nn.Module) -> nn.Module:
    """The modes of the norms, and the parameters without gradients."""
    rng = random.Random(case.seed)
    module.train(case.training)
    for norm, settings in zip(norms(module), case.norms, strict=True):
        for name, value in settings.items():
            setattr(norm, name, value)
    for p in module.parameters():
        p.requires_grad_(rng.random() < case.wanted[0])
    return module


@contextmanager
def surroundings(case: Case, backend: str, exact: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(csp.use_backend(backend))
        if case.context != "grad":
            stack.enter_context(torch.no_grad() if case.context == "no_grad" else torch.inference_mode())
        if case.autocast and not exact:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        torch.set_float32_matmul_precision(case.precision if backend == "native" else "highest")
        yield


Results = dict[str, Tensor]


def run(
    case: Case, draw: int, module: nn.Module, backend: str, dtype: torch.dtype, given: list[list[Tensor | None]]
) -> Results:
    """Outputs and gradients of every step, gradients and buffers at the end, by name."""
    found: Results = {}
    rng = random.Random(case.seed + 1)
    exact = dtype == torch.float64 != case.dtype
    for step, inputs in enumerate(given):
        leaves: list[Tensor | None] = []
        for x in inputs:
            x = None if x is None else laid_out(x.to(dtype), case.layout)
            if x is not None and rng.random() < case.wanted[1] and case.context == "grad":
                x = x.detach().requires_grad_()
            leaves.append(x)
        with surroundings(case, backend, exact):
            results = call(module, case.layer, leaves)
        if not case.autocast:
            assert all(y.dtype == dtype for y in results), f"dtypes {[y.dtype for y in results]}, expected {dtype}"
        for i, y in enumerate(results):
            entering = case.channels[0] if case.layer.endswith("Block") else 0  # returned as they are
            found[f"step {step} output {i} input"] = y[:, :entering].detach()
            found[f"step {step} output {i}"] = y[:, entering:].detach()
        chosen = [y for y in results if rng.random() < case.wanted[2]]
        if not all(y.requires_grad for y in chosen):
            assert not any(y.requires_grad for y in chosen)
            chosen = []
        generator = torch.Generator().manual_seed(1000003 * case.seed + 10 * draw + step + 5)
        grads = []
        for y in chosen:
            g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(case.dtype)
            if case.gradient_layout == "expanded":
                g = g[..., :1].expand(g.shape)
            grads.append(laid_out(g.to(y.dtype), case.gradient_layout))
        if chosen:
            with csp.use_backend(backend):
                torch.autograd.backward(chosen, grads)
        for i, (x, before) in enumerate(zip(leaves, inputs, strict=True)):
            if x is not None and before is not None:
                assert torch.equal(x.detach().double(), before.to(dtype).double()), f"input {i} was changed"
                if x.grad is not None:
                    assert x.grad.dtype == x.dtype
                    found[f"step {step} gradient of input {i}"] = x.grad
    for name, p in module.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == p.dtype and p.grad.shape == p.shape
            found[f"gradient of {name}"] = p.grad
    found |= {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
    return found


# --- comparison ---


def kind(name: str, t: Tensor) -> str:
    if not name.startswith("gradient"):
        return "input" if "gradient of input" in name else "other"
    return "weight" if t.dim() == 4 else "norm"


def scales(case: Case, exact: Results) -> dict[str, float]:
    """Size of each tensor. A gradient that cancels counts as its like: others of inputs, convolutions, norms."""
    rms: dict[str, float] = {}
    sizes = {name: t.double().norm().item() for name, t in exact.items()}
    for name, t in exact.items():
        if t.numel() and "gradient" in name:
            which = "all" if case.dtype == torch.float64 else kind(name, t)
            rms[which] = max(rms.get(which, 0.0), sizes[name] / t.numel() ** 0.5)
    for name, t in exact.items():
        if "gradient" in name:
            floor = 1e-4 * rms.get("all", 0) if case.dtype == torch.float64 else rms.get(kind(name, t), 0)
            sizes[name] = max(sizes[name], floor * t.numel() ** 0.5)
        elif "running_mean" in name:  # counts beside the deviations
            sizes[name] = max(sizes[name], exact[name.replace("running_mean", "running_var")].sqrt().norm().item())
    return sizes


def shift_invariant(case: Case) -> bool:
    """A large mean of the inputs cancels in every norm before anything is rounded: no reason for a larger error."""
    first = case.layer == "DenseBlock" or "pre" in (case.arguments.get("order"), case.arguments.get("layer"))
    return case.mean > 100 and first and case.dtype == torch.float32


def measure(case: Case, draw: int) -> Errors:
    """One draw of values. Raises AssertionError for what no rounding explains."""
    generator = torch.Generator().manual_seed(1000003 * case.seed + draw)
    given = [images(case, step, generator) for step in range(len(case.batch))]
    exact_module_ = exact_module(case, given[0], generator)
    mine = twin(case.layer, case.arguments, False).to(case.parameter_dtype)
    mine.load_state_dict(exact_module_.state_dict())
    settle(case, mine)
    before = {name: b.clone() for name, b in mine.named_buffers()}

    def fresh() -> nn.Module:
        for name, buffer in mine.named_buffers():
            buffer.copy_(before[name])
        mine.zero_grad()
        return mine

    rounded = given
    if case.autocast and case.layer not in PLAIN:
        rounded = [[None if x is None else x.bfloat16().double() for x in step] for step in given]
    exact = run(case, draw, settle(case, exact_module_), "reference", torch.float64, rounded)
    torch.set_num_threads(case.threads)
    try:
        ours = run(case, draw, mine, "native", case.dtype, given)
        if case.repeat:
            for name, t in run(case, draw, fresh(), "native", case.dtype, given).items():
                assert torch.equal(t, ours[name]), f"{name} differs when repeated"
    finally:
        torch.set_num_threads(1)
    assert ours.keys() == exact.keys(), f"{sorted(ours.keys() ^ exact.keys())} in one of both"
    if case.dtype == torch.float64:
        theirs = exact
    else:
        if shift_invariant(case):
            near = [[None if x is None else x - case.mean for x in step] for step in given]
            theirs = run(case, draw, fresh(), "reference", case.dtype, near)
            unshifted = run(case, draw, fresh(), "reference", case.dtype, given)
            theirs |= {name: t for name, t in unshifted.items() if "gradient" not in name}
        else:
            theirs = run(case, draw, fresh(), "reference", case.dtype, given)
    return errors(case, ours, theirs, exact, mine)


def errors(case: Case, ours: Results, theirs: Results, exact: Results, module: nn.Module) -> Errors:
    sizes, found = scales(case, exact), {}
    fans = [p[0].numel() for p in module.parameters() if p.dim() == 4]
    reduction = max(case.batch[-1] * case.height * case.width, *fans)
    dtype = torch.bfloat16 if case.autocast else case.dtype
    lost = case.mean / case.std  # what a product rounds, beside its deviations
    for name, far in exact.items():
        if "num_batches_tracked" in name:
            assert torch.equal(ours[name], far), f"{name}: got {ours[name].item()}, expected {far.item()}"
            continue
        if name.endswith(" input"):
            x = far.to(torch.bfloat16).double() if case.autocast else far
            assert torch.equal(ours[name].double(), x), f"{name}: channels of x have changed"
            continue
        extra = limit(0, dtype, reduction) if dtype != torch.float64 else EXACT * max(1.0, lost)
        if dtype == torch.float32 and case.precision == "high":
            extra += high_limit(reduction, lost)
        if dtype.itemsize == 2:  # one rounding
            extra += (16 if "buffer" in name else 1) * torch.finfo(dtype).eps
        if dtype != torch.float64 and kind(name, far) == "weight" and far[0].numel() == 1:
            continue  # batch norms cancel it
        found[name] = error(ours[name], far, sizes[name]), error(theirs[name], far, sizes[name]), extra
    return found


def chained(case: Case) -> float:
    """Each 3x3 of a chain, by Winograd, may lose more than the direct form does, most on maps of a pixel or two; so may
    the next one again, of what the one before gave. Of a gradient that is the same everywhere the norm in front of it
    leaves what rounding makes of it: PyTorch adds it up in float64."""
    if case.layer != "CSPStage":
        return 1.25 if case.training and case.gradient_layout == "expanded" else 1.0
    made = case.arguments
    return 1 + made["num_blocks"] * (2 if made["block"] == "basic" else 1) / 2


def too_large(case: Case, draws: Sequence[Errors]) -> list[str]:
    """By the medians over the draws of values; what is not finite, always."""
    found = []
    for name in draws[0]:
        ours, naive = (statistics.median(d[name][i] for d in draws) for i in (0, 1))
        allowed = MULTIPLE[2 if case.autocast else case.dtype.itemsize] * naive * chained(case) + draws[0][name][2]
        if not ours <= allowed or any(math.isnan(d[name][0]) > math.isnan(d[name][1]) for d in draws):
            found.append(f"{name}: error {ours:.1e}, allowed {allowed:.1e}")
    return found


def check(case: Case) -> str:
    """What is wrong; "" if nothing is."""
    try:
        draws = [measure(case, 0)]
        found = too_large(case, draws)
        if found and case.dtype != torch.float64 and not any("nan" in text for text in found):
            draws += [measure(case, draw) for draw in range(1, ROUNDS)]
            found = too_large(case, draws)
    except Exception as problem:  # whatever a layer does, the seed is to be told
        found = [f"{type(problem).__name__}: {problem}"]
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} others" if len(found) > 4 else "")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, as in tests/conftest.py; one thread outside of the layers."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def compare(seeds: Sequence[int], layers: Sequence[str] = LAYERS) -> list[str]:
    """The failures of these seeds, each a line that begins with what repeats it."""
    failures = []
    with poisoned():
        for seed in seeds:
            case = make_case(seed)
            if case.layer in layers:
                problem = check(case)
                if problem:
                    failures.append(f"{case}: {problem}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these")
    parser.add_argument("--only", type=int, help="one seed")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.cases) if given.only is None else range(given.only, given.only + 1)
    start, failures = time.monotonic(), 0
    for i in range(0, len(seeds), 100):
        for line in compare(seeds[i : i + 100], given.layers):
            failures += 1
            print(line, flush=True)
        done, minutes = min(i + 100, len(seeds)), (time.monotonic() - start) / 60
        if done % 1000 == 0 or done == len(seeds) or minutes > given.minutes:
            print(f"seeds {seeds[0]} to {seeds[done - 1]}: {failures} failed, {minutes:.1f} minutes", flush=True)
        if minutes > given.minutes:
            break
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
