"""Bugs in what serves small maps, and the cases that must notice them; mutate.py plants them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import conv3x3_case
from conv3x3_case import FORWARD, Case, Outcome
from mutate import FORWARD_FILE, Bug, Family
from test_small_maps import DEEP, SPLIT, Planned

ADD = "    add_in_order(sum, args, on, pixel, channel);\n"
DROPPED_FIRST = """
    SplitArguments some = args;
    some.splits = 1;
    add_in_order(sum, some, on, pixel, channel);
    for (int i = 0; i < 8; i++) sum[i] = mask.active ? mask.apply(sum[i], pixel, channel + i) : sum[i];
    some.splits = args.splits - 1, some.sums += (long long)args.pixels * args.outputs;
    add_in_order(sum, some, on, pixel, channel);
    const DropoutMask mask{Dropout{}};
"""
UNROUNDED = """
    for (int i = 0; i < 8; i++) {
      const float2 x = unpack<T>(words[i / 2]);
      running.sum[i] += on ? sum[i] - (i % 2 ? x.y : x.x) : 0;
    }
"""
ADDED = "    running.add(on, words);\n"
GIVE = "    if (place.half) give<0, C::R>(acc, first + (place.half - 1) * BYTES);\n"
GATHERED = "      write<0, C::R>(acc, results);\n    }\n"


def bug(name: str, old: str, new: str) -> Bug:
    return Bug(f"small maps: {name}", FORWARD, FORWARD_FILE, old, new)


BUGS = (
    bug("a split is left out", "s >= args.splits) continue", "s + 1 >= args.splits) continue"),
    bug("a split is added twice", "sum[i] += f[i];", "sum[i] += s == 1 ? 2 * f[i] : f[i];"),
    bug("dropout before the sum", ADD, DROPPED_FIRST),
    bug("statistics of unrounded sums", f"{ADDED}  }}", f"{ADDED}{UNROUNDED}  }}"),
    bug("statistics begin anew each round", "if (on && !started) running", "if (on) running"),
    bug("wrong offset of a split", "blockIdx.z * args.pixels", "blockIdx.z * (args.pixels - 1)"),
    bug("sums one pixel too far", "args.pixels + pixel) * args", "args.pixels + pixel + 1) * args"),
    bug("weights of the first split", " + first / 16;", ";"),
    bug("norm of the first split", "args.norm.scale + first,", "args.norm.scale,"),
    bug("z of the first split", "prologue.z = args.z + first", "prologue.z = args.z"),
    bug("the last split is as wide as others", "C::SPLITS && args.split_channels < rest ?", "C::SPLITS ?"),
    bug("a part of the channels is dropped", "part < C::HALVES - 1", "part < C::HALVES - 2"),
    bug("no barrier before parts are gathered", f"{GIVE}    barrier();\n", GIVE),
    bug("no barrier after parts are gathered", f"{GATHERED}    barrier();", GATHERED),
)


def cases(_: int) -> list[tuple[Case, bool]]:
    """Splits, for which launches must cost nothing, and deep tiles in all schedules."""

    def dropped(planned: Planned) -> Case:
        return replace(planned.case(), dropout=0.3)

    split = [*(p.case() for p in SPLIT), dropped(SPLIT[5]), dropped(SPLIT[6])]
    deep = [replace(p.case(), schedule=s) for p in (DEEP[0], DEEP[5]) for s in range(5)]
    return [*((case, True) for case in split), *((case, False) for case in deep)]


def run(binary: Path, case: tuple[Case, bool]) -> Outcome:
    """Launches cost nothing, or what they do."""
    os.environ["CSP_LAUNCH_NS"] = "0" if case[1] else "2000"
    try:
        return conv3x3_case.run(binary, case[0])
    finally:
        del os.environ["CSP_LAUNCH_NS"]


FAMILY = Family((), BUGS, cases, run)
