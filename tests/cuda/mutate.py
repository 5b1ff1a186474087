"""Plants bugs in the CUDA kernels, one at a time, and shows that the tests under the emulation catch each.

    python tests/cuda/mutate.py [words of a name] [--budget SECONDS]

Prints, per bug, how many of its kernel's cases fail by themselves, and whether ThreadSanitizer sees it. Exits 1 if one
survives."""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import emulator
from conv3x3_case import DGRAD, FORWARD, WGRAD, Case, run
from sampling import within


@dataclass(frozen=True)
class Bug:
    name: str
    kernel: int
    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Family:
    """Bugs that the same cases must notice."""

    races: tuple[Bug, ...]  # ThreadSanitizer is asked about them too
    others: tuple[Bug, ...]
    cases: Callable[[int], list[Any]]
    run: Callable[[Path, Any], Any] = run
    program: str = "runner.cpp"
    race: Callable[[list[Any]], Any] = lambda todo: replace(todo[0], bottleneck=40, growth=16)  # what that runs

    @property
    def bugs(self) -> tuple[Bug, ...]:
        return self.races + self.others


LOOP, FORWARD_FILE = "device/conv3x3.cuh", "device/conv3x3_forward.cuh"
DGRAD_FILE, WGRAD_FILE = "device/conv3x3_dgrad.cuh", "device/conv3x3_wgrad.cuh"
REDUCE_FILE = "device/reduce.cuh"
STEP_BARRIER = "      barrier();\n      uint32_t swap = halo;"
LATE = "    wait_copies<{}>();\n    product"
BARRIER_OF_EXCHANGE = "    barrier();\n    Results<C> results;"
PADDING_AFTER = """      uint4 value = prologue.value(i, pixel[i], channel(step));
      bool nonzero = real && pixel[i] >= 0;"""
PADDING_BEFORE = """      if (pixel[i] < 0) prologue.clear(i);
      uint4 value = prologue.value(i, pixel[i], channel(step));
      bool nonzero = true;"""

RACES = (
    Bug("forward: no barrier between steps", FORWARD, LOOP, STEP_BARRIER, "      uint32_t swap = halo;"),
    Bug("dgrad: no barrier between tiles", DGRAD, LOOP, STEP_BARRIER, "      uint32_t swap = halo;"),
    Bug("forward: no barrier between give and take", FORWARD, FORWARD_FILE, BARRIER_OF_EXCHANGE, "Results<C> results;"),
    Bug("forward: no barrier after the exchange", FORWARD, FORWARD_FILE, "    barrier();  // the exchange", "//"),
    Bug("dgrad: two slots for strips instead of four", DGRAD, LOOP, "STRIPS, ROWS, 4>", "STRIPS, ROWS, 2>"),
    Bug("wgrad: no barrier between tiles", WGRAD, WGRAD_FILE, "    barrier();\n    uint32_t swap", "uint32_t swap"),
    Bug("wgrad: two stages instead of three", WGRAD, WGRAD_FILE, "empty = shared + 2 * C::STAGE", "empty = shared"),
)
COPIES = (
    Bug("forward: weights are not waited for", FORWARD, LOOP, "  wait_copies<0>();\n", ""),
    Bug("wgrad: copies are waited for late", WGRAD, WGRAD_FILE, LATE.format(1), LATE.format(2)),
)
PLACES = (
    Bug("forward: halo one row too low", FORWARD, LOOP, "int dy = int(row) - 1,", "int dy = int(row),"),
    Bug("dgrad: halo one column too far", DGRAD, LOOP, "dx = int(column) - 1;", "dx = int(column);"),
    Bug("wgrad: halo one column too far", WGRAD, WGRAD_FILE, "dx = int(e >> 20 & 15) - 1", "dx = int(e >> 20 & 15)"),
    Bug("forward: stored beside the slice", FORWARD, FORWARD_FILE, "first_channel, words", "first_channel + 8, words"),
    Bug("dgrad: stored below the image", DGRAD, LOOP, "s.y - place.row() : 0", "s.y - place.row() + 1 : 0"),
    Bug("forward: padding before the prologue", FORWARD, LOOP, PADDING_AFTER, PADDING_BEFORE),
    Bug("forward: halo swizzled on one side", FORWARD, LOOP, "(a_chunk ^ swizzle(C::CHUNKS, column + dx))", "a_chunk"),
    Bug("dgrad: weights swizzled on one side", DGRAD, LOOP, "(uint32_t(chunk) ^ swizzle(C::COLUMNS / 8, k))", "chunk"),
)
SUMS = (
    Bug("forward: a half of the channels is dropped", FORWARD, LOOP, "acc[r][j][e] += f[e];", "(void)f;"),
    Bug("wgrad: a half of the rows is dropped", WGRAD, WGRAD_FILE, "acc[i / C::J][i % C::J][e] += f[e];", "(void)f;"),
    Bug("dgrad: taps are not reversed", DGRAD, REDUCE_FILE, "args.reversed ? 8 - tap : tap", "tap"),
    Bug("dgrad: no mask", DGRAD, DGRAD_FILE, "on && fmaf(z, scale[i], shift[i]) > 0", "on"),
    Bug("forward: statistics count what is outside", FORWARD, FORWARD_FILE, "count += on;", "count += 1;"),
    Bug(
        "wgrad: slabs are not all added", WGRAD, REDUCE_FILE, "row < Reduction::ROWS; row++) sum", "row < 2; row++) sum"
    ),
)


def cases(kernel: int) -> list[Case]:
    """Several tiles a block in every schedule, and some of other widths, with NaN and canaries beside each slice."""
    base = Case(kernel, (3, 13, 9), 64, 32)
    other = [
        replace(base, bottleneck=40, growth=24),
        replace(base, images=(5, 7, 7), multiprocessors=3),
        replace(base, dropout=0.2),
    ]
    return [replace(base, schedule=s) for s in range(5)] + other


def mutant(directory: Path, bug: Bug) -> Path:
    source = directory / "cuda"
    shutil.copytree(emulator.SOURCE, source)
    file = source / bug.file
    text = file.read_text()
    assert text.count(bug.old) >= 1, f"{bug.name}: what it changes is no longer in {bug.file}"
    file.write_text(text.replace(bug.old, bug.new, 1))
    if bug.new == PADDING_BEFORE:
        add_clear(source)
    return source


def add_clear(source: Path) -> None:
    """Padding before the prologue needs a way to write zeros there."""
    method = "  DEVICE void clear(int i) {{ {} = make_uint4(0, 0, 0, 0); }}\n"
    coefficients = "  DEVICE void coefficients"
    prologue, loop = source / "device/prologue.cuh", source / LOOP
    start, activation, gradient = prologue.read_text().split(coefficients)
    parts = [
        start,
        method.format("raw[i]"),
        coefficients,
        activation,
        method.format("g[i] = f[i]"),
        coefficients,
        gradient,
    ]
    prologue.write_text("".join(parts))
    loop.write_text(loop.read_text().replace("store(uint32_t halo, int step) const", "store(uint32_t halo, int step)"))


def fails(binary: Path, case: Any, run: Callable[[Path, Any], Any]) -> bool:
    try:
        outcome = run(binary, case)
    except (AssertionError, emulator.Failure, subprocess.TimeoutExpired):
        return True
    return outcome.error > 1 or getattr(outcome, "sums_error", 0) > 2e-6


def caught(bug: Bug, family: Family) -> bool:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = mutant(directory, bug)
        binary = emulator.build(directory, "plain", source, family.program)
        todo = family.cases(bug.kernel)
        count = sum(fails(binary, case, family.run) for case in todo)
        text = f"{count} of {len(todo)} cases fail"
        seen = False
        if bug in family.races:
            binary = emulator.build(directory, "tsan", source, family.program)
            seen = fails(binary, family.race(todo), family.run)
            text += ", ThreadSanitizer sees it" if seen else ", ThreadSanitizer does not see it"
    print(f"{'caught  ' if count or seen else 'SURVIVED'}  {bug.name}: {text}", flush=True)
    return count > 0 or seen


FAMILY = Family(RACES, (*COPIES, *PLACES, *SUMS), cases)
MORE = ("bugs_float32", "bugs_small_maps", "bugs_dense_layer")  # modules with a FAMILY of their own


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of a name")
    parser.add_argument("--budget", type=float, default=0, help="seconds; as many bugs as fit, drawn anew every day")
    given = parser.parse_args()
    families = [FAMILY, *(importlib.import_module(name).FAMILY for name in MORE)]
    chosen = [(bug, family) for family in families for bug in family.bugs if " ".join(given.words) in bug.name]
    results = [caught(bug, family) for bug, family in within(given.budget, chosen)]
    sys.exit(0 if results and all(results) else 1)
