"""Pictures of the rows that benchmarks/gpu.py wrote, one a dtype, beside the file; needs matplotlib.

python benchmarks/plot.py benchmarks/results/<device>.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]
Bars = dict[str, dict[str, float]]  # case -> candidate -> length
PASSES = ("forward", "backward", "step")


def read(path: Path) -> list[Row]:
    """The last row of each candidate, case and pass; ValueError if there is none."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    if not found:
        raise ValueError(f"{path}: no rows")
    keys = ("operator", "case", "batch", "dtype", "pass", "candidate")
    return list({tuple(row[key] for key in keys): row for row in found}.values())


def bars(rows: Sequence[Row], step: str, length: Callable[[Row, Row], float | None]) -> Bars:
    """length(row, that of the faster eager layout) of each case and candidate in this pass; wrong ones are left out."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["pass"] == step and row["agrees"] == "True":
            cases.setdefault(f"{row['case']}, batch {row['batch']}", {})[row["candidate"]] = row
    made: Bars = {}
    for case, candidates in cases.items():
        eager = [row for name, row in candidates.items() if name.startswith("eager")]
        if eager:
            base = min(eager, key=lambda row: float(row["median_ms"]))
            lengths = {name: length(row, base) for name, row in candidates.items()}
            made[case] = {name: value for name, value in lengths.items() if value is not None}
    return made


def faster(row: Row, base: Row) -> float | None:
    return float(base["median_ms"]) / float(row["median_ms"])


def share(row: Row, base: Row) -> float | None:
    return float(row["share_of_copy"]) if row["share_of_copy"] else None


def memory(row: Row, base: Row) -> float | None:
    peak, eager = float(row["peak_bytes"]), float(base["peak_bytes"])
    return peak / eager if eager else None


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Speed in each pass, share of the copy bandwidth and peak memory, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(f"{step}: times as fast as the faster eager", bars(rows, step, faster)) for step in PASSES]
    panels += [("step: share of the copy bandwidth", bars(rows, "step", share))]
    panels += [("step: peak memory, the faster eager's 1", bars(rows, "step", memory))]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    tab10 = pyplot.colormaps["tab10"]
    colours = {name: tab10(i % tab10.N) for i, name in enumerate(names)}
    cases = list(panels[0][1])
    tall = 1.5 + 0.13 * len(names) * len(cases)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), tall), sharey=True, squeeze=False)
    for axis, (label, found) in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            at = {k + i / (len(names) + 1): found[case][name] for k, case in enumerate(cases) if name in found[case]}
            axis.barh(list(at), list(at.values()), height=1 / (len(names) + 1), color=colours[name], label=name)
        axis.axvline(1, color="black", linewidth=0.5)
        axis.set_title(label)
    middle = (len(names) - 1) / (len(names) + 1) / 2
    axes[0][0].set_yticks([k + middle for k in range(len(cases))], cases)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    axes[0][0].margins(y=0.01)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """A picture a dtype, and its path printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="as written by benchmarks/gpu.py")
    for path in parser.parse_args(argv).files:
        rows = read(path)
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            chosen, picture = [row for row in rows if row["dtype"] == dtype], path.with_name(f"{path.stem}-{dtype}.png")
            last = chosen[-1]
            draw(chosen, f"{last['device']}, {dtype}, torch {last['torch']}, triton {last['triton']}", picture)
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
