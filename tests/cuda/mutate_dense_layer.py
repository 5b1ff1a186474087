"""Plants bugs in the dense layer of one kernel, one at a time, and shows that the tests under the emulation catch each.

    python tests/cuda/mutate_dense_layer.py [words of a name]

Prints, per bug, how many cases fail by themselves, and for races whether ThreadSanitizer sees them. Exits 1 if one
survives."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import emulator
import torch
from dense_layer_case import Case, run


@dataclass(frozen=True)
class Bug:
    name: str
    old: str
    new: str
    race: bool = False
    file: str = "device/dense_layer.cuh"


LAUNCHER = "dense_layer.cu"
ROUND_Z = "words[j] = pack<T>(z[i][4 * half + j][2 * low], z[i][4 * half + j][2 * low + 1]);"
BUGS = (
    Bug("no barrier between steps", "    wait_copies<0>();\n    barrier();\n", "    wait_copies<0>();\n", True),
    Bug("weights are not waited for", "    wait_copies<0>();\n    barrier();\n", "    barrier();\n"),
    Bug("h is stored over the last tile's exchange", "    barrier();  // h, where the exchange was", "    //", True),
    Bug(
        "no barrier between give and take",
        "      barrier();\n      if (place.half == 0) take",
        "if (place.half == 0) take",
        True,
    ),
    Bug("one slot for the tiles' tables", "(slot & 1) * SLOT", "(slot & 0) * SLOT", True),
    Bug("padding is not cleared", "table.clear(h, planes, tile), table.write", "table.write"),
    Bug(
        "padding above images is not cleared",
        "unsigned(c.y + dy) < unsigned(cut.image_height)",
        "c.y + dy < cut.image_height",
    ),
    Bug("the list ends a row early", "int bottom = c.y + cut.height + 1,", "int bottom = c.y + cut.height,"),
    Bug("the list starts inside the cell", "left = c.x > 0 ? c.x - 1 : 0", "left = c.x"),
    Bug("cells share their halo", "fragments.a[dx] += (HALO - STRIP) * C::PIXEL_BYTES;", ";"),
    Bug("outputs below the image", "c.y + y < cut.image_height &&", "true &&"),
    Bug(
        "units of warps all have as many rows",
        "first = unit * each + (unit < more ? unit : more)",
        "first = unit * each",
    ),
    Bug("halves are not added", "acc[r][j][e] += f[e];", "(void)f;", file="device/conv3x3.cuh"),
    Bug("h swizzled on one side", "(uint32_t(to) ^ uint32_t(t << 4))", "(uint32_t(to) | uint32_t(t << 4))"),
    Bug("list swizzled on one side", "((uint32_t(chunk) ^ swizzle(C::CHUNKS, first)) << 4)", "(uint32_t(chunk) << 4)"),
    Bug("channels beyond the last are not zero", "real ? value", "true ? value"),
    Bug(
        "the bottleneck's norm is the first's",
        "bottleneck.store(h, planes, norm2,",
        "bottleneck.store(h, planes, norm1,",
    ),
    Bug("z is not multiplied by its last pixels", "((listed + 15) / 16 - mine", "(listed / 16 - mine"),
    Bug("inputs of the wrong step", "list.fetch(step + 2)", "list.fetch(step + 1)"),
    Bug("early warps do not multiply", "part < 2", "part < 1"),
    Bug("stored beside the slice", "channel < args.growth", "true"),
    Bug("dropout by the wrong channel", "channel + 2 * j + 1);", "channel + 2 * j);"),
    Bug("columns in order", "span / 4 * (within % 8 / 2) + within / 8 * 2 + (within & 1)", "within"),
    Bug("the 1x1's weights transposed", "row * args.weight1.input_stride", "row * args.weight1.output_stride"),
    Bug("halo counted once", "count > 2 ? 2 : count - 1", "count > 1 ? 1 : 0", file=LAUNCHER),
    Bug(
        "cells side by side are too wide", "cut.width <= STRIP ? 2 : 1", "cut.width <= STRIP + 1 ? 2 : 1", file=LAUNCHER
    ),
)


def cases() -> list[Case]:
    """Several tiles a block in every schedule, and other shapes and widths, with NaN and canaries beside each slice."""
    base = Case((4, 13, 9), 64, 64, 32)
    other = [
        replace(base, entering=24, bottleneck=24, growth=24, schedule=4),
        replace(base, images=(11, 7, 7), growth=48),
        replace(base, images=(1, 40, 20), entering=136, bottleneck=128, growth=40),
        replace(base, images=(2, 29, 6), dropout=0.3, schedule=3),
        replace(base, images=(2, 9, 18), bottleneck=192, growth=16, dtype=torch.bfloat16),
    ]
    return [replace(base, schedule=s) for s in range(5)] + other


def fails(binary: Path, case: Case) -> bool:
    try:
        return run(binary, case).error > 1
    except (AssertionError, emulator.Failure, subprocess.TimeoutExpired):
        return True


def caught(bug: Bug) -> bool:
    with tempfile.TemporaryDirectory() as name:
        directory, source = Path(name), Path(name, "cuda")
        shutil.copytree(emulator.SOURCE, source)
        file = source / bug.file
        text = file.read_text()
        assert bug.old in text, f"{bug.name}: what it changes is no longer in {bug.file}"
        file.write_text(text.replace(bug.old, bug.new, 1))
        binary = emulator.build(directory, "plain", source, "runner_dense_layer.cpp")
        todo = cases()
        count = sum(fails(binary, case) for case in todo)
        said, seen = f"{count} of {len(todo)} cases fail", False
        if bug.race:
            binary = emulator.build(directory, "tsan", source, "runner_dense_layer.cpp")
            seen = fails(binary, replace(todo[5], schedule=0, growth=16))
            said += ", ThreadSanitizer sees it" if seen else ", ThreadSanitizer does not see it"
    print(f"{'caught  ' if count or seen else 'SURVIVED'}  {bug.name}: {said}", flush=True)
    return count > 0 or seen


if __name__ == "__main__":
    words = " ".join(sys.argv[1:])
    results = [caught(bug) for bug in BUGS if words in bug.name]
    sys.exit(0 if results and all(results) else 1)
