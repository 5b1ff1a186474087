"""Plants one fault at a time in a copy of the kernels and runs the tests that should find it.

python tests/kernels/mutate.py [--only mix] [--root DIRECTORY] [--budget SECONDS]

A mask, an offset and an accumulation of each kernel, and what its launchers pass on. Exit status 1 if a fault survives.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # noqa: F401
import triton  # noqa: F401

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from sampling import within

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """In `place` (a function or class; "": anywhere) of csp_kernels/kernels/<module>.py `old`, which is there once,
    becomes `new`. select: of tests/kernels/test_<test or module>.py."""

    module: str
    place: str
    old: str
    new: str
    select: str
    test: str = ""

    def applied(self, text: str) -> str:
        start, end = 0, len(text)
        if self.place:
            start = max(text.find(f"{kind} {self.place}(") for kind in ("def", "class"))
            after = [text.find(f"\n{next_}", start) for next_ in ("def ", "class ", "@")]
            end = min([i for i in after if i >= 0], default=end)
        if text.count(self.old, start, end) != 1:
            found = text.count(self.old, start, end)
            raise SystemExit(f"{self.module}.{self.place}: {self.old!r} is there {found} times, expected once")
        return text[:start] + text[start:end].replace(self.old, self.new) + text[end:]


def run(root: Path, test: str, select: str) -> str:
    """The last line of pytest; empty if all passed. In a fork: torch and triton are imported once."""
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "", "-k", select]
    arguments = [f"tests/kernels/test_{test}.py", *options]
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(root)
            sys.path[0] = str(root)
            code = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        lines = output.read().strip().splitlines()
    if code not in (0, 1):  # no tests selected, or an error of pytest itself
        raise SystemExit("\n".join([*arguments, *lines]))
    return lines[-1] if code else ""


def attempt(root: Path, fault: Fault) -> bool:
    """Whether it is caught; prints the row."""
    path = root / "csp_kernels" / "kernels" / f"{fault.module}.py"
    text, start = path.read_text(), time.monotonic()
    path.write_text(fault.applied(text))
    try:
        outcome = run(root, fault.test or fault.module, fault.select)
    finally:
        path.write_text(text)
    name = f"{fault.module}.{fault.place or '*'}"
    old, new = (" ".join(t.split()) for t in (fault.old, fault.new))
    change = f"{old} -> {new or '(nothing)'}"
    print(f"{'caught' if outcome else 'SURVIVED':8}  {time.monotonic() - start:4.0f}s  {name:32}  {change}", flush=True)
    return bool(outcome)


MIX_F = "test_forward and float32 and not large"
MIX_B = "test_backward and float32"
MIX_ONE = "test_backward and float16"
CONV_F, CONV_B = "test_forward and float32", "test_backward and float32 and not 14x14"
NAN_ACT, NAN_PRE, NAN_16 = "test_activations", "test_in_an_input and dense", "in_sixteen_bits"
ACT_F, ACT_B = "test_forward and (ragged or pool)", "test_backward and (ragged or pool)"
DENSE = "test_in_float64 and odd"
FROZEN = "test_frozen_norms and one and layer"
LARGE = "test_large_mean and one and layer"
TWO = "test_in_float64 and concat and outputs"
OTHERS = "strides_and_groups and float32"
JOINS, SLICES = "test_in_float64 and joins", "test_in_float64 and slices"

FAULTS = [
    # mix
    Fault("mix", "_read", "(k < K)[None, :]", "(k < K + 1)[None, :]", MIX_F),
    Fault("mix", "_read", "row_ok[:, None] & ", "", MIX_F),
    Fault("mix", "_read", "pitch + k[None, :]", "pitch + k[None, :] + 1", MIX_F),
    Fault("mix", "_read", "total += a", "total = a", MIX_F),
    Fault("mix", "_read", "tl.load(scale + k", "tl.load(scale + k - 1", MIX_F),
    Fault("mix", "_multiply", "tl.trans(a.to(element)), acc", "tl.trans(a.to(element)), 0 * acc", MIX_F),
    Fault("mix", "_multiply", "(k < K)[None, :]", "(k < K + 1)[None, :]", MIX_F),
    Fault("mix", "_multiply", "w_pitch + k[None, :]", "w_pitch + k[None, :] + 1", MIX_F),
    Fault("mix", "_forward", "& row_ok[None, :]", "& (row_ok | True)[None, :]", MIX_F),
    Fault("mix", "_forward", "(n < N)[:, None]", "(n < N + 1)[:, None]", MIX_F),
    Fault("mix", "_forward", "mask=ok)\n    if partials", "mask=row_ok[None, :])\n    if partials", MIX_F),
    Fault("mix", "_forward", "acc = tl.load(before", "_ = tl.load(before", MIX_F),
    Fault("mix", "_dgrad", "(k < K)[:, None] & p_ok", "(k < K + 1)[:, None] & p_ok", MIX_B),
    Fault("mix", "_dgrad", "ok = (k < K)[:, None] & p_ok[None, :]", "ok = (k < K)[:, None] & (p >= 0)[None, :]", MIX_B),
    Fault("mix", "_dgrad", "(g_pitch * UNIT) + k[:, None]", "(g_pitch * UNIT) + k[:, None] + 1", MIX_B),
    Fault("mix", "_dgrad", "(pitch * UNIT) + k[:, None]", "(pitch * UNIT) + k[:, None] - 1", MIX_B),
    Fault("mix", "_dgrad", "dx += tl.load(source", "_ = tl.load(source", "test_backward_adds"),
    Fault("mix", "_dgrad", "tl.trans(dz.to(element)), da", "tl.trans(dz.to(element)), 0 * da", MIX_B),
    Fault("mix", "_dgrad", "dbeta += tl.sum", "dbeta = tl.sum", MIX_B),
    Fault("mix", "_dgrad", "dgamma += tl.sum", "dgamma = tl.sum", MIX_B),
    Fault("mix", "_dgrad", "tl.where(ok, activate.relu_gradient(da, centred * s + t), 0.0)", "da", MIX_B),
    Fault("mix", "_wgrad", "acc = tl.dot(", "acc += tl.dot(", MIX_B),
    Fault("mix", "_wgrad", "a.to(element), acc", "a.to(element), 0 * acc", MIX_B),
    Fault("mix", "_wgrad", "mask=(n < N)[:, None] & ", "mask=(n < N + 1)[:, None] & ", MIX_B),
    Fault("mix", "_wgrad", "K + k[None, :]", "K + k[None, :] + 1", MIX_B),
    Fault("mix", "_wgrad", "p_ok = p < P", "p_ok = p >= 0", MIX_B),
    Fault("mix", "_one_pass", "inside = (k < K)[:, None] & ", "inside = (k < K + 1)[:, None] & ", MIX_ONE),
    Fault("mix", "_one_pass", "p_ok = p < P", "p_ok = p >= 0", MIX_ONE),
    Fault("mix", "_one_pass", "(pitch * UNIT) + k[:, None]", "(pitch * UNIT) + k[:, None] - 1", MIX_ONE),
    Fault("mix", "_one_pass", "(g_pitch * UNIT) + k[:, None]", "(g_pitch * UNIT) + k[:, None] + 1", MIX_ONE),
    Fault("mix", "_one_pass", "K + k[:, None]", "K + k[:, None] + 1", MIX_ONE),
    Fault("mix", "_one_pass", "acc = tl.dot(a, dz, acc", "acc = tl.dot(a, dz, 0 * acc", MIX_ONE),
    Fault("mix", "_one_pass", "dbeta += tl.sum", "dbeta = tl.sum", MIX_ONE),
    Fault("mix", "_one_pass", "dgamma += tl.sum", "dgamma = tl.sum", MIX_ONE),
    Fault("mix", "_one_pass", "dx += tl.load(source", "_ = tl.load(source", "test_backward_adds"),
    Fault("mix", "_output_gradient", "& (n < N)[None, :]", "& (n < N + 1)[None, :]", MIX_B),
    Fault("mix", "_output_gradient", "d_pitch + n[None, :]", "d_pitch + n[None, :] + 1", MIX_B),
    Fault("mix", "_output_gradient", "tl.where(p_ok[:, None], value + ", "tl.where(True, value + ", MIX_B),
    Fault("mix", "forward", "weight[:, columns[i + 1] :]", "weight[:, columns[i] :]", MIX_F),
    # conv3x3
    Fault("conv3x3", "_inside", "tl.where(p < P, bits, 0)", "bits", CONV_F),
    Fault("conv3x3", "_inside", "w < W - 1", "w < W", CONV_F),
    Fault("conv3x3", "_activation", "(k < K)[None, :]", "(k < K + 1)[None, :]", CONV_F),
    Fault("conv3x3", "_activation", "rows + k[None, :]", "rows + k[None, :] + 1", CONV_F),
    Fault("conv3x3", "_activation", "tl.where(ok[:, None], activate.relu(", "tl.where(True, activate.relu(", CONV_F),
    Fault("conv3x3", "_forward", "& (n < n_end)[None, :]\n    if", "& (n < n_end + 1)[None, :]\n    if", CONV_F),
    Fault("conv3x3", "_forward", "ok = (p < P)[:, None]", "ok = (p < P + 1)[:, None]", CONV_F),
    Fault("conv3x3", "_forward", "out_pitch + n[None, :], y", "out_pitch + n[None, :] + 1, y", CONV_F),
    Fault("conv3x3", "_forward", "a.to(w.dtype), w, acc", "a.to(w.dtype), w, 0 * acc", CONV_F),
    Fault("conv3x3", "_forward", "tap % 3 - 1", "tap % 3", CONV_F),
    Fault("conv3x3", "_slice_gradient", "(n < N)[None, :]", "(n < N + 1)[None, :]", CONV_B),
    Fault("conv3x3", "_slice_gradient", "features + n[None, :]", "features + n[None, :] + 1", CONV_B),
    Fault("conv3x3", "_slice_gradient", "tl.where(ok[:, None], d, 0.0)", "d", CONV_B),
    Fault("conv3x3", "_slice_gradient", "d = d - tl.where(", "d = d + tl.where(", CONV_B),
    Fault("conv3x3", "_dgrad", "(k < k_end)[:, None] & inside[None", "(k < k_end)[:, None] & (p >= 0)[None", CONV_B),
    Fault("conv3x3", "_dgrad", "out_pitch + k[:, None]", "out_pitch + k[:, None] + 1", CONV_B),
    Fault("conv3x3", "_dgrad", "tap = 8 - bit", "tap = bit", CONV_B),
    Fault("conv3x3", "_dgrad", "tl.trans(dy.to(v.dtype)), dh", "tl.trans(dy.to(v.dtype)), 0 * dh", CONV_B),
    Fault("conv3x3", "_dgrad", "activate.relu_gradient(dh, centred * s + t)", "dh", CONV_B),
    Fault("conv3x3", "_dgrad", "tl.sum(dn * centred, 1)", "tl.sum(dn, 1)", CONV_B),
    Fault("conv3x3", "_wgrad", "dy.to(element), acc", "dy.to(element), 0 * acc", "test_backward and float32 and 14x14"),
    Fault("conv3x3", "_wgrad", "mask=(k < k_end)[:, None] & ", "mask=(k < k_end + 1)[:, None] & ", CONV_B),
    Fault("conv3x3", "_wgrad", "* N + (n - n_first)[None, :]", "* N + (n - n_first)[None, :] + 1", CONV_B),
    Fault("conv3x3", "_wgrad", "(q + at) * z_pitch", "q * z_pitch", CONV_B),
    Fault("conv3x3", "_drop", "pixel.to(tl.int64)[:, None] * 4096", "pixel[:, None] * 4096", "dropout_mask"),
    # statistics
    Fault("statistics", "store_tile_statistics", "tl.where(ok, x - ", "tl.where(True, x - ", "copy_split"),
    Fault("statistics", "store_tile_statistics", " - count * rest * rest", "", "large_mean"),
    Fault("statistics", "store_tile_statistics", " + rest", "", "large_mean or outlier"),
    Fault("statistics", "store_tile_statistics", "rest, mask=n < end)\n    tl.store(to + ",
          "rest, mask=n < end + 1)\n    tl.store(to + ", "copy_split"),
    Fault("statistics", "_merge", "total += ", "total = ", "many_tiles"),
    Fault("statistics", "_merge", "m2 += ", "m2 = ", "many_tiles"),
    Fault("statistics", "_merge", "d * d * count.to(tl.float64)[:, None]", "0 * d", "many_tiles"),
    Fault("statistics", "_merge", "at + tl.cast(tiles, tl.int64) * N", "at + tl.cast(tiles, tl.int64) * N - 1", "many"),
    Fault("statistics", "_merge", "tl.cast(out_pitch, tl.int64) + n", "tl.cast(out_pitch, tl.int64) + n + 1", "many"),
    Fault("statistics", "_copy_split", "(p < P)[:, None]", "(p < P + 1)[:, None]", "copy_split"),
    Fault("statistics", "_copy_split", "(n < N)[None, :]", "(n < N + 1)[None, :]", "copy_split"),
    Fault("statistics", "_copy_split", "(x_pitch * UNIT) + n[None, :]", "(x_pitch * UNIT) + n[None, :] + 1", "one_of"),
    Fault("statistics", "_copy_split", "(out_pitch * UNIT) + n", "(out_pitch * UNIT) + 1 + n", "copy_split"),
    Fault("statistics", "_total", "sums += tl.sum(", "sums = tl.sum(", "total"),
    Fault("statistics", "_total", "(t < parts)[:, None]", "(t < parts + 1)[:, None]", "total"),
    Fault("statistics", "_total", "* out_pitch + n", "* out_pitch + n + 1", "total"),
    # norm
    Fault("norm", "_owed_kernel", "inside = c < n", "inside = c <= n", DENSE, "stage"),
    Fault("norm", "_owed_kernel", "owed + owed_pitch + c", "owed + c", DENSE, "stage"),
    Fault("norm", "_owed_kernel", "slope * lost(m.to(tl.float64), low)", "0.0", "keeps"),
    Fault("norm", "_owed_kernel", "(offset * SIGN)", "offset", "keeps"),
    Fault("norm", "_pay_kernel", "(p < P) & (n < N)", "(p < P) & (n < N + 1)", DENSE, "stage"),
    Fault("norm", "_pay_kernel", "(p < P) & (n < N)", "(p < P + 1) & (n < N)", DENSE, "stage"),
    Fault("norm", "_pay_kernel", "(x_pitch * UNIT) + n", "(x_pitch * UNIT) + n + 1", DENSE, "stage"),
    Fault("norm", "_pay_kernel", "(g - taken)", "g", DENSE, "stage"),
    # activate
    Fault("activate", "_forward", "(p < P)[:, None] & ", "(p < P + 1)[:, None] & ", ACT_F),
    Fault("activate", "_forward", "& (n < N)[None, :]", "& (n < N + 1)[None, :]", ACT_F),
    Fault("activate", "_forward", "(z_pitch * UNIT) + n[None, :]", "(z_pitch * UNIT) + n[None, :] + 1", ACT_F),
    Fault("activate", "_forward", "(out_pitch * UNIT) + n[None, :]", "(out_pitch * UNIT) + n[None, :] + 1", ACT_F),
    Fault("activate", "_forward", "y += value", "y = value", ACT_F),
    Fault("activate", "_backward", "ok = (p < P)[:, None] & ", "ok = (p < P + 1)[:, None] & ", ACT_B),
    Fault("activate", "_backward", "row_ok[:, None] & (n < N)", "row_ok[:, None] & (n < N + 1)", ACT_B),
    Fault("activate", "_backward", "& (y < h) & (x < w)", "& (y < h)", ACT_B),
    Fault("activate", "_backward", "(d_pitch * UNIT) + n[None, :]", "(d_pitch * UNIT) + n[None, :] + 1", ACT_B),
    Fault("activate", "_backward", "(dn_pitch * UNIT) + n[None, :]", "(dn_pitch * UNIT) + n[None, :] + 1", ACT_B),
    Fault("activate", "_backward", "dbeta += ", "dbeta = ", "test_backward and many"),
    Fault("activate", "_backward", "dgamma += ", "dgamma = ", "test_backward and many"),
    # NaN, infinity, unknown activations
    Fault("activate", "relu", ", propagate_nan=tl.PropagateNan.ALL", "", "test_activations and relu", "nan"),
    Fault("activate", "relu_gradient", "tl.where(x <= 0.0, 0.0, d)", "tl.where(x > 0.0, d, 0.0)", NAN_ACT, "nan"),
    Fault("activate", "relu_gradient", "tl.where(x <= 0.0, 0.0, d)", "d * tl.where(x <= 0, 0.0, 1.0)", NAN_ACT, "nan"),
    Fault("activate", "gradient", "x <= -3.0, 0.0", "x <= -3.0, d * 0.0", NAN_ACT, "nan"),
    Fault("activate", "gradient", "x >= 3.0", "x > 3.0", NAN_ACT, "nan"),
    Fault("activate", "value", "ACT <= 8", "ACT <= 9", "unknown", "nan"),
    Fault("activate", "gradient", "ACT <= 8", "ACT <= 9", "unknown", "nan"),
    Fault("mix", "_read", "activate.relu(", "tl.maximum(0.0, ", NAN_PRE, "nan"),
    Fault("mix", "_dgrad", "activate.relu_gradient(da, centred * s + t)", "tl.where(centred * s + t > 0, da, 0.0)",
          NAN_PRE, "nan"),
    Fault("mix", "_one_pass", "activate.relu_gradient(dx, pre)", "tl.where(pre > 0, dx, 0.0)", NAN_16, "nan"),
    Fault("mix", "_one_pass", "activate.relu(pre)", "tl.maximum(pre, 0.0)", NAN_16, "nan"),
    Fault("conv3x3", "_activation", "activate.relu(", "tl.maximum(0.0, ", NAN_PRE, "nan"),
    Fault("conv3x3", "_dgrad", "activate.relu_gradient(dh, centred * s + t)", "tl.where(centred * s + t > 0, dh, 0.0)",
          NAN_PRE, "nan"),
    Fault("conv3x3", "_slice_gradient", "tl.where((s == 0.0)[None, :], t[None, :], owed)", "owed", NAN_PRE, "nan"),
    Fault("norm", "lost", "tl.where(mean == wide, 0.0, mean - wide)", "mean - wide", "running and mish", "nan"),
    Fault("norm", "_owed_kernel", "slope == 0.0, 0.0", "False, 0.0", "training and dense", "nan"),
    Fault("norm", "_pay_kernel", "tl.where(s == 0.0, t, (f - m) * s + t)", "(f - m) * s + t", NAN_PRE, "nan"),
    Fault("statistics", "_merge", "tl.where(m2 <= 0.0, 0.0, m2 / P)", "tl.maximum(m2 / P, 0.0)", "not_finite"),
    Fault("statistics", "store_tile_statistics", 'float("inf"), units *', 'float("nan"), units *', "squares"),
    Fault("statistics", "store_tile_statistics", 'float("nan"), units)', 'float("inf"), units)', "deviations"),
    # the 3x3 in CUDA C++
    Fault("cuda", "", 'running() == "triton" or not _runs_on(z', "not _runs_on(z", "triton_alone and recompute"),
    Fault("cuda", "", "else gradient.clone(", "else torch.zeros_like(gradient).clone(", "any_offset"),
    Fault("cuda", "", "out, statistics, _images", "out, None, _images", "reference and growth and 48"),
    Fault("cuda", "", "gradient, _vectors(correction)", "gradient, [v * 0 for v in _vectors(correction)]",
          "reference and growth and 48"),
    # the numbers of a stage's norms
    Fault("stage_norms", "_fill", "inside = i < n", "inside = i <= n", DENSE, "stage"),
    Fault("stage_norms", "_fill", "running + (-1 - source)", "running + (-2 - source)", FROZEN, "stage"),
    Fault("stage_norms", "_fill", " - missing * s", "", "large_means_are", "stage"),
    Fault("stage_norms", "_settle", "i < at + tl.load", "i <= at + tl.load", DENSE, "stage"),
    Fault("stage_norms", "_settle", " - missing * bias", "", LARGE, "stage"),
    Fault("stage_norms", "", "self.stats[0, at]", "self.stats[1, at]", DENSE, "stage"),
    Fault("stage_norms", "", "self.owed[:, table.first :", "self.owed[:, table.first + 1 :", DENSE, "stage"),
    Fault("stage_norms", "", "self.gradients[0, at], self.gradients[1, at]", "self.gradients[0, at], "
          "self.gradients[0, at]", DENSE, "stage"),
    # what is known of a program
    Fault("stage_plan", "", "used[0], used[-1] + 1)", "used[0], used[-1])", SLICES, "stage"),
    Fault("stage_plan", "", "yield left or (", "yield (", TWO, "stage"),
    Fault("stage_plan", "", "alone and tables", "tables", SLICES, "stage"),
    Fault("stage_plan", "_joined", "place = replace(first.segment.place, stop=last.segment.place.stop)",
          "place = first.segment.place", "test_in_float64 and siblings", "stage"),
    # values and gradients
    Fault("stage_memory", "", "view[:, begin - start :]", "view[:, : stop - begin]", SLICES, "stage"),
    Fault("stage_memory", "", "view[:, place.start - start : place.stop - start]",
          "view[:, : place.stop - place.start]", SLICES, "stage"),
    Fault("stage_memory", "", 'if segment.gradient == "add" else None', "if segment.gradient else None", SLICES,
          "stage"),
    # instructions
    Fault("stage_forward", "", "part.start - step.source.start, part)", "0, part)", SLICES, "stage"),
    Fault("stage_forward", "", "self.stacked(step), out,", "self.weight(step.nodes[0]).flatten(1), out,",
          JOINS, "stage"),
    Fault("stage_forward", "", "            at += width(segment.place)\n        return z", "        return z",
          JOINS, "stage"),
    Fault("stage_backward", "BackwardPass", "written, strict=True):\n            d = ",
          "written, strict=True):\n            at = step.output.start\n            d = ", SLICES, "stage"),
    Fault("stage_backward", "BackwardPass", "self.memory.own_gradient(instruction.place).zero_()", "pass", SLICES,
          "stage"),
    Fault("stage_backward", "BackwardPass", "step.owed, width(step.of), added=True", "step.owed, width(step.of)",
          DENSE, "stage"),
    Fault("stage_backward", "BackwardPass", "segment.column : segment.column", "segment.column + 1 : segment.column",
          DENSE, "stage"),
    Fault("stage_backward", "BackwardPass", "source is not None, source, self.sums(segment)",
          "False, None, self.sums(segment)", DENSE, "stage"),
    Fault("stage_backward", "BackwardPass", "part if len(sizes) == 1 else", "part if True else", JOINS, "stage"),
    Fault("stage_backward", "BackwardPass", "self.norms.due(step.owed + owing.start", "self.norms.due(step.owed",
          SLICES, "stage"),
    Fault("stage_backward", "BackwardPass", "slice(owing.stop, None)", "slice(owing.stop, owing.stop)", SLICES,
          "stage"),
    Fault("stage_backward", "_written_as_it_is", " and not _read_twice(found[0], segments)", "", SLICES, "stage"),
    # sums of terms
    Fault("elementwise", "plus", "tl.load(mean + n", "tl.load(mean + n - 1", ""),
    Fault("elementwise", "_sum", "total = tl.load(before", "_ = tl.load(before", ""),
    Fault("elementwise", "_forward", "tl.minimum(P - tile * BP, BP)", "BP", ""),
    Fault("elementwise", "_backward", "value - tl.where(", "value + tl.where(", ""),
    Fault("elementwise", "_backward", "tl.where(s == 0.0, t, owed)", "owed", "owes_nothing"),
    Fault("elementwise", "_backward", "activate.gradient(value, total, ACT, NEGATIVE)", "value", ""),
    Fault("elementwise", "_all_but_two", "_add(before, terms[:2]", "_add(None, terms[:2]", ""),
    # strides, groups, what follows a product, maxima
    Fault("conv3x3", "_centre", "* STRIDE) * W", "* STRIDE) * H", OTHERS),
    Fault("conv3x3", "_inside", "p // columns % rows * STRIDE", "p // columns % rows", OTHERS),
    Fault("conv3x3", "_part", "tl.program_id(1) * channels", "tl.program_id(1) * (channels - 1)", OTHERS),
    Fault("conv3x3", "_forward", "tap * K * PARTS + k", "tap * K + k", OTHERS),
    Fault("conv3x3", "_forward", "n, n_end, N * PARTS, 0", "n, N * PARTS, N * PARTS, 0", "their_own"),
    Fault("conv3x3", "_forward", "(k < k_end)[:, None] & (n < n_end)", "(k < k_end)[:, None] & (n >= 0)", OTHERS),
    Fault("conv3x3", "_forward", "acc = elementwise.plus(", "_ = elementwise.plus(", "test_after and float32"),
    Fault("conv3x3", "_forward", "activate.value((acc - m) * s + t, ACT, NEGATIVE)", "(acc - m) * s + t",
          "test_after and float32"),
    Fault("conv3x3", "_dgrad", "(y * 2 + odd_y < H)", "(y < H)", OTHERS),
    Fault("conv3x3", "_dgrad", "(beside * below)", "0", OTHERS),
    Fault("conv3x3", "_dgrad", "x < w - 1", "x < w", OTHERS),
    Fault("conv3x3", "_dgrad", "1 + odd_x - 2 * right", "1 - odd_x + 2 * right", OTHERS),
    Fault("conv3x3", "_dgrad", "at = down * w + right", "at = down * W + right", OTHERS),
    Fault("conv3x3", "_dgrad", "dz += tl.load(source + at", "_ = tl.load(source + at", "stride_adds"),
    Fault("conv3x3", "_wgrad", "9 + tap) * K * PARTS", "9 + tap) * K", OTHERS),
    Fault("conv3x3", "_wgrad", "_inside(p, P, H, W, STRIDE)", "_inside(p, P, H, W, 1)", OTHERS),
    Fault("conv3x3", "", "permute(2, 5, 4, 3, 0, 1)", "permute(2, 5, 4, 3, 1, 0)", OTHERS),
    Fault("mix", "_source", "(H + STRIDE - 1) // 2", "H // 2", "test_stride and float32"),
    Fault("mix", "_beside_stride", "s.g.zero_()", "pass", "test_stride and float32"),
    Fault("mix", "_beside_stride", "s.g.copy_(source)", "pass", "test_stride and float32"),
    Fault("mix", "_forward", "tl.trans(acc), residual", "0 * tl.trans(acc), residual", "test_residual and float32"),
    Fault("maximum", "_largest", "(value != value) | ", "", "not_finite"),
    Fault("maximum", "_largest", " | (position < 0)", "", "not_finite"),
    Fault("maximum", "_largest", "value > largest", "value >= largest", "equal"),
    Fault("maximum", "_largest", " & (w < W)", "", "random"),
    Fault("maximum", "_largest", "ok = (p < P)[:, None] & (n < N)", "ok = (p < P)[:, None] & (n < N + 1)", "random"),
    Fault("maximum", "_backward", "here == tap[:, None]", "here >= 0", "random"),
    Fault("maximum", "_backward", "after - after + STRIDE - 1", "after - after", "random"),
    Fault("maximum", "_backward", " & (x * STRIDE <= w + before)", "", "equal"),
    Fault("maximum", "_backward", "(p < P)[:, None] & (n < N)", "(p < P)[:, None] & (n < N + 1)", "random"),
    Fault("stage_plan", "_values", "(*step.segments, *step.residual)", "step.segments",
          "test_inference and strides", "stage"),
    Fault("stage_backward", "BackwardPass", "correction, to)\n            d = to", "correction, to)",
          "test_in_float64 and maxima", "stage"),
    Fault("stage_forward", "", "activation(step), next(iter(self.terms(step.residual)), None)", "activation(step)",
          "test_inference and strides", "stage"),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginning of MODULE.PLACE")
    parser.add_argument("--root", type=Path, help="where to copy to, kept; otherwise a temporary directory")
    parser.add_argument("--budget", type=float, default=0, help="seconds; as many faults as fit, drawn anew every day")
    given = parser.parse_args()
    sys.dont_write_bytecode = True  # sources change within a second
    faults = [f for f in FAULTS if f"{f.module}.{f.place}".startswith(given.only)]
    for fault in FAULTS:  # all strings before any test
        fault.applied((ROOT / "csp_kernels" / "kernels" / f"{fault.module}.py").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        root = given.root or Path(temporary)
        for name in ("csp_kernels", "csrc", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", root)
        passed: set[tuple[str, str]] = set()
        survivors = 0
        for fault in within(given.budget, faults):
            test, select = fault.test or fault.module, fault.select
            if (test, select) not in passed and (failure := run(root, test, select)):
                raise SystemExit(f"without a fault: test_{test}.py -k {select!r}: {failure}")
            passed.add((test, select))
            survivors += not attempt(root, fault)
    print(f"{survivors} faults survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
