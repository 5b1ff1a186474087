"""Every benchmark row on two checkouts, interleaved in one run: is this one slower than that one?

    git worktree add ../before HEAD~1 && (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/compare_commits.py ../before --rounds 15

Both libraries register the same operators, so each runs in a process of its own; one works while the other waits.
Neither gives memory back to the system while it runs (KEEP_HEAP).
A row's ratio is the median over rounds of this checkout's time divided by the other's; above 1 this one is slower.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SAMPLE_MS = 30.0  # a sample repeats a short call until it lasts this long
PAUSE = 0.004  # seconds for the threads of the process that has just run to fall asleep
# glibc gives the end of its heap back to the system, and takes it again as page faults, by thresholds that follow what
# was freed before: a step of one process then takes none and that of the other 7,000, whatever the libraries do.
KEEP_HEAP = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a layer (a key of `layers`), how it runs and on what."""

    layer: str
    mode: str  # train, infer
    dtype: str = "float32"
    precision: str = "highest"  # of float32 products
    batch: int = 16

    def __str__(self) -> str:
        precision = "" if self.precision == "highest" else f" {self.precision}"
        return f"{self.layer}, batch {self.batch}, {self.mode}, {self.dtype}{precision}"


def layers() -> dict[str, tuple[Callable[[], Any], list[tuple[int, int]], bool]]:
    """Name -> constructor, [channels, size] of each input, whether they are passed as a list."""
    import csp_kernels as csp

    found: dict[str, tuple[Callable[[], Any], list[tuple[int, int]], bool]] = {}
    for channels, size, count in ((128, 28, 12), (256, 14, 24), (64, 56, 6)):
        block = (lambda c, n: lambda: csp.DenseBlock(n, c, 32))(channels, count)
        found[f"DenseBlock {channels} channels {size}x{size} {count} layers"] = (block, [(channels, size)], False)
    found["DenseBlock 24 channels 7x7 2 layers of growth 12"] = (lambda: csp.DenseBlock(2, 24, 12), [(24, 7)], False)
    for layer, count, width in (("pre", 12, 4), ("post", 6, 4), ("two_way", 4, 2)):
        stage = (lambda k, n, w: lambda: csp.CSPDenseStage(128, 256, n, 32, w, layer=k))(layer, count, width)
        found[f"CSPDenseStage {layer} {count} layers 28x28"] = (stage, [(128, 28)], False)
    sizes = {"pre": (64, 448, 224, 256), "post": (64, 192, 192, 256)}
    for order, (part, dense, mid, out) in sizes.items():
        for fusion in ("csp", "first", "last"):
            to = part + mid if fusion == "last" else out
            join = (lambda *a, **k: lambda: csp.PartialTransition(*a, **k))(
                part, dense, mid, to, fusion=fusion, order=order
            )
            found[f"PartialTransition {order} {fusion} 28x28"] = (join, [(part, 28), (dense, 28)], False)
    for inputs, each, out, size, act in (
        (2, 128, 256, 28, "relu"),
        (8, 32, 128, 28, "relu"),
        (2, 64, 64, 56, "relu"),
        (4, 64, 128, 28, "mish"),
    ):
        conv = (lambda c, o, a: lambda: csp.ConcatConv(c, o, act=a))([each] * inputs, out, act)
        found[f"ConcatConv {inputs} x {each} to {out} {act} {size}x{size}"] = (conv, [(each, size)] * inputs, True)
    return found


def rows(names: list[str]) -> list[Row]:
    """All of them; "high" and batch 1 for the dense blocks, where they choose other kernels."""
    found = []
    for name in names:
        small = "7x7" in name
        for mode in ("train", "infer"):
            found.append(Row(name, mode, batch=1 if small else 16))
            if not small:
                found.append(Row(name, mode, "bfloat16"))
            if name.startswith("DenseBlock") and not small:
                found += [Row(name, mode, precision="high"), Row(name, mode, batch=1)]
    return found


class Worker:
    """In the process of one checkout: prepares a row, times it, says what it keeps for backward."""

    def __init__(self) -> None:
        self.layers = layers()
        self.work: Callable[[], Any] = lambda: None
        self.repeats = 1

    def names(self) -> list[str]:
        return list(self.layers)

    def prepare(self, row: dict[str, Any]) -> int:
        """Builds the layer, runs it twice; bytes kept for backward (0 for inference)."""
        import torch

        torch.manual_seed(0)
        torch.set_float32_matmul_precision(row["precision"])
        make, inputs, as_list = self.layers[row["layer"]]
        dtype, train = getattr(torch, row["dtype"]), row["mode"] == "train"
        module = make().to(dtype).to(memory_format=torch.channels_last).train(train)
        tensors = [
            torch.randn(row["batch"], c, s, s).to(dtype).to(memory_format=torch.channels_last).requires_grad_(train)
            for c, s in inputs
        ]

        def forward() -> Any:
            return module(tensors) if as_list else module(*tensors)

        with torch.no_grad():
            grad = torch.ones_like(forward())

        def step() -> None:
            for t in (*tensors, *module.parameters()):
                t.grad = None
            forward().backward(grad)

        def infer() -> None:
            with torch.no_grad():
                forward()

        self.work = step if train else infer
        start = time.perf_counter()
        self.work()
        self.work()
        spent = (time.perf_counter() - start) * 500
        self.repeats = max(1, min(200, round(SAMPLE_MS / max(spent, 0.01))))
        return self._saved(forward, [*tensors, *module.parameters(), *module.buffers()]) if train else 0

    @staticmethod
    def _saved(forward: Callable[[], Any], own: list[Any]) -> int:
        from csp_kernels.demo.measure import saved_bytes

        return saved_bytes(forward, own)

    def time(self) -> float:
        """Milliseconds of a call."""
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.work()
        return (time.perf_counter() - start) * 1e3 / self.repeats


def serve(root: Path) -> None:
    """Answers requests, a line of JSON each, until the input ends."""
    import csp_kernels

    where = Path(csp_kernels.__file__).resolve()
    if root.resolve() not in where.parents or not csp_kernels.native.available():
        why = csp_kernels.native.why_not()
        raise SystemExit(f"expected csp_kernels of {root} with its library, got {where}: {why}")
    worker = Worker()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


class Process:
    """A checkout's worker, from outside."""

    def __init__(self, root: Path, threads: int | None) -> None:
        environment = os.environ | KEEP_HEAP | {"PYTHONPATH": str(root)}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, str(HERE), "--serve", str(root)]
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker has ended with status {self.process.wait()}")
        time.sleep(PAUSE)
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(row: Row, ours: Process, other: Process, rounds: int, first: int) -> dict[str, Any]:
    """Medians, ratios and bytes kept of one row; first: 0 or 1, which of the two prepares first."""
    both = ours, other
    kept = {side: both[side].ask("prepare", row.__dict__) for side in (first, 1 - first)}
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for side in (first, 1 - first) if index % 2 else (1 - first, first):
            times[side].append(both[side].ask("time"))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    after, before = (statistics.median(values) for values in times)
    return {
        "row": str(row), "ms": round(after, 3), "before_ms": round(before, 3),
        "ratio": round(ratio, 4), "ratio_q1": round(low, 4), "ratio_q3": round(high, 4), "rounds": rounds,
        "saved_bytes": kept[0], "saved_bytes_before": kept[1],
    }  # fmt: skip


def over_starts(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row's results of several starts as one: the ratio is the mean over pairs of starts, either process being the
    first in one of them, of the geometric means of their medians; its quartiles are that mean less and plus the
    standard error."""
    if len(found) == 1:
        return found[0]
    ratios = [(a["ratio"] * b["ratio"]) ** 0.5 for a, b in zip(found[::2], found[1::2], strict=True)]
    mean, error = statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    spread = {"ratio": round(mean, 4), "ratio_q1": round(mean - error, 4), "ratio_q3": round(mean + error, 4)}
    return found[0] | spread | {key: statistics.median(r[key] for r in found) for key in ("ms", "before_ms")}


def show(result: dict[str, Any]) -> None:
    times = f"{result['ms']:>9.3f} {result['before_ms']:>9.3f} ms"
    spread = f"[{result['ratio_q1']:.3f}, {result['ratio_q3']:.3f}]"
    print(f"{result['row']:<72} {times}  {result['ratio']:.3f} {spread}", flush=True)


def compare_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of all rows that contain --only. Each start is a new process on either side, whose memory lies elsewhere
    and which takes the rows in another order: rounds inside one process do not show what that does. They take turns in
    being the first to start and to prepare: of two processes of one checkout that one was seen to be 5 to 8 % slower.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    roots = HERE.parents[1], args.other.resolve()
    for start in range(args.starts):
        first = start % 2
        started = {side: Process(roots[side], args.threads) for side in (first, 1 - first)}
        ours, other = started[0], started[1]
        names = {side: started[side].ask("names") for side in (first, 1 - first)}
        wanted = [row for row in rows(names[0]) if any(only in str(row) for only in args.only)]
        order = random.Random(start).sample(wanted, len(wanted)) if start else wanted
        for row in order:
            found.setdefault(str(row), []).append(compare(row, ours, other, args.rounds, first))
            if args.starts == 1:
                show(found[str(row)][0])
        ours.end()
        other.end()
        print(f"start {start + 1} of {args.starts} done", file=sys.stderr, flush=True)
    results = [over_starts(each) for each in found.values()]
    if args.starts > 1:
        for result in results:
            show(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the other checkout, built in place")
    parser.add_argument("--only", nargs="+", default=[""], help="rows that contain one of these")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--starts", type=int, default=1, help="start both processes so often: 1, or an even number from 4"
    )
    parser.add_argument("--threads", type=int, help="threads of each (default: PyTorch's choice)")
    parser.add_argument("--allowed", type=float, default=1.02, help="a larger ratio is named as slower")
    parser.add_argument("--csv", type=Path, help="where to write the rows to")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    paired = args.starts == 1 or (args.starts >= 4 and args.starts % 2 == 0)
    if args.other is None or args.rounds < 2 or not paired:
        parser.error("expected the other checkout, at least two rounds, and one start or an even number from 4")
    results = compare_rows(args)
    if args.csv and results:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]))
            writer.writeheader()
            writer.writerows(results)
    slower = [r["row"] for r in results if r["ratio"] > args.allowed or r["saved_bytes"] > r["saved_bytes_before"]]
    print(f"{len(results)} rows, {len(slower)} slower than {args.allowed} or keeping more", *slower, sep="\n  ")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
