"""Step of the GPU schedule: where a dense block's training step spends its time, and hardware counters of the three
heaviest kernels by NVIDIA's ncu.

torch's profiler names the kernels and their times first, which every machine allows; ncu then counts those of one step
(gpu_small.py --profiled). counters.jsonl: {"kernel", "metric", "value", "unit"}, of several launches of one name, grid
and block the mean (Triton kernels of different modules share names: `_forward`). Machines often forbid counters
(ERR_NVGPUCTRPERM): a line with "metric": "skipped" and a message says so.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_machine import find_tool
from gpu_steps import SKIPPED, Deadline, Results, parse

SMALL = Path(__file__).resolve().parent / "gpu_small.py"
HEAVIEST = 3
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
)
FORBIDDEN = "ERR_NVGPUCTRPERM"


def plain(name: str) -> str:
    """A kernel's function name without its type, template arguments, namespaces and parameters, as ncu compares it."""
    name = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    depth, kept = 0, ""
    for letter in name:
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            break
        kept += letter if depth == 0 and letter != ">" else ""
    return kept.strip().rpartition("::")[2]


def heaviest(lines: Sequence[dict[str, Any]], count: int = HEAVIEST) -> list[str]:
    """Plain names of the kernels that take most time, the heaviest first. lines: of gpu_small.py --times."""
    spent: dict[str, float] = defaultdict(float)
    for line in lines:
        spent[plain(line["name"])] += line["us"]
    return sorted(spent, key=lambda name: -spent[name])[:count]


def command(tool: str, kernels: Sequence[str], *arguments: str) -> list[str]:
    """ncu, of these functions alone; what the program starts itself is not looked at."""
    names = "|".join(map(re.escape, kernels))
    options = ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS), "--profile-from-start", "off"]
    options += ["--kernel-name", f"regex:^({names})$", "--target-processes", "application-only"]
    return [tool, *options, sys.executable, str(SMALL), "--profiled", *arguments]


def counters(text: str) -> list[dict[str, Any]]:
    """Of ncu's output: a line a kernel of one grid and block, and metric. Messages of ncu and of the program before and
    between are passed over."""
    rows = [line for line in text.splitlines() if line.startswith('"')]
    start = next((i for i, row in enumerate(rows) if row.startswith('"ID"')), len(rows))
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in csv.DictReader(rows[start:]):
        if not row.get("Metric Name"):
            continue
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a": this GPU does not have the counter
            continue
        shape = "".join(f", {key.split()[0].lower()} {row[key]}" for key in ("Grid Size", "Block Size") if row.get(key))
        found[f"{plain(row['Kernel Name'])}{shape}", row["Metric Name"], row["Metric Unit"]].append(value)
    return [
        {"kernel": kernel, "metric": metric, "value": statistics.fmean(values), "unit": unit}
        for (kernel, metric, unit), values in found.items()
    ]


def complaint(text: str, status: int) -> str:
    """Why ncu has counted nothing."""
    if FORBIDDEN in text:
        return f"{FORBIDDEN}: this machine lets administrators alone read counters"
    errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    last = text.strip().splitlines()[-1:]
    return f"ncu has counted nothing, status {status}: {(errors or last or ['no output'])[0][:300]}"


def output(line: Sequence[str], deadline: Deadline) -> tuple[int, str]:
    """Exit status and text of a command, which is ended with the step."""
    try:
        done = subprocess.run(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(0.1, deadline.left())
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return -1, (text.decode(errors="replace") if isinstance(text, bytes) else text) + "\nno time was left"
    return done.returncode, done.stdout


def timed(args: Any, deadline: Deadline, results: Results) -> list[dict[str, Any]]:
    """Kernels of the step with their times, written down; none if that failed, whose output is in the log."""
    status, text = output([sys.executable, str(SMALL), "--times", "--device", args.device], deadline)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"name"')]
    if deadline.over():
        return []
    if status or not lines:
        print(text)
        results.write({"kernel": "all", "metric": "failed", "value": None, "unit": "", "message": text.strip()[-300:]})
        return []
    total = sum(line["us"] for line in lines)
    for line in sorted(lines, key=lambda line: -line["us"])[: 2 * HEAVIEST]:
        for metric, value, unit in (
            ("time", line["us"], "us"),
            ("calls", line["calls"], ""),
            ("share", 100 * line["us"] / total, "%"),
        ):
            results.write({"kernel": line["name"], "metric": f"step {metric}", "value": round(value, 3), "unit": unit})
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """1 if the step does not run; 77 where nothing can be counted."""
    args = parse(__doc__, argv)
    deadline, tool, why_not, left = Deadline(args.limit), find_tool("ncu"), "", list[str]()
    with Results(args.out, "counters") as results:
        if args.dry_run:
            print("a dry run launches nothing that could be counted; gpu_sanitizer.py compiles its kernels")
            results.write({"left": []})
            return SKIPPED
        lines = timed(args, deadline, results)
        if not lines and deadline.over():
            left = ["times"]
            print("there was no time left")
        elif lines and args.device == "cpu":
            why_not = "ncu needs a GPU: operators were timed, nothing was counted"
        elif lines and tool is None:
            why_not = "ncu is not installed (it comes with the CUDA toolkit): kernels were timed, nothing was counted"
        elif lines and tool:
            kernels = heaviest(lines)
            status, text = output(command(tool, kernels, "--device", args.device), deadline)
            print(text)
            found = counters(text)
            for line in found:
                results.write(line)
            left = kernels if not found and deadline.over() else []
            why_not = "" if found else complaint(text, status)
        if why_not:
            results.write({"kernel": "all", "metric": "skipped", "value": None, "unit": "", "message": why_not})
            print(why_not)
        results.write({"left": left})
    return SKIPPED if why_not or left == ["times"] else 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
