"""The demo from start to end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from csp_kernels.backends import backends, resolve

from .data import TRAIN_IMAGES, Digits, load_digits
from .measure import network_saved_bytes, peak_of
from .network import KINDS
from .report import COMPARED_STEPS, Result, largest_difference, picture, table
from .train import Run, Settings, accuracy, control, make_run, train

Memory = dict[str, tuple[int, int, int]]  # kind -> (saved, peak, peak before the first step)


@dataclass
class Comparison:
    """A network's two trainings; what Ctrl-C kept from being measured is missing."""

    network: str
    runs: list[Run] = field(default_factory=list)
    memory: Memory = field(default_factory=dict)
    control: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Done by both forms."""
        return len(self.runs[-1].losses) if self.runs else 0

    def run(self, digits: Digits, settings: Settings) -> None:
        """Trains both forms, then measures what each needs."""
        self.runs = [make_run(self.network, kind, settings.steps(digits), settings) for kind in KINDS]
        _note(f"{self.network}: training ...")
        train(self.runs, digits, settings)
        self.control = control(self.network, digits, settings, COMPARED_STEPS)
        _note(f"{self.network}: measuring memory ...")
        self.memory = measure_memory(self.network, settings)

    def results(self, digits: Digits) -> list[Result]:
        """Fused, naive."""
        losses = [run.losses for run in self.runs]
        fused = largest_difference(*losses)
        naive = largest_difference(self.control, losses[1]) if self.control else None
        return [
            Result(
                self.network, run.kind, run.losses, run.seconds, accuracy(run.model, digits, run.dtype), difference,
                *self.memory.get(run.kind, ()),
            )
            for run, difference in zip(self.runs, (fused, naive), strict=True)
        ]  # fmt: skip


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_memory(network: str, settings: Settings) -> Memory:
    """Saved activations and the peaks of both forms, each peak in a process of its own."""
    size = settings.batch_size, settings.dtype
    return {kind: (network_saved_bytes(network, kind, *size), *peak_of(network, kind, *size)) for kind in KINDS}


def run_demo(networks: Sequence[str], settings: Settings, out: Path) -> int:
    """Trains every network in both forms and reports; 0, or 130 after Ctrl-C."""
    if not 2 <= settings.batch_size <= TRAIN_IMAGES:
        _note(f"--batch-size: expected 2 to {TRAIN_IMAGES}, got {settings.batch_size}")
        return 1
    begin, digits = time.perf_counter(), load_digits(settings.seed)
    backend = resolve("cpu")
    _note(f"fused: backend {backend}, {backends()[backend].reason}")
    _note(f"{', '.join(networks)}; {torch.get_num_threads()} threads, {settings.dtype}")
    done: list[Comparison] = []
    interrupted = False
    try:
        for network in networks:
            done.append(Comparison(network))
            done[-1].run(digits, settings)
    except KeyboardInterrupt:
        interrupted = True
    state = f"epochs {settings.epochs}"
    if interrupted:
        state = f"PARTIAL: interrupted in {done[-1].network} after {done[-1].steps} steps"
    done = [comparison for comparison in done if comparison.steps]
    if not done:
        _note("interrupted before the first step: nothing to report")
        return 130
    _report(done, digits, settings, state, out)
    print(f"whole demo: {time.perf_counter() - begin:.0f} s")
    return 130 if interrupted else 0


def _report(done: list[Comparison], digits: Digits, settings: Settings, state: str, out: Path) -> None:
    data = f"4,000 MNIST digits, batch {settings.batch_size}, {settings.dtype}, seed {settings.seed}"
    title = f"{data}, {state}"
    results = [result for comparison in done for result in comparison.results(digits)]
    print(f"\n{title}\n{table(results)}")
    picture(results, title, out)
    print(f"picture: {out}")
