"""What benchmarks/gpu_correctness.py checks, most valuable first: whole layers of the widths that networks have, small
graphs that run one kernel family or one instruction and little else, then every stage of tests/stage_cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import stage_cases
from stage_cases import GRAPHS, KINDS, Case
from torch import Tensor

import csp_kernels as csp
from csp_kernels.stage.build import Builder
from csp_kernels.stage.compile import compile_stage
from csp_kernels.stage.concat_conv import concat_conv
from csp_kernels.stage.csp_stage import csp_stage
from csp_kernels.stage.dense_block import dense_block
from csp_kernels.stage.graph import Graph
from csp_kernels.stage.partial_transition import partial_transition, transition
from csp_kernels.stage.post_dense_block import post_dense_block
from csp_kernels.stage.program import Program
from csp_kernels.stage.text import encode
from csp_kernels.stage.two_way_dense_block import two_way_dense_block
from csp_kernels.vocabulary import ACTIVATIONS

TYPES: dict[str, dict[str, Any]] = {  # name -> what of a Case
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "tf32": {"dtype": torch.float32, "tf32": True},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
}
CONVOLUTIONS = ("forward", "dgrad", "wgrad")  # launchers of csp_kernels.kernels.cuda


@dataclass(frozen=True)
class Check:
    """One comparison with float64. family: of kernels, an instruction or a layer. kind: see TYPES. backend: "triton",
    or "native": CUDA C++ where it takes a layer, on the CPU C++. takes: the launchers of CUDA C++ that must run."""

    family: str
    name: str
    case: Case
    kind: str
    backend: str
    training: bool
    takes: tuple[str, ...] = ()

    @property
    def label(self) -> dict[str, str]:
        where = "training" if self.training else "inference"
        return {
            "family": self.family, "case": self.name, "dtype": self.kind, "backend": self.backend, "pass": where,
        }  # fmt: skip

    def __str__(self) -> str:
        return ", ".join(self.label.values())

    @property
    def program(self) -> Program:
        return self.case.program if self.training else compile_stage(self.case.graph, self.case.flags)

    def run(self, device: str) -> dict[str, Any]:
        """The line of results; raises what the kernels raise."""
        ops = torch.ops.csp_kernels
        gpu = device == "cuda"
        operators = stage_cases.Operators(ops.stage.default, ops.stage_backward.default, padding=gpu)
        judge = stage_cases.judged if self.training else stage_cases.judged_inference
        with ExitStack() as stack:
            ran = _watch(stack, "layer" in self.takes) if self.takes and gpu else set(self.takes)
            stack.enter_context(csp.use_backend(self.backend))
            found = judge(operators, self.case)
        wrong = [f"{name} of CUDA C++ did not run" for name in self.takes if name not in ran]
        wrong += stage_cases.failures(found)
        errors, allowed = found
        message = "; ".join(wrong)
        return {**self.label, "errors": errors, "allowed": allowed, "ok": not wrong, "message": message}

    def launch(self) -> None:
        """Launches the Triton kernels that `run` launches on a GPU, on tensors of the CPU that nobody reads or writes:
        for csp_kernels.kernels.dry_run."""
        from csp_kernels.kernels import stage

        case, (n, h, w) = self.case, self.case.size
        images, params, running = stage_cases.random_arguments(case.graph, case.flags)
        inputs = [blank(n, t.shape[1], h, w, case.dtype) for t in images]
        cast = [t.to(case.wide) for t in params], [t.to(case.wide) for t in running]
        rest = *cast, stage_cases.seed(), encode(self.program), case.eps, case.winograd
        outputs, kept, stats = stage.forward(inputs, *rest)
        if self.training:
            stage.backward([torch.empty_like(y) for y in outputs], inputs, outputs, kept, stats, *rest)


def blank(n: int, channels: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, channels, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _watch(stack: ExitStack, layer: bool) -> set[str]:
    """The launchers of CUDA C++ that run while the stack is open. layer: whole layers take their one kernel, whether it
    is estimated to be faster or not."""
    from csp_kernels.kernels import cuda

    ran: set[str] = set()

    def watched(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            ran.add(name)
            return launcher(*given)

        return call

    for name in (*CONVOLUTIONS, "layer"):
        stack.enter_context(patch.object(cuda, name, watched(name, getattr(cuda, name))))
    if layer:
        stack.enter_context(patch.object(cuda, "takes_layer", lambda *_: True))
    return ran


# --- graphs that run one kernel family, or one instruction, and little else ---


def one(node: Callable[[Builder], int], *channels: int) -> Graph:
    """An output that reads one node."""
    build = Builder(*channels)
    value = node(build)
    build.write([build.read(value)])
    return build.graph()


def product(kernel: int, *channels: int, out: int = 16) -> Graph:
    """A convolution of all inputs side by side."""
    return one(lambda b: b.conv([b.read(i) for i in range(len(channels))], out, kernel), *channels)


def read(channels: int, normed: bool, act: str = "identity", pool: bool = False) -> Graph:
    """An output that reads an input through a norm, an activation, 2x2 averages."""
    build = Builder(channels)
    build.write([build.read(0, build.norm(channels) if normed else None, act, 0.1)], pool=pool)
    return build.graph()


def total(terms: int, act: str) -> Graph:
    return one(lambda b: b.sum([b.read(i, act=ACTIVATIONS[i % 4]) for i in range(terms)], act), *[24] * terms)


def copied() -> Graph:
    """An input beside a product of it, in one output."""
    build = Builder(8)
    build.write([build.read(0), build.read(build.conv([build.read(0)], 8))])
    return build.graph()


def partly_read() -> Graph:
    """A value of which nothing reads the ends."""
    build = Builder(8)
    build.write([build.read(build.conv([build.read(0)], 9, 3), start=2, stop=6)])
    return build.graph()


FAMILIES: dict[str, dict[str, Graph]] = {
    "mix": {
        "1x1": product(1, 24), "1x1 of three, odd": product(1, 5, 17, 12, out=11),
        "1x1, 320 to 136": product(1, 320, out=136), "norm, 1x1, pool": transition(40, 24),
    },
    "conv3x3": {
        "3x3": product(3, 24), "3x3 of two, odd": product(3, 5, 12, out=7), "3x3, 72 to 40": product(3, 72, out=40),
    },
    "activate": {
        **{act: read(24, True, act) for act in ACTIVATIONS}, "silu, pool, no norm": read(9, False, "silu", True),
    },
    "elementwise": {"two": total(2, "relu"), "five": total(5, "silu")},
    "statistics": {"copy of 70": read(70, False), "norm of 70": read(70, True)},
    "norm": {"norm, relu": read(24, True, "relu"), "norm, relu, pool": read(21, True, "relu", True)},
}  # fmt: skip
INSTRUCTIONS: dict[str, Graph] = {
    "Copy": copied(), "Measure": read(24, True), "Fill": read(24, True, "relu"), "Product": product(1, 24),
    "Bottleneck": dense_block(1, 16, 16, 32), "Add": total(2, "identity"), "Activate": read(24, False, "silu"),
    "Settle": read(24, True), "Clear": partly_read(), "ActivateBackward": read(24, False, "silu"),
    "ProductBackward": product(1, 24), "AddBackward": total(2, "relu"), "Finish": read(24, True),
}  # fmt: skip
LAYERS: dict[tuple[str, str], Graph] = {  # (family, name)
    ("dense_block", "3 layers of 32 from 64, bottleneck 128"): dense_block(3, 64, 32, 128),
    ("csp_stage", "pre, 128 to 160"): csp_stage(128, 64, 32, [128] * 2, 96, 160),
    ("partial_transition", "transition, 128 to 64"): transition(128, 64),
    ("partial_transition", "post, 64 + 160 to 136"): partial_transition(64, 160, 96, 136),
    ("partial_transition", "pre, 64 + 160 to 136"): partial_transition(64, 160, 96, 136, order="pre"),
    ("concat_conv", "296 of four to 264"): concat_conv([136, 72, 64, 24], [264]),
    ("joins", "width 32"): stage_cases.joins(32),
    ("post_dense_block", "2 layers of 32 from 64"): post_dense_block(64, 32, [128, 128]),
    ("two_way_dense_block", "2 layers of 32 from 64"): two_way_dense_block(64, 32, [64, 64]),
    ("csp_stage", "two_way, 128 to 160"): csp_stage(
        128, 64, 32, [64], 96, 160, layer="two_way", fusion="last", pool=False
    ),
    ("csp_stage", "post, 128 to 160"): csp_stage(128, 64, 32, [128], 96, 160, layer="post", fusion="first"),
}  # fmt: skip
# Layers whose 3x3 CUDA C++ takes: widths, growth rates, maps that it has other tiles for.
CUDA: dict[str, tuple[Graph, tuple[int, int, int]]] = {
    "3 layers of 32, 56x56": (dense_block(3, 64, 32, 128), (6, 56, 56)),
    "2 layers of 32, 7x7": (dense_block(2, 64, 32, 128), (8, 7, 7)),
    "2 layers of 48, 14x14": (dense_block(2, 48, 48, 192), (4, 14, 14)),
    "2 layers of 16, 9x10": (dense_block(2, 16, 16, 32), (2, 9, 10)),
    "2 layers of 8, 7x5": (dense_block(2, 16, 8, 24), (3, 7, 5)),
    "dropout": (dense_block(2, 32, 32, 64, 0.3), (2, 28, 28)),
    "post": (post_dense_block(16, 16, [32, 32]), (2, 28, 28)),
    "one pixel": (dense_block(2, 16, 16, 32), (32, 1, 1)),
}


# --- the order ---

LARGE, SMALL, TINY = (6, 56, 56), (2, 37, 29), (2, 5, 4)  # images, height, width
FAMILY_OF = {  # first word of a name in GRAPHS -> family
    "dense": "dense_block", "dropout": "dense_block", "csp": "csp_stage", "stage": "csp_stage",
    "transition": "partial_transition", "partial": "partial_transition", "concat": "concat_conv",
    "post": "post_dense_block", "two_way": "two_way_dense_block",
}  # fmt: skip
FIRST, LATER = ("bfloat16", "float32"), ("tf32", "float16")


def family_of(name: str) -> str:
    """Of a graph in GRAPHS."""
    return FAMILY_OF.get(name.split(",")[0].split()[0], "joins")


@dataclass(frozen=True)
class Table:
    """Makes checks for a device: on the CPU all maps are tiny, and there is one backend."""

    device: str
    cuda: bool  # whether CUDA C++ is there

    def both(self, family: str, name: str, case: Case, kind: str) -> Iterator[Check]:
        """Training, and inference with frozen norms, by Triton (on the CPU: C++)."""
        case = replace(case, **TYPES[kind], size=case.size if self.device == "cuda" else TINY)
        backend = "triton" if self.device == "cuda" else "native"
        yield Check(family, name, case, kind, backend, True)
        yield Check(family, name, replace(case, frozen=(True,)), kind, backend, False)

    def compiled(self, kind: str) -> Iterator[Check]:
        """By CUDA C++, which has no float64 and one kernel for a whole layer in 16 bits alone."""
        for name, (graph, size) in CUDA.items() if self.cuda and kind != "float64" else ():
            case = Case(graph, size=size, **TYPES[kind])
            yield Check("cuda conv3x3", name, case, kind, "native", True, CONVOLUTIONS)
            if kind in ("bfloat16", "float16") and not name.startswith(("dropout", "post")):
                yield Check("cuda layer", name, replace(case, frozen=(True,)), kind, "native", False, ("layer",))

    def layers(self, kind: str) -> Iterator[Check]:
        for (family, name), graph in LAYERS.items():
            yield from self.both(family, name, Case(graph, size=LARGE), kind)

    def small(self, kind: str) -> Iterator[Check]:
        """Kernel families and instructions."""
        for family, graphs in FAMILIES.items():
            for name, graph in graphs.items():
                yield from self.both(family, name, Case(graph, size=SMALL), kind)
        for name, graph in INSTRUCTIONS.items():
            yield from self.both(name, "alone", Case(graph, size=SMALL), kind)

    def stages(self, kind: str) -> Iterator[Check]:
        """Of every kind one."""
        for name in KINDS:
            yield from self.both(family_of(name), name, Case(GRAPHS[name]), kind)

    def others(self, kind: str) -> Iterator[Check]:
        for name, graph in GRAPHS.items():
            if name not in KINDS:
                yield from self.both(family_of(name), name, Case(graph), kind)

    def variants(self, kind: str) -> Iterator[Check]:
        """Norms of which some are frozen, values that are computed again."""
        for name in ("dense", "post", "two_way", "stage, pre, csp", "stage, post, last", "joins"):
            case = Case(GRAPHS[name], (False, False, True), "all")
            yield from list(self.both(family_of(name), f"{name}, some frozen, recompute", case, kind))[:1]

    def few(self) -> list[Check]:
        """On tiny maps one check of each kernel family."""
        firsts = [(family, *next(iter(graphs.items()))) for family, graphs in FAMILIES.items()]
        cases = [(family, name, Case(graph, size=TINY)) for family, name, graph in firsts]
        return [next(self.both(*case, "bfloat16")) for case in cases]

    def checks(self, kinds: Sequence[str] = tuple(TYPES)) -> list[Check]:
        """Most valuable first: bfloat16 and float32 before the others, of these layers before what explains them."""
        order = [(make, kind) for kind in FIRST for make in (self.layers, self.compiled)]
        order += [(self.small, kind) for kind in FIRST] + [(self.compiled, kind) for kind in LATER]
        order += [(self.layers, "tf32")] + [(make, k) for make in (self.stages, self.variants) for k in FIRST]
        order += [(self.layers, "float16")] + [(make, k) for make in (self.small, self.stages) for k in LATER]
        order += [(make, "float64") for make in (self.small, self.layers, self.stages)]
        order += [(self.others, kind) for kind in TYPES]
        return [check for make, kind in order if kind in kinds for check in make(kind)]
