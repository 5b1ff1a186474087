"""Bugs in the dense layer of one kernel, and the cases that must notice them; mutate.py plants them."""

from __future__ import annotations

from dataclasses import replace

import torch
from dense_layer_case import Case, run
from mutate import Bug, Family

LAUNCHER = "dense_layer.cu"
ROUND_Z = "words[j] = pack<T>(z[i][4 * half + j][2 * low], z[i][4 * half + j][2 * low + 1]);"


def bug(name: str, old: str, new: str, file: str = "device/dense_layer.cuh") -> Bug:
    return Bug(f"layer: {name}", 0, file, old, new)


RACES = (
    bug("no barrier between steps", "    wait_copies<0>();\n    barrier();\n", "    wait_copies<0>();\n"),
    bug("h is stored over the last tile's exchange", "    barrier();  // h, where the exchange was", "    //"),
    bug(
        "no barrier between give and take",
        "      barrier();\n      if (place.half == 0) take",
        "if (place.half == 0) take",
    ),
    bug("one slot for the tiles' tables", "(slot & 1) * SLOT", "(slot & 0) * SLOT"),
)
OTHERS = (
    bug("weights are not waited for", "    wait_copies<0>();\n    barrier();\n", "    barrier();\n"),
    bug("padding is not cleared", "table.clear(h, planes, tile), table.write", "table.write"),
    bug(
        "padding above images is not cleared",
        "unsigned(c.y + dy) < unsigned(cut.image_height)",
        "c.y + dy < cut.image_height",
    ),
    bug("the list ends a row early", "int bottom = c.y + cut.height + 1,", "int bottom = c.y + cut.height,"),
    bug("the list starts inside the cell", "left = c.x > 0 ? c.x - 1 : 0", "left = c.x"),
    bug("cells share their halo", "fragments.a[dx] += (HALO - STRIP) * C::PIXEL_BYTES;", ";"),
    bug("outputs below the image", "c.y + y < cut.image_height &&", "true &&"),
    bug(
        "units of warps all have as many rows",
        "first = unit * each + (unit < more ? unit : more)",
        "first = unit * each",
    ),
    bug("halves are not added", "acc[r][j][e] += f[e];", "(void)f;", "device/conv3x3.cuh"),
    bug("h swizzled on one side", "(uint32_t(to) ^ uint32_t(t << 4))", "(uint32_t(to) | uint32_t(t << 4))"),
    bug("list swizzled on one side", "((uint32_t(chunk) ^ swizzle(C::CHUNKS, first)) << 4)", "(uint32_t(chunk) << 4)"),
    bug("channels beyond the last are not zero", "real ? value", "true ? value"),
    bug(
        "the bottleneck's norm is the first's",
        "bottleneck.store(h, planes, norm2,",
        "bottleneck.store(h, planes, norm1,",
    ),
    bug("z is not multiplied by its last pixels", "((listed + 15) / 16 - mine", "(listed / 16 - mine"),
    bug("inputs of the wrong step", "list.fetch(step + 2)", "list.fetch(step + 1)"),
    bug("early warps do not multiply", "part < 2", "part < 1"),
    bug("stored beside the slice", "channel < args.growth", "true"),
    bug("dropout by the wrong channel", "channel + 2 * j + 1);", "channel + 2 * j);"),
    bug("columns in order", "span / 4 * (within % 8 / 2) + within / 8 * 2 + (within & 1)", "within"),
    bug("the 1x1's weights transposed", "row * args.weight1.input_stride", "row * args.weight1.output_stride"),
    bug("halo counted once", "count > 2 ? 2 : count - 1", "count > 1 ? 1 : 0", LAUNCHER),
    bug("cells side by side are too wide", "cut.width <= STRIP ? 2 : 1", "cut.width <= STRIP + 1 ? 2 : 1", LAUNCHER),
)


def cases(_: int) -> list[Case]:
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


FAMILY = Family(
    RACES, OTHERS, cases, run, "runner_dense_layer.cpp", race=lambda todo: replace(todo[5], schedule=0, growth=16)
)
