"""What a run of the GPU schedule has found: docs/performance_gpu.md, the table by which "auto" chooses, and constants.

    python benchmarks/gpu_report.py benchmarks/results/<device>

Reads what is in the folder (schedule.json and the .jsonl files of the steps; half a run makes a report, too) and writes
- docs/performance_gpu.md (--document): tables of times, ratios, shares of the ceilings and memory, all that failed, and
  what there was no time for; and pictures beside it, where matplotlib is installed;
- csp_kernels/winners.json (--winners): for each class of calls the backends that were clearly faster than plain PyTorch
  (csp_kernels/winners.py). Rows of other devices, and of classes that this run has not measured, stay;
and prints the planner's constants that the tuning step has found, as `name = value`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_plot
from gpu_report_speed import Line, ceilings, groups, merged, number, rows_of, speed, table, troubles
from gpu_steps import read

from csp_kernels import winners

ROOT = Path(__file__).resolve().parents[1]
DTYPES, MODES = ("bfloat16", "float32", "tf32", "float16"), ("training", "inference")
STEPS = ("build", "correctness", "speed", "tuning", "sanitizer", "counters")


class Run:
    """The files of a folder. Raises ValueError if it has none of them."""

    def __init__(self, folder: Path) -> None:
        try:
            self.schedule: dict[str, Any] = json.loads((folder / "schedule.json").read_text())
        except FileNotFoundError:
            self.schedule = {}
        self.lines: dict[str, list[Line]] = {step: list(read(folder / f"{step}.jsonl")) for step in STEPS}
        if not self.schedule and not any(self.lines.values()):
            raise ValueError(f"{folder}: got no schedule.json and no step's .jsonl, expected the folder of a GPU run")

    @property
    def device(self) -> str:
        return str(self.schedule.get("device") or "an unknown device")

    @property
    def family(self) -> str:
        """As csp_kernels.winners names it; "" of a CPU, or where nobody has written it down."""
        capability = self.schedule.get("capability")
        return f"sm_{10 * capability[0] + capability[1]}" if capability else ""


# --- sections ---


def document(run: Run, pictures: Sequence[str]) -> str:
    found = groups(run.lines["speed"])
    parts = [[f"# Measured on {run.device}", "", "Written by `python benchmarks/gpu_report.py`."], *_head(run)]
    parts.append(["## Ceilings", "", *ceilings(run.lines["speed"])])
    for dtype in DTYPES:
        for mode in MODES:
            if rows := speed(found, dtype, mode):
                parts.append([f"## {mode.capitalize()}, {dtype}", "", *rows])
    if found:
        parts.append(_legend())
    parts += [[f"![{Path(name).stem}]({name})"] for name in pictures]
    sections = (correctness, failures, tuned, constants, sanitizer, counters, left)
    parts += [part for part in (section(run) for section in sections) if part]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(run: Run) -> Iterator[list[str]]:
    versions = [f"{key} {run.schedule[key]}" for key in ("torch", "triton", "commit") if run.schedule.get(key)]
    if versions:
        yield [", ".join(versions) + "."]
    rows = [
        [s["name"], s["status"], number(s.get("seconds"), ".0f"), number(s.get("limit"), ".0f"), s.get("message") or ""]
        for s in run.schedule.get("steps", [])
    ]
    yield table(["step", "", "s", "limit", ""], rows) if rows else ["No step has ended."]


def _legend() -> list[str]:
    return [
        "Medians in ms. `x eager`, `x compile`: how many times as fast as eager channels_last and as torch.compile the",
        "faster of ours is. `of copy`, `of matmul`: bytes (of a fused layer those of its program) and FLOPs (of the",
        "convolutions as written, in training three times) by its time, as shares of the ceilings; counted, not",
        "measured. `saved`, `peak`: what it keeps for backward and needs at most, eager's being 1.",
    ]


def correctness(run: Run) -> list[str]:
    lines = [line for line in run.lines["correctness"] if "ok" in line]
    if not lines:
        return []
    kinds: dict[tuple[str, str], Counter[bool]] = {}
    for line in lines:
        key = str(line.get("family")), f"{line.get('dtype')}, {line.get('backend')}"
        kinds.setdefault(key, Counter())[bool(line["ok"])] += 1
    columns = sorted({column for _, column in kinds})
    rows = []
    for family in dict.fromkeys(family for family, _ in kinds):
        counted = [kinds.get((family, column)) for column in columns]
        rows.append([family, *("" if c is None else f"{c[True]} of {c.total()}" for c in counted)])
    return ["## Correctness", "", "Checks against float64 that agree.", "", *table(["", *columns], rows)]


def failures(run: Run) -> list[str]:
    rows = list(troubles(run.lines["speed"]))
    names = {
        "build": ("what",), "correctness": ("family", "case", "dtype", "backend", "pass"),
        "tuning": ("kernel", "key", "tile"), "sanitizer": ("kernel", "tool"), "counters": ("kernel", "metric"),
    }  # fmt: skip
    for step, keys in names.items():
        for line in run.lines[step]:
            if line.get("ok") is False:
                what = " ".join(str(line[key]) for key in keys if line.get(key) is not None)
                rows.append([step, what, str(line.get("message") or "")])
    return ["## Failed, or not there", "", *table(["step", "what", ""], rows)] if rows else []


def tuned(run: Run) -> list[str]:
    """Where another configuration than the first is the fastest."""
    choices: dict[tuple[str, str], list[Line]] = {}
    for line in run.lines["tuning"]:
        if line.get("median_ms") is not None and "kernel" in line:
            choices.setdefault((str(line["kernel"]), str(line["key"])), []).append(line)
    rows = []
    for (kernel, key), lines in choices.items():
        first = next((line for line in lines if line.get("first")), None)
        winner = next((line for line in lines if line.get("winner")), None)
        if first is not None and winner is not None and first is not winner:
            gain = first["median_ms"] / winner["median_ms"]
            rows.append([kernel, key, str(first["tile"]), str(winner["tile"]), f"{gain:.2f}"])
    if not choices:
        return []
    text = f"Of {len(choices)} choices {len(rows)} have another winner than the configuration that runs untuned."
    shown = ["", *table(["kernel", "class", "first", "winner", "x first"], rows)] if rows else []
    return ["## Configurations", "", text, *shown]


def constants_of(run: Run) -> dict[str, Line]:
    """The last line about each of the planner's constants."""
    return {str(line["constant"]): line for line in run.lines["tuning"] if "constant" in line}


def constants(run: Run) -> list[str]:
    rows = [
        [f"`{name}`", str(line.get("value")), str(line.get("from") or "")] for name, line in constants_of(run).items()
    ]
    return ["## The planner's constants", "", *table(["constant", "measured", "from"], rows)] if rows else []


def sanitizer(run: Run) -> list[str]:
    lines = [line for line in run.lines["sanitizer"] if "ok" in line]
    fine = sum(bool(line["ok"]) for line in lines)
    return ["## compute-sanitizer", "", f"{fine} of {len(lines)} runs without a complaint."] if lines else []


def counters(run: Run) -> list[str]:
    rows = [
        [str(line["kernel"]), str(line["metric"]), str(line.get("value")), str(line.get("unit") or "")]
        for line in run.lines["counters"]
        if "metric" in line
    ]
    return ["## Counters", "", *table(["kernel", "metric", "", ""], rows)] if rows else []


def left(run: Run) -> list[str]:
    """What steps did not come to, and steps that did not run."""
    rows = []
    for step in STEPS:
        last = next((line["left"] for line in reversed(run.lines[step]) if "left" in line), None)
        if last:
            rows.append(f"- {step}, {len(last)}: {'; '.join(map(str, last))}")
        elif run.lines[step] and last is None:
            rows.append(f"- {step}: was cut short, and did not say what it left")
        elif not run.lines[step]:
            rows.append(f"- {step}: nothing was recorded")
    return ["## Left", "", *rows] if rows else []


# --- what is written ---


def write_winners(run: Run) -> str:
    """Updates the table of winners; what was done, in words."""
    if not run.family:
        return f"{winners.FILE.name} stays as it is: {run.device} has no compute capability"
    new = rows_of(groups(run.lines["speed"]), run.family)
    if not new:
        return f"{winners.FILE.name} stays as it is: nothing was measured that could be compared"
    rows = merged(json.loads(winners.FILE.read_text(encoding="utf-8")), new)
    winners.write(rows)
    won = sum(any(b in row for b in winners.BACKENDS) for row in new)
    return f"{winners.FILE}: {len(new)} classes of calls on {run.family}, {won} of them won by kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 for a folder without results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results of benchmarks/gpu_schedule.py")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance_gpu.md")
    parser.add_argument("--winners", type=Path, default=winners.FILE, help="the table to update")
    args = parser.parse_args(argv)
    try:
        run = Run(args.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    winners.FILE = args.winners
    pictures = gpu_plot.draw(groups(run.lines["speed"]), run.device, args.document)
    args.document.write_text(document(run, pictures), encoding="utf-8")
    print(f"{args.document}{''.join(f', {name}' for name in pictures)}")
    print(write_winners(run))
    for name, line in constants_of(run).items():
        print(f"{name} = {line.get('value')}  # {line.get('from') or ''}".rstrip(" #"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
