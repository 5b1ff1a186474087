"""Pictures of what benchmarks/gpu_speed.py measured, one a type and mode; none where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from gpu_report_speed import COMPILED, EAGER, OURS, Group, Groups, Line, ratio

Cases = Mapping[Group, Mapping[str, Line]]
PANELS: dict[str, Callable[[Line, Line | None], float | None]] = {
    "times as fast as eager channels_last": lambda line, eager: ratio(eager, line, "median_ms"),
    "share of the copy bandwidth": lambda line, _: line.get("share_of_copy"),
    "share of the matmul ceiling": lambda line, _: line.get("share_of_matmul"),
}


def draw(found: Groups, device: str, document: Path) -> list[str]:
    """Draws beside the document; the files' names."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    made = []
    for dtype, mode in dict.fromkeys((group.dtype, group.mode) for group in found):
        name = f"{document.stem}-{dtype}-{mode}.png"
        cases = {group: c for group, c in found.items() if (group.dtype, group.mode) == (dtype, mode)}
        picture(cases, f"{device}, {dtype}, {mode}", document.with_name(name))
        made.append(name)
    return made


def picture(cases: Cases, title: str, path: Path) -> None:
    """A panel a quantity, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    present = {name for candidates in cases.values() for name in candidates}
    names = [name for name in (*OURS, EAGER, COMPILED) if name in present]
    names += sorted(present - {*names})
    colours = pyplot.colormaps["tab10"]
    tall, step = 1.5 + 0.16 * len(names) * len(cases), 1 / (len(names) + 1)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(6 * len(PANELS), tall), sharey=True, squeeze=False)
    for axis, (label, length) in zip(axes[0], PANELS.items(), strict=True):
        for i, name in enumerate(names):
            values = {
                k + i * step: length(candidates[name], candidates.get(EAGER))
                for k, candidates in enumerate(cases.values())
                if name in candidates
            }
            bars = {at: value for at, value in values.items() if value is not None}
            axis.barh(list(bars), list(bars.values()), height=step, color=colours(i % colours.N), label=name)
        axis.axvline(1, color="black", linewidth=0.5)
        axis.set_title(label)
    labels = [f"{g.operator}: {g.case}, batch {g.batch}" for g in cases]
    axes[0][0].set_yticks([k + (len(names) - 1) * step / 2 for k in range(len(cases))], labels)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
