"""Trains a network's two forms in alternation, step by step on the same images: the fair way to time them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data import Digits, batches
from .measure import precision
from .network import KINDS, build
from .progress import Progress

PEAK_RATE = 4e-3


@dataclass(frozen=True)
class Settings:
    """What all networks are trained with."""

    epochs: int
    batch_size: int
    dtype: str
    seed: int

    def steps(self, digits: Digits) -> int:
        """Of the whole training."""
        return self.epochs * (len(digits.train_labels) // self.batch_size)

    def data(self, digits: Digits) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of every step."""
        for epoch in range(self.epochs):
            yield from batches(digits, self.batch_size, self.seed + epoch)


@dataclass
class Run:
    """One form's training: its loss and its seconds at every step."""

    kind: str
    model: nn.Module
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


def make_run(network: str, kind: str, steps: int, settings: Settings) -> Run:
    """This form of the network with its optimiser (AdamW, one cycle)."""
    model = build(network, kind, settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps + 1)
    return Run(kind, model, optimizer, schedule, settings.dtype)


def train(runs: list[Run], digits: Digits, settings: Settings) -> None:
    """Trains both forms to the end. After Ctrl-C, which goes on to the caller, both hold the same number of steps."""
    progress = Progress(settings.steps(digits), settings.batch_size)
    try:
        for images, labels in settings.data(digits):
            _alternate(runs, images, labels, progress)
    finally:
        progress.close()
        _trim(runs)


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


def control(network: str, digits: Digits, settings: Settings, steps: int) -> list[float]:
    """The first losses of the naive form in NCHW instead of channels_last: how far rounding alone carries."""
    run = make_run(network, "naive", settings.steps(digits), settings)
    run.model.to(memory_format=torch.contiguous_format)
    for images, labels in itertools.islice(settings.data(digits), steps):
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
