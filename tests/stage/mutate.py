"""Plants one fault at a time in a copy of csp_kernels/stage and runs the tests that should find it.

python tests/stage/mutate.py [--budget 60] [--only place.py]

The tests interpret programs instruction by instruction (interpreter.py) on random graphs: no library is needed. Exit
status 1 if a fault survives.
"""

# ruff: noqa: E402, E501
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import sampling


@dataclass(frozen=True)
class Fault:
    """In csp_kernels/stage/<file> `old`, which is there once, becomes `new`: why, in the words of what goes wrong."""

    why: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault("a wrong offset of a value beside another", "place.py", "            start += self.graph.channels[value]\n",
          "            start += self.graph.channels[value] - (value == values[0] and len(values) > 1)\n"),
    Fault("a wrong offset in an output", "place.py", "Place(len(self.graph.inputs) + output, start, start + read.channels)",
          "Place(len(self.graph.inputs) + output, 0, read.channels)"),
    Fault("a slice read from its value's first channel", "place.py", "place.start + read.start, place.start + read.stop)",
          "place.start, place.start + read.stop - read.start)"),
    Fault("a norm's columns from its first channel on", "place.py", "self.columns[read.norm] + read.at",
          "self.columns[read.norm]"),
    Fault("a norm settled before its readers have added their sums", "compile.py",
          "            for value in values:\n                self._settle(value)\n            if any(self.needs",
          "            if any(self.needs"),
    Fault("an input's norms settled twice", "compile.py", "            self._settle(value)\n            if self.needs[value]:",
          "            self._settle(value)\n            self._settle(value)\n            if self.needs[value]:"),
    Fault("a gradient written where it has to be added", "compile.py", '"add" if any(written[c] for c in channels) else "write"',
          '"add" if all(written[c] for c in channels) else "write"'),
    Fault("a gradient added to what nobody has written", "compile.py",
          '                if gradient == "add":\n                    self._clear(read.value, channels)\n', ""),
    Fault("a gradient that nobody writes, read", "compile.py",
          "            self._clear(value, range(self.graph.channels[value]))\n        segments", "            pass\n        segments"),
    Fault("a norm's own share of a gradient forgotten", "compile.py", "return self.layout.statistics.get(value)",
          "return None"),
    Fault("sums for parameters alone, not for what a norm owes", "compile.py",
          "return read.norm in self.wanted.norms or (self.needs[read.value] and not self.common.frozen[read.norm])",
          "return read.norm in self.wanted.norms"),
    Fault("a reader forgotten: an output whose values lie there is not the only one", "compile.py",
          "for held in (True, False):", "for held in (False,):"),
    Fault("a reader forgotten: what a value's own nodes want", "compile.py",
          "self.needs.append(index in wanted.nodes or any(self._wants(read) for read in node.reads))",
          "self.needs.append(index in wanted.nodes)"),
    Fault("a kept buffer that forward does not keep", "place.py", 'return "kept" if self.keep and not again else "scratch"',
          'return "scratch"'),
    Fault("a value that was not kept, computed before what it reads", "compile.py", "for nodes in sorted(missing):",
          "for nodes in sorted(missing, reverse=True):"),
    Fault("an average in front of a value that somebody else reads", "place.py", "if counts[read.value] == 1 and",
          "if"),
    Fault("reads joined across norms that are not side by side", "place.py",
          "column = None if a.column is None else a.column + a.place.stop - a.place.start\n    if apart",
          "column = b.column\n    if apart"),
    Fault("an output's gradient taken for that of a value somebody else reads", "behind.py",
          "and not values & elsewhere", ""),
]  # fmt: skip


def plant(root: Path, fault: Fault) -> None:
    path = root / "csp_kernels" / "stage" / fault.file
    text = (ROOT / "csp_kernels" / "stage" / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.file}: {fault.old!r} is there {text.count(fault.old)} times, expected once")
    path.write_text(text.replace(fault.old, fault.new))


def fails(root: Path) -> bool:
    """Whether a test fails. An error of pytest itself ends everything."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    tests = ["tests/stage/test_compile.py", "tests/stage/test_cost.py"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout)
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or reason contains this")
    parser.add_argument("--budget", type=float, default=0, help="seconds; 0: all of them")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only in f"{fault.file} {fault.why}"]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("csp_kernels", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(ROOT / "pyproject.toml", root)
        if fails(root):
            raise SystemExit("the tests fail without a fault")
        for fault in sampling.within(args.budget, chosen):
            plant(root, fault)
            caught = fails(root)
            survived += not caught
            print(f"{'caught' if caught else 'SURVIVED':<9} {fault.file:<12} {fault.why}", flush=True)
            shutil.copy(ROOT / "csp_kernels" / "stage" / fault.file, root / "csp_kernels" / "stage" / fault.file)
    print(f"{survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
