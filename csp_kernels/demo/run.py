"""The demo from start to end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import csp_kernels as csp

from .data import TRAIN_IMAGES, Digits, load_digits
from .measure import network_saved_bytes, peak_of
from .network import GROWTH, KINDS, LAYERS
from .report import COMPARED_STEPS, Result, picture, table
from .train import Run, accuracy, control, train

Memory = dict[str, tuple[int | None, int | None, int | None]]  # kind -> (saved, peak, peak before the first step)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_memory(batch_size: int, dtype: str) -> Memory:
    """Saved activations and the peaks of both networks, each peak in a process of its own."""
    return {kind: (network_saved_bytes(kind, batch_size, dtype), *peak_of(kind, batch_size, dtype)) for kind in KINDS}


def _result(run: Run, memory: Memory, digits: Digits) -> Result:
    return Result(run.kind, run.losses, run.seconds, accuracy(run.model, digits, run.dtype), *memory[run.kind])


def _report(
    runs: list[Run], memory: Memory, digits: Digits, scale: list[float], title: str, out: Path
) -> None:  # fmt: skip
    ours, naive = (_result(run, memory, digits) for run in runs)
    print(f"\n{title}\n{table(ours, naive, scale)}")
    picture(ours, naive, title, out)
    print(f"picture: {out}")


def run_demo(epochs: int, batch_size: int, dtype: str, seed: int, out: Path) -> int:
    """Trains both networks and reports; 0, or 130 after Ctrl-C."""
    if not 2 <= batch_size <= TRAIN_IMAGES:
        _note(f"--batch-size: expected 2 to {TRAIN_IMAGES}, got {batch_size}")
        return 1
    begin, digits = time.perf_counter(), load_digits(seed)
    backend = csp.backends()["native"]
    _note(f"csp: {backend.reason if backend.available else 'reference backend only, ' + backend.reason}")
    _note(f"DenseNet-BC, layers {LAYERS}, growth {GROWTH}; {torch.get_num_threads()} threads, {dtype}")
    memory: Memory = dict.fromkeys(KINDS, (None, None, None))
    try:
        _note("measuring memory ...")
        memory = measure_memory(batch_size, dtype)
    except KeyboardInterrupt:
        _note("interrupted before the first step: nothing to report")
        return 130
    runs, complete = train(digits, epochs, batch_size, dtype, seed)
    if not runs[0].losses:
        _note("interrupted before the first step: nothing to report")
        return 130
    state = f"{epochs} epochs" if complete else f"PARTIAL: interrupted after {len(runs[0].losses)} steps"
    title = f"DenseNet-BC on 4,000 MNIST digits, batch {batch_size}, {dtype}, seed {seed}, {state}"
    scale = control(digits, epochs, batch_size, dtype, seed, COMPARED_STEPS) if complete else []
    _report(runs, memory, digits, scale, title, out)
    print(f"whole demo: {time.perf_counter() - begin:.0f} s")
    return 0 if complete else 130
