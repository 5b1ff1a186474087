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
BLOCK = "test_against_the_reference and (training or layers)"
ACT_F, ACT_B = "test_forward and (ragged or pool)", "test_backward and (ragged or pool)"
CONCAT = "test_against_the_compiled_operator and float64 and (two or three)"
TRANSITION = "test_against_the_reference and float32"
POST = "test_against_the_compiled_operator and (float64 or frozen)"
STAGE = "test_against_the_compiled_operator and (recompute or some)"

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
    Fault("mix", "_dgrad", "tl.where(ok & (centred * s + t > 0), da, 0.0)", "da", MIX_B),
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
    Fault("conv3x3", "_activation", "tl.where(ok[:, None], tl.maximum(", "tl.where(True, tl.maximum(", CONV_F),
    Fault("conv3x3", "_forward", "(p < P)[:, None] & (n < N)[None", "(p < P)[:, None] & (n < N + 1)[None", CONV_F),
    Fault("conv3x3", "_forward", "ok = (p < P)[:, None]", "ok = (p < P + 1)[:, None]", CONV_F),
    Fault("conv3x3", "_forward", "out_pitch + n[None, :], y", "out_pitch + n[None, :] + 1, y", CONV_F),
    Fault("conv3x3", "_forward", "a.to(w.dtype), w, acc", "a.to(w.dtype), w, 0 * acc", CONV_F),
    Fault("conv3x3", "_forward", "tap % 3 - 1", "tap % 3", CONV_F),
    Fault("conv3x3", "_slice_gradient", "(n < N)[None, :]", "(n < N + 1)[None, :]", CONV_B),
    Fault("conv3x3", "_slice_gradient", "features + n[None, :]", "features + n[None, :] + 1", CONV_B),
    Fault("conv3x3", "_slice_gradient", "tl.where(ok[:, None], d, 0.0)", "d", CONV_B),
    Fault("conv3x3", "_slice_gradient", "d = d - ((f", "d = d + ((f", CONV_B),
    Fault("conv3x3", "_dgrad", "(k < K)[:, None] & (p < P)[None", "(k < K)[:, None] & (p < P + 1)[None", CONV_B),
    Fault("conv3x3", "_dgrad", "out_pitch + k[:, None]", "out_pitch + k[:, None] + 1", CONV_B),
    Fault("conv3x3", "_dgrad", "(8 - tap) * K", "tap * K", CONV_B),
    Fault("conv3x3", "_dgrad", "tl.trans(dy.to(w.dtype)), dh", "tl.trans(dy.to(w.dtype)), 0 * dh", CONV_B),
    Fault("conv3x3", "_dgrad", "ok & (centred * s + t > 0)", "ok", CONV_B),
    Fault("conv3x3", "_dgrad", "tl.sum(dn * centred, 1)", "tl.sum(dn, 1)", CONV_B),
    Fault("conv3x3", "_wgrad", "dy.to(element), acc", "dy.to(element), 0 * acc", "test_backward and float32 and 14x14"),
    Fault("conv3x3", "_wgrad", "mask=(k < K)[:, None] & ", "mask=(k < K + 1)[:, None] & ", CONV_B),
    Fault("conv3x3", "_wgrad", "* N + n[None, :]", "* N + n[None, :] + 1", CONV_B),
    Fault("conv3x3", "_wgrad", "(q + at) * z_pitch", "q * z_pitch", CONV_B),
    Fault("conv3x3", "_drop", "pixel.to(tl.int64)[:, None] * 4096", "pixel[:, None] * 4096", "dropout_mask"),
    # statistics
    Fault("statistics", "store_tile_statistics", "tl.where(ok, x - ", "tl.where(True, x - ", "copy_split"),
    Fault("statistics", "store_tile_statistics", " - count * rest * rest", "", "large_mean"),
    Fault("statistics", "store_tile_statistics", " + rest.to(tl.float64)", "", "large_mean or outlier"),
    Fault("statistics", "store_tile_statistics", "tl.float64), mask=n < N)\n    tl.store(to + ",
          "tl.float64), mask=n < N + 1)\n    tl.store(to + ", "copy_split"),
    Fault("statistics", "_merge", "total += ", "total = ", "many_tiles"),
    Fault("statistics", "_merge", "m2 += ", "m2 = ", "many_tiles"),
    Fault("statistics", "_merge", "d * d * count.to(tl.float64)[:, None]", "0 * d", "many_tiles"),
    Fault("statistics", "_merge", "at + tl.cast(tiles, tl.int64) * N", "at + tl.cast(tiles, tl.int64) * N - 1", "many"),
    Fault("statistics", "_merge", "tl.cast(out_pitch, tl.int64) + n", "tl.cast(out_pitch, tl.int64) + n + 1", "many"),
    Fault("statistics", "_copy_split", "(p < P)[:, None]", "(p < P + 1)[:, None]", "copy_split"),
    Fault("statistics", "_copy_split", "(n < N)[None, :]", "(n < N + 1)[None, :]", "copy_split"),
    Fault("statistics", "_copy_split", "(x_pitch * UNIT) + n[None, :]", "(x_pitch * UNIT) + n[None, :] + 1", "one_of"),
    Fault("statistics", "_copy_split", "(out_pitch * UNIT) + n", "(out_pitch * UNIT) + 1 + n", "copy_split"),
    Fault("statistics", "_total", "sums += ", "sums = ", "total"),
    Fault("statistics", "_total", "(t < parts)[:, None]", "(t < parts + 1)[:, None]", "total"),
    Fault("statistics", "_total", "* out_pitch + n", "* out_pitch + n + 1", "total"),
    # norm
    Fault("norm", "_affine_kernel", "inside = c < n", "inside = c <= n", BLOCK, "dense_block"),
    Fault("norm", "_affine_kernel", "out + pitch + c", "out + pitch + c + 1", BLOCK, "dense_block"),
    Fault("norm", "_affine_kernel", " - (m - low.to(tl.float64)) * s", "", "large and mean", "dense_block"),
    Fault("norm", "_settle_kernel", "inside = c < n", "inside = c <= n", BLOCK, "dense_block"),
    Fault("norm", "_settle_kernel", "sums + sums_pitch + c", "sums + sums_pitch + c - 1", BLOCK, "dense_block"),
    Fault("norm", "_settle_kernel", "tl.load(owed + c, inside, 0.0) + s", "s", BLOCK, "dense_block"),
    Fault("norm", "_settle_kernel", "tl.load(at, inside, 0.0) + s", "s", BLOCK, "dense_block"),
    Fault("norm", "_settle_kernel", "(-s * bias - slope * lost)", "(-slope * lost)", BLOCK, "dense_block"),
    Fault("norm", "_settle_kernel", " - lost * bias", "", "large and mean", "dense_block"),
    Fault("norm", "_settle_kernel", " - slope * lost", "", "correction_keeps", "norm"),
    Fault("norm", "_owed_kernel", "inside = c < n", "inside = c <= n", BLOCK, "dense_block"),
    Fault("norm", "_owed_kernel", "owed + owed_pitch + c", "owed + c", BLOCK, "dense_block"),
    Fault("norm", "_owed_kernel", " - slope * (m - low.to(tl.float64))", "", "large and mean", "dense_block"),
    Fault("norm", "_pay_kernel", "(p < P) & (n < N)", "(p < P) & (n < N + 1)", BLOCK, "dense_block"),
    Fault("norm", "_pay_kernel", "(p < P) & (n < N)", "(p < P + 1) & (n < N)", BLOCK, "dense_block"),
    Fault("norm", "_pay_kernel", "(x_pitch * UNIT) + n", "(x_pitch * UNIT) + n + 1", BLOCK, "dense_block"),
    Fault("norm", "_pay_kernel", "g - ((f - m) * s + t)", "g", BLOCK, "dense_block"),
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
    # what launchers pass on
    Fault("dense_block", "", "features[:, : layer.entering], norm", "features[:, 1 : layer.entering + 1], norm", BLOCK),
    Fault("dense_block", "", "slice(layer.entering, layer.entering + self.growth)",
          "slice(layer.entering - 1, layer.entering + self.growth - 1)", BLOCK),
    Fault("dense_block", "", "self.stats[:, entering : entering + self.growth]",
          "self.stats[:, entering - 1 : entering + self.growth - 1]", BLOCK),
    Fault("dense_block", "", "settle(sums, self.pixels, owed[:, old])", "settle(sums, self.pixels)", BLOCK),
    Fault("dense_block", "", "grad[:, old], True, source[:, old])", "grad[:, old], False)", BLOCK),
    Fault("dense_block", "", "            source = grad\n", "", BLOCK),
    Fault("dense_block", "", "self.stats[0, channels]", "self.stats[1, channels]", BLOCK),
    Fault("dense_block", "", "self.due(owed, old), dx)", "self.due(0 * owed, old), dx)", BLOCK),
    Fault("cuda", "", 'running() == "triton" or not _runs_on(z', "not _runs_on(z",
          "triton_alone and recompute"),
    Fault("cuda", "", "else gradient.clone(", "else torch.zeros_like(gradient).clone(", "offset"),
    Fault("cuda", "", "out, statistics, _images", "out, None, _images", "reference and growth and 48"),
    Fault("cuda", "", "_vectors(correction), weight, z, _vectors(norm)\n    dweight", "_vectors(norm), weight, z, "
          "_vectors(norm)\n    dweight", "reference and growth and 48"),
    Fault("concat_conv", "", "activate.forward(z[:, at]", "activate.forward(z[:, : at.stop - at.start]", CONCAT),
    Fault("concat_conv", "", "norm.shift[at])", "norm.shift[: at.stop - at.start])", CONCAT),
    Fault("concat_conv", "", "else dn[:, at]", "else dn[:, : at.stop - at.start]", CONCAT),
    Fault("concat_conv", "", "None if correction is None else z, correction)", "None, None)", CONCAT),
    Fault("concat_conv", "", "act, slope, offset)", "act, None, None)", CONCAT),
    Fault("concat_conv", "", "call.weight[at]", "call.weight[: at.stop - at.start]", "inference"),
    Fault("partial_transition", "", "into.owed.add_(owed)", "into.owed.copy_(owed)", "owed"),
    Fault("partial_transition", "", "            _repay(u.norm", "            (u.norm", TRANSITION),
    Fault("partial_transition", "", "            _repay(norm", "            (norm", TRANSITION),
    Fault("partial_transition", "", "in (slice(self.bypass), slice(self.bypass, None))", "in [slice(0, None)] * 2",
          TRANSITION),
    Fault("partial_transition", "", "product.of_norm, dweight], sums[:, self.bypass :]",
          "product.of_norm, dweight], sums[:, : sums.shape[1] - self.bypass]", TRANSITION),
    Fault("partial_transition", "", "d = dy[:, self.bypass :]", "d = dy[:, : dy.shape[1] - self.bypass]", TRANSITION),
    Fault("partial_transition", "", "t.weight, y[:, self.bypass :]", "t.weight, y[:, : -self.bypass]", TRANSITION),
    Fault("partial_transition", "", "dy[:, : self.bypass], None", "dy[:, -self.bypass :], None", TRANSITION),
    Fault("partial_transition", "", "Correction(c.mean, -c.slope, -c.offset)", "None", TRANSITION),
    Fault("partial_transition", "", "sums[:, -self.grown.x.shape[1] :]", "sums[:, : self.grown.x.shape[1]]", "grown"),
    Fault("post_dense_block", "", "layer.columns[0].start] += ", "layer.columns[0].start] = ", POST),
    Fault("post_dense_block", "", "mix.Segment(x, None, dx, True)", "mix.Segment(x, None, dx, False)", POST),
    Fault("post_dense_block", "", "grad[:, :k], True)", "grad[:, :k], False)", POST),
    Fault("post_dense_block", "", "slice(at + j * g, at + (j + 1) * g)", "slice(at, at + g)", POST),
    Fault("post_dense_block", "", "reduce[1].norm, dz[:, b:]", "reduce[1].norm, dz[:, :b]", POST),
    Fault("post_dense_block", "", "z[:, layer.width :]", "z[:, : layer.width]", POST),
    Fault("post_dense_block", "", "below[:, self.channels :]", "below[:, : -self.channels]", POST),
    Fault("post_dense_block", "", "statistics.copy_split(d[:, : block.channels], into, None)", "into.zero_()", POST),
    Fault("post_dense_block", "", "to.copy_(values)", "pass", POST),
    Fault("csp_stage", "", "else None, x[:, part:]", "else None, x[:, : x.shape[1] - part]", STAGE),
    Fault("csp_stage", "", "self.stats[:, self.columns :]", "self.stats[:, : -self.columns]", STAGE),
    Fault("csp_stage", "", "dpart, grad, None, owed)", "dpart, grad, None, owed.clone())", STAGE),
    Fault("csp_stage", "", "params[-last:], running[fixed:]", "params[-last:], running", "reference and frozen"),
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
