"""The demo's table and picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
COMPARED_STEPS = 20


@dataclass(frozen=True)
class Result:
    """What one network's training came to. Memory in bytes, None where it was not measured."""

    name: str
    losses: list[float]
    seconds: list[float]
    accuracy: float | None
    saved: int | None
    peak: int | None
    start: int | None

    @property
    def step_ms(self) -> float:
        """Median time of a step in milliseconds; the first (warm-up) step does not count if there are more."""
        return 1e3 * statistics.median(self.seconds[1:] or self.seconds)


def largest_difference(a: list[float], b: list[float]) -> float:
    """Largest loss difference over the first steps."""
    return max(abs(x - y) for x, y in zip(a[:COMPARED_STEPS], b, strict=False))


def _row(label: str, ours: float | None, naive: float | None, form: str, scale: float = 1.0) -> str:
    cells = [format(v / scale, form) if v is not None else "-" for v in (ours, naive)]
    ratio = f"{ours / naive:.3f}" if ours is not None and naive else "-"
    return f"{label:<44}{cells[0]:>12}{cells[1]:>12}{ratio:>10}"


def _above(result: Result) -> int | None:
    return result.peak - result.start if result.peak is not None and result.start is not None else None


def table(ours: Result, naive: Result, control: list[float]) -> str:
    """The comparison as text; ratio = ours / naive. `control`: losses of the naive network in NCHW, or []."""
    steps = len(ours.losses)
    difference = largest_difference(ours.losses, naive.losses)
    rounding = f"{largest_difference(control, naive.losses):.2e}" if control else "-"
    rows = [
        f"{'':<44}{ours.name:>12}{naive.name:>12}{'ratio':>10}",
        _row("test accuracy (1,000 digits)", ours.accuracy, naive.accuracy, ".4f"),
        _row(f"loss after {steps} steps", ours.losses[-1], naive.losses[-1], ".4f"),
        f"{f'largest loss difference, first {min(steps, COMPARED_STEPS)} steps':<44}{difference:>12.2e}",
        f"{'  for scale: naive channels_last against NCHW':<44}{rounding:>12}",
        _row("time per step, median (ms)", ours.step_ms, naive.step_ms, ".1f"),
        _row("saved activations (MiB)", ours.saved, naive.saved, ".1f", MIB),
        _row("peak resident memory (MiB)", ours.peak, naive.peak, ".0f", MIB),
        _row("peak resident memory, above start-up (MiB)", _above(ours), _above(naive), ".0f", MIB),
    ]
    return "\n".join(rows)


def picture(ours: Result, naive: Result, title: str, path: Path) -> None:
    """Loss curves, time and memory as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(2.4, 1, 1.6), layout="constrained"
    )
    colours = ("tab:blue", "tab:orange")
    left.plot(naive.losses, color=colours[1], linewidth=2.5, alpha=0.6, label=naive.name)
    left.plot(ours.losses, color=colours[0], linewidth=1.0, label=ours.name)
    left.set(xlabel="step", ylabel="training loss", yscale="log", title="Same weights, same data")
    left.legend()
    bars = middle.bar([ours.name, naive.name], [ours.step_ms, naive.step_ms], color=colours)
    middle.bar_label(bars, fmt="%.0f")
    middle.set(ylabel="ms", title="Time per step, median")
    saved, peak = (ours.saved, naive.saved), (_above(ours), _above(naive))
    memory = {"saved\nactivations": saved, "peak resident\nabove start": peak}
    measured = {label: pair for label, pair in memory.items() if None not in pair}
    for index, result in enumerate((ours, naive)):
        places = [place + 0.4 * index - 0.2 for place in range(len(measured))]
        heights = [float(pair[index] or 0) / MIB for pair in measured.values()]
        right.bar_label(right.bar(places, heights, 0.38, color=colours[index], label=result.name), fmt="%.0f")
    right.set_xticks(range(len(measured)), list(measured))
    right.set(ylabel="MiB", title="Memory of a training step")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
