"""Bugs in the float32 kernels, and the cases that must notice them; mutate.py plants them."""

from __future__ import annotations

from dataclasses import replace

from conv3x3_case import DGRAD, FORWARD, WGRAD
from conv3x3_float32_case import ONE_BLOCK, Case, run
from mutate import Bug, Family

STAGE, LOOP = "device/float32_stage.cuh", "device/float32_conv3x3.cuh"
FORWARD_FILE, DGRAD_FILE, WGRAD_FILE = (f"device/float32_{kernel}.cuh" for kernel in ("forward", "dgrad", "wgrad"))
WAITS = "      wait_copies<0>();\n"
SWIZZLED = "((uint32_t(chunk) ^ swizzle(2, column + dx)) << 4)"
NONZERO = "nonzero = pixel[i] >= 0 && channel < real"
AFFINE, FOLDED = "fmaf(x - mean[i], scale[i], shift[i])", "fmaf(x, scale[i], fmaf(-mean[i], scale[i], shift[i]))"


def bug(name: str, file: str, old: str, new: str) -> Bug:
    """The name begins with its kernel's."""
    kernel = {"forward": FORWARD, "dgrad": DGRAD, "wgrad": WGRAD}[name.partition(":")[0]]
    return Bug(f"float32 {name}", kernel, file, old, new)


RACES = (
    bug("forward: no barrier between steps", LOOP, "      barrier();\n      uint32_t swap", "uint32_t swap"),
    bug("dgrad: no barrier between steps", LOOP, "      barrier();\n      uint32_t swap", "uint32_t swap"),
    bug("wgrad: no barrier between tiles", WGRAD_FILE, "    barrier();\n    uint32_t swap", "uint32_t swap"),
    bug("forward: two slots for strips instead of four", LOOP, "STRIPS, ROWS, 4>", "STRIPS, ROWS, 2>"),
    bug("dgrad: one halo instead of two", LOOP, "other = shared + C::Halo::BYTES", "other = shared"),
    bug("forward: one slab instead of two", LOOP, "slab + C::SLAB_BYTES;", "slab;"),
    bug("wgrad: one stage of dY instead of two", WGRAD_FILE, "other_y = y + C::Y::BYTES", "other_y = y"),
    bug("forward: idle threads read what others turn", STAGE, "int(at) : P::SPARE", "int(at) : 0"),
    bug("dgrad: no barrier before sums meet", DGRAD_FILE, "    barrier();\n    for", "    for"),
)
OTHERS = (
    bug("forward: copies are not waited for", LOOP, WAITS, ""),
    bug("wgrad: copies are not waited for", WGRAD_FILE, "    wait_copies<0>();\n", ""),
    bug("forward: a slab's last chunk is not copied", LOOP, "i < C::SLAB_BYTES / 16;", "i < C::SLAB_BYTES / 16 - 1;"),
    bug("dgrad: halo one row too low", STAGE, "dy = int(row) - P::BORDER", "dy = int(row)"),
    bug("wgrad: halo one column too far", STAGE, "dx = int(column) - P::BORDER", "dx = int(column)"),
    bug("forward: halo swizzled on one side", LOOP, SWIZZLED, "(uint32_t(chunk) << 4)"),
    bug("dgrad: weights in another order of channels", LOOP, "lane % 4 + word % 2 * 4", "lane % 4 * 2 + word % 2"),
    bug("dgrad: taps are not reversed", LOOP, "args.reversed ? 8 - tap : tap", "tap"),
    bug("forward: padding is not zero", STAGE, NONZERO, "nonzero = channel < real"),
    bug("dgrad: the last channels are not zero", STAGE, NONZERO, "nonzero = pixel[i] >= 0"),
    bug("forward: the norm is folded", STAGE, AFFINE, FOLDED),
    bug("wgrad: the norm is folded", STAGE, AFFINE, FOLDED),
    bug("wgrad: no activation", STAGE, "n < 0 ? 0 : n", "n"),
    bug("forward: TF32 is cut, not rounded", LOOP, "return to_tf32(x);", "return x;"),
    bug("dgrad: dropout of one channel for four", STAGE, "pixel, channel + i);", "pixel, channel);"),
    bug("dgrad: no mask", DGRAD_FILE, "on && !(norm.affine(z, i) <= 0)", "on"),
    bug("dgrad: NaN is masked", DGRAD_FILE, "!(norm.affine(z, i) <= 0)", "norm.affine(z, i) > 0"),
    bug("dgrad: a mask that multiplies", DGRAD_FILE, "dn = keep ? gradient : 0", "dn = keep * gradient"),
    bug("forward: NaN is not kept", STAGE, "n < 0 ? 0 : n", "n > 0 ? n : 0"),
    bug("wgrad: NaN where nothing is owed", STAGE, "quad.scale[i] == 0 ? quad.shift[i] : quad", "quad"),
    bug(
        "forward: statistics count what is outside", FORWARD_FILE, "(first ? 0 : count) + on", "(first ? 0 : count) + 1"
    ),
    bug("forward: stored beyond the last channel", LOOP, "on && channel + i < channels", "on"),
    bug("wgrad: a row of h is left behind", WGRAD_FILE, ", h[1][dx][i] = h[2][dx][i];", ";"),
    bug("wgrad: columns of h out of turn", WGRAD_FILE, "(column - 2 + tap % 3) % 3", "(column + tap % 3) % 3"),
    bug(
        "dgrad: the second strip's results are the first's",
        DGRAD_FILE,
        ", acc[r][i / 2][i % 2] = acc[r][i / 2][2 + i % 2];",
        ";",
    ),
)


def cases(kernel: int) -> list[Case]:
    """Several tiles a block in every schedule, and some of other widths, with NaN and canaries beside each slice."""
    base = Case(kernel, (3, 13, 9), 64, 32, shared_bytes=ONE_BLOCK)
    other = [
        replace(base, bottleneck=28, growth=12),
        replace(base, images=(5, 7, 7), multiprocessors=3),
        replace(base, dropout=0.2),
        replace(base, mean=100.0),
        replace(base, not_finite=True),
    ]
    every = [replace(base, schedule=s, tf32=s % 2 == 1) for s in range(5)]
    return every + [replace(case, tf32=tf32) for case in other for tf32 in (False, True)]


FAMILY = Family(RACES, OTHERS, cases, run, "runner_float32.cpp")
