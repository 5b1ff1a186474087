"""The demo's table and picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
COMPARED_STEPS = 20
COLOURS = {"fused": "tab:blue", "naive": "tab:orange"}


@dataclass(frozen=True)
class Result:
    """What the training of one form of a network came to. Memory in bytes, None where it was not measured.

    difference: largest loss difference of the first steps, fused against naive; of the naive form, against itself in
    NCHW (None: not measured).
    """

    network: str
    kind: str
    losses: list[float]
    seconds: list[float]
    accuracy: float
    difference: float | None
    saved: int | None = None
    peak: int | None = None
    start: int | None = None

    @property
    def step_ms(self) -> float:
        """Median time of a step in milliseconds; the first (warm-up) step does not count if there are more."""
        return 1e3 * statistics.median(self.seconds[1:] or self.seconds)

    @property
    def above(self) -> int | None:
        """Peak resident memory above that before the first step."""
        return None if self.peak is None or self.start is None else self.peak - self.start


def in_mib(count: int | None) -> float | None:
    """Bytes in MiB."""
    return None if count is None else count / MIB


@dataclass(frozen=True)
class Column:
    """A quantity of the table: lines of its heading, its value, and how that is printed."""

    heading: tuple[str, str]
    value: Callable[[Result], float | None]
    form: str

    def cell(self, result: Result) -> str:
        """The value as text."""
        value = self.value(result)
        return "-" if value is None else format(value, self.form)

    def ratio(self, a: Result, b: Result) -> str:
        """a / b as text."""
        above, below = self.value(a), self.value(b)
        return "-" if above is None or not below else f"{above / below:.3f}"


COLUMNS = (
    Column(("test", "accuracy"), lambda r: r.accuracy, ".4f"),
    Column(("final", "loss"), lambda r: r.losses[-1], ".4f"),
    Column(("loss", "difference"), lambda r: r.difference, ".2e"),
    Column(("step", "ms"), lambda r: r.step_ms, ".1f"),
    Column(("saved", "MiB"), lambda r: in_mib(r.saved), ".1f"),
    Column(("peak", "MiB"), lambda r: in_mib(r.peak), ".0f"),
    Column(("above", "start MiB"), lambda r: in_mib(r.above), ".0f"),
)
NOTES = f"""\
step: median time; saved: activations kept for backward; peak: resident memory of a process of its own.
loss difference: largest of the first {COMPARED_STEPS} steps, fused against naive; for scale, in the naive row, naive
channels_last against naive NCHW, where rounding alone differs."""


def largest_difference(a: list[float], b: list[float]) -> float:
    """Largest loss difference over the first steps."""
    return max(abs(x - y) for x, y in zip(a[:COMPARED_STEPS], b, strict=False))


def table(results: Sequence[Result]) -> str:
    """A row for each form of each network and the ratios, fused to naive and CSP to plain. Forms come in pairs."""
    lines = [["", *(c.heading[0] for c in COLUMNS)], ["network", *(c.heading[1] for c in COLUMNS)]]
    by_name = {(r.network, r.kind): r for r in results}
    for fused, naive in _pairs(results):
        lines += [[f"{r.network} {r.kind}", *(c.cell(r) for c in COLUMNS)] for r in (fused, naive)]
        lines.append(_ratios("  fused / naive", fused, naive))
        plain = fused.network.removeprefix("csp_")
        if plain != fused.network and (plain, "fused") in by_name:
            lines.append(_ratios("  CSP / plain, fused", fused, by_name[plain, "fused"]))
            lines.append(_ratios("  CSP / plain, naive", naive, by_name[plain, "naive"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([f"{line[0]:<{widths[0]}}", *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*text, NOTES])


def _ratios(label: str, a: Result, b: Result) -> list[str]:
    return [label, *(c.ratio(a, b) for c in COLUMNS)]


def _pairs(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    return list(zip(results[::2], results[1::2], strict=True))


def picture(results: Sequence[Result], title: str, path: Path) -> None:
    """Loss curves, time and memory of every network as a PNG."""
    from matplotlib.figure import Figure

    pairs = _pairs(results)
    figure = Figure(figsize=(max(11.0, 4.2 * len(pairs)), 8), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    curves, bars = halves
    for axes, pair in zip(curves.subplots(1, len(pairs), sharey=True, squeeze=False)[0], pairs, strict=True):
        _curves(axes, *pair)
    time, saved, peak = bars.subplots(1, 3)
    _bars(time, pairs, lambda r: r.step_ms, "ms", "Time per step, median")
    _bars(saved, pairs, lambda r: in_mib(r.saved), "MiB", "Saved activations")
    _bars(peak, pairs, lambda r: in_mib(r.above), "MiB", "Peak resident memory above start")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _curves(axes: Any, fused: Result, naive: Result) -> None:
    axes.plot(naive.losses, color=COLOURS["naive"], linewidth=2.5, alpha=0.6, label="naive")
    axes.plot(fused.losses, color=COLOURS["fused"], linewidth=1.0, label="fused")
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title=fused.network)
    axes.legend()


def _bars(
    axes: Any, pairs: list[tuple[Result, Result]], value: Callable[[Result], float | None], unit: str, title: str
) -> None:  # fmt: skip
    """Fused beside naive for every network; no bar where nothing was measured."""
    for offset, results in zip((-0.2, 0.2), zip(*pairs, strict=True), strict=True):
        places, kind = [i + offset for i in range(len(pairs))], results[0].kind
        heights = [math.nan if (height := value(r)) is None else height for r in results]
        bars = axes.bar(places, heights, 0.38, color=COLOURS[kind], label=kind)
        axes.bar_label(bars, fmt="%.0f")
    axes.margins(y=0.2)
    axes.set_xticks(range(len(pairs)), [fused.network for fused, _ in pairs], fontsize="small")
    axes.set(ylabel=unit, title=title)
    axes.legend()
