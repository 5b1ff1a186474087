"""Trains both networks in alternation, step by step on the same images: the fair way to time them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data import Digits, batches
from .measure import precision
from .network import KINDS, DenseNetBC, build
from .progress import Progress

PEAK_RATE = 4e-3


@dataclass
class Run:
    """One network's training: its loss and its seconds at every step."""

    kind: str
    model: DenseNetBC
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    dtype: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, backward, update; loss and time are noted together, after the step is complete."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with precision(self.dtype):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        spent = time.perf_counter() - start
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(spent)


def make_run(kind: str, steps: int, dtype: str, seed: int) -> Run:
    """A network of this kind with its optimiser (AdamW, one cycle)."""
    model = build(kind, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps + 1)
    return Run(kind, model, optimizer, schedule, dtype)


def train(digits: Digits, epochs: int, batch_size: int, dtype: str, seed: int) -> tuple[list[Run], bool]:
    """Both runs, and whether they came to the end (False after Ctrl-C)."""
    steps = epochs * (len(digits.train_labels) // batch_size)
    runs = [make_run(kind, steps, dtype, seed) for kind in KINDS]
    progress = Progress(steps, batch_size)
    try:
        for epoch in range(epochs):
            for images, labels in batches(digits, batch_size, seed + epoch):
                _alternate(runs, images, labels, progress)
    except KeyboardInterrupt:
        return runs, False
    finally:
        progress.close()
        _trim(runs)
    return runs, True


def _alternate(runs: list[Run], images: Tensor, labels: Tensor, progress: Progress) -> None:
    first = progress.done % 2  # who goes first changes every step
    for run in (runs[first], runs[1 - first]):
        run.step(images, labels)
    losses = "loss " + " / ".join(f"{run.losses[-1]:.3f}" for run in runs)
    rates = " / ".join(f"{len(images) / run.seconds[-1]:.0f}" for run in runs)
    progress.step(losses, f"{rates} images/s ({' / '.join(KINDS)})")


def _trim(runs: list[Run]) -> None:
    """After Ctrl-C one run may be a step ahead."""
    common = min(len(run.seconds) for run in runs)
    for run in runs:
        del run.losses[common:], run.seconds[common:]


def control(digits: Digits, epochs: int, batch_size: int, dtype: str, seed: int, steps: int) -> list[float]:
    """The first losses of the naive network in NCHW instead of channels_last: how far rounding alone carries."""
    total = epochs * (len(digits.train_labels) // batch_size)
    run = make_run("naive", total, dtype, seed)
    run.model.to(memory_format=torch.contiguous_format)
    epoch_data = (batches(digits, batch_size, seed + epoch) for epoch in range(epochs))
    for images, labels in itertools.islice(itertools.chain.from_iterable(epoch_data), steps):
        run.step(images, labels)
    return run.losses


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, dtype: str) -> float:
    """Share of the test digits that are read right; leaves the model in eval mode."""
    model.eval()
    right = 0
    with precision(dtype):
        for images, labels in _chunks(digits.test_images, digits.test_labels):
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(digits.test_labels)


def _chunks(images: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(images.split(200), labels.split(200), strict=True)
