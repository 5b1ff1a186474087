"""A fused layer against its naive twin: agreement with float64 first, then interleaved times and saved bytes.

Every bench_<stem>.py but the dense block's lists its cases and leaves the rest to `main` here.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Timing, append_csv, environment, interleave, relative_error
from torch import Tensor, nn

from csp_kernels.demo.measure import saved_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FACTOR = {"highest": 2.0, "high": 16.0}  # allowed error beside the worse eager layout's
FLOOR = {"float32": 1e-6, "bfloat16": 1e-3}  # and what is allowed anyway
KINKS = 2e-2


@dataclass(frozen=True)
class Case:
    """What is timed: fused() and naive() build modules with the same state_dict keys; inputs are shapes."""

    name: str
    fused: Callable[[], nn.Module]
    naive: Callable[[], nn.Module]
    inputs: Sequence[tuple[int, int, int, int]]  # [N, C, H, W]; more than one: the module takes a list
    as_list: bool = False  # one list instead of separate arguments


@dataclass(frozen=True)
class Runner:
    """One way to run a case."""

    module: nn.Module
    call: Callable[..., Tensor]
    inputs: list[Tensor]
    grad: Tensor
    as_list: bool

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.call(inputs) if self.as_list else self.call(*inputs)

    def step(self) -> list[Tensor]:
        """Forward and backward: [output, gradients of inputs and parameters]."""
        inputs = [t.detach().requires_grad_() for t in self.inputs]
        self.module.zero_grad(set_to_none=True)
        y = self.forward(inputs)
        y.backward(self.grad)
        grads = [t.grad for t in (*inputs, *self.module.parameters())]
        return [y.detach(), *(g for g in grads if g is not None)]

    @torch.no_grad()
    def infer(self) -> list[Tensor]:
        return [self.forward(self.inputs)]

    def work(self, mode: str) -> Callable[[], list[Tensor]]:
        return self.step if mode == "train" else self.infer

    def saved(self) -> int:
        """Activation bytes kept for backward, the inputs' included, parameters' not."""
        inputs = [t.detach().requires_grad_() for t in self.inputs]
        return saved_bytes(lambda: self.forward(inputs), [*self.module.parameters(), *self.module.buffers()])


def randomise(module: nn.Module) -> None:
    """Norms that are not the identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)


def runners(case: Case, mode: str, dtype: torch.dtype, with_compile: bool) -> dict[str, Runner]:
    """csp, eager in both layouts, compiled in both; and "exact", eager in float64 on the same numbers."""
    torch.manual_seed(0)
    naive, fused = case.naive().train(mode == "train"), case.fused().train(mode == "train")
    randomise(naive)
    fused.load_state_dict(naive.state_dict())
    inputs = [torch.randn(shape).to(dtype) for shape in case.inputs]
    with torch.no_grad():
        singles = [t.float() for t in inputs]
        shape = (naive(singles) if case.as_list else naive(*singles)).shape
    naive.load_state_dict(fused.state_dict())  # the trial has moved the running statistics
    grad = torch.randn(shape).to(dtype)

    def runner(module: nn.Module, kind: torch.dtype, layout: torch.memory_format, compiled: bool = False) -> Runner:
        own = copy.deepcopy(module).to(dtype).to(kind).to(memory_format=layout)
        tensors = [t.to(kind).contiguous(memory_format=layout) for t in inputs]
        call = torch.compile(own) if compiled else own
        return Runner(own, call, tensors, grad.to(kind).contiguous(memory_format=layout), case.as_list)

    last, first = torch.channels_last, torch.contiguous_format
    found = {"exact": runner(naive, torch.float64, last), "csp": runner(fused, dtype, last)}
    found |= {"eager NCHW": runner(naive, dtype, first), "eager channels_last": runner(naive, dtype, last)}
    if with_compile:
        torch._dynamo.reset()
        for name, layout in (("NCHW", first), ("channels_last", last)):
            found[f"compile {name}"] = runner(naive, dtype, layout, compiled=True)
    return found


def measure(case: Case, args: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Checks and times one case; (CSV rows, speed-ups), no speed-ups on a mismatch."""
    found = runners(case, args.mode, DTYPES[args.dtype], args.compile)
    truth = found.pop("exact").work(args.mode)()
    errors: dict[str, list[float]] = {}
    for name, runner in found.items():
        results = runner.work(args.mode)()
        errors[name] = [relative_error(got, exact) for got, exact in zip(results, truth, strict=True)]
    error = {name: max(values) for name, values in errors.items()}
    bad = disagreeing(errors, args)
    timings = interleave({name: r.work(args.mode) for name, r in found.items()}, args.rounds)
    saved = {name: r.saved() if args.mode == "train" else 0 for name, r in found.items()}
    print(f"\n{case.name}, {args.mode}, {args.dtype}, {args.precision}")
    print(f"{'':<22}{'ms':>9}{'q1':>9}{'q3':>9}{'saved MiB':>11}{'error':>10}")
    for name, t in timings.items():
        times = f"{t.median:>9.2f}{t.low:>9.2f}{t.high:>9.2f}"
        print(f"{name:<22}{times}{saved[name] / 2**20:>11.1f}{error[name]:>10.1e}{'  WRONG' if name in bad else ''}")
    rows: list[dict[str, object]] = [
        {
            **environment(), "case": case.name, "mode": args.mode, "dtype": args.dtype, "precision": args.precision,
            "candidate": name, "rounds": args.rounds, "median_ms": round(t.median, 3), "q1_ms": round(t.low, 3),
            "q3_ms": round(t.high, 3), "saved_bytes": saved[name], "error": f"{error[name]:.3e}",
            "agrees": name not in bad,
        }
        for name, t in timings.items()
    ]  # fmt: skip
    if bad:
        print(f"MISMATCH: {', '.join(bad)}: no speed-up is reported")
        return rows, {}
    return rows, speedups(timings, saved)


def disagreeing(errors: dict[str, list[float]], args: argparse.Namespace) -> list[str]:
    """Outputs may err FACTOR times as much as eager's; gradients by KINKS more: single ReLUs near zero change sides."""
    found = []
    for name, values in errors.items():
        for i, value in enumerate(values):
            eager = max(v[i] for n, v in errors.items() if n.startswith("eager"))
            if not value <= FACTOR[args.precision] * eager + FLOOR[args.dtype] + (KINKS if i else 0):
                found.append(name)
                break
    return found


def speedups(timings: dict[str, Timing], saved: dict[str, int]) -> dict[str, float]:
    """Against the better eager layout and the better compiled one."""
    found = {}
    for kind in ("eager", "compile"):
        times = [t.median for name, t in timings.items() if name.startswith(kind)]
        if times:
            found[kind] = min(times) / timings["csp"].median
    text = ", ".join(f"{value:.2f}x as fast as the better {kind}" for kind, value in found.items())
    naive = min(v for n, v in saved.items() if n.startswith("eager"))
    print(f"csp is {text}" + (f"; saves {saved['csp'] / naive:.2f} of eager's bytes" if naive else ""))
    return found


def main(cases: Sequence[Case], stem: str, description: str | None, argv: list[str] | None = None) -> int:
    """Runs the cases; 1 if a candidate is wrong anywhere."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--precision", choices=sorted(FACTOR), default="highest", help="float32 matmul precision")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="threads (default: PyTorch's choice)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    results = Path(__file__).resolve().parent / "results" / f"{stem}.csv"
    parser.add_argument("--csv", type=Path, default=results, help="file the rows are appended to")
    args = parser.parse_args(argv)
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--rounds and --threads: expected positive numbers")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    print("; ".join(f"{key} {value}" for key, value in environment().items()))
    everything: list[dict[str, float]] = []
    for case in (c for c in cases if args.only in c.name):
        rows, ratios = measure(case, args)
        append_csv(args.csv, rows)
        everything.append(ratios)
    if not all(everything):
        return 1
    for kind in everything[0] if everything else ():
        mean = math.exp(sum(math.log(r[kind]) for r in everything) / len(everything))
        print(f"geometric mean against the better {kind}: {mean:.2f}x")
    return 0
