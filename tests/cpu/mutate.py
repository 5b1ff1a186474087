"""Plants one fault at a time in a copy of csrc/cpu, compiles it and runs the tests that should find it.

python tests/cpu/mutate.py [--only norm.h] [--sample 5 --seed 0] [--budget 300] [--list]

A fault is compiled into stage.cpp alone, with -O1 for the best instruction set here; the copy is built once (minutes).
Exit status 1 if a fault survives.
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from csp_kernels import native

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """In csrc/cpu/[tile/]<file> `old`, which is there once, becomes `new`. tests: arguments of pytest."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def path(self, root: Path) -> Path:
        return root / "csrc" / "cpu" / ("tile" if self.file.endswith(".h") else "") / self.file

    def applied(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file}: {self.old!r} is there {text.count(self.old)} times, expected once")
        return text.replace(self.old, self.new)

    def isa(self) -> str:
        """The instruction set whose unit gets the fault; the tests run with it."""
        others = [name for name in native.isas() if name != "v4amx"]
        return "v4amx" if self.file in TILES else others[0]

    def __str__(self) -> str:
        old, new = (" ".join(t.split()) for t in (self.old, self.new))
        return f"{self.file:16}  {old} -> {new or '(nothing)'}"


def test(name: str, select: str) -> tuple[str, ...]:
    return f"tests/ops/test_{name}.py", "-k", select


UNIT = "stage"
TILES = ("direct3x3.h", "tiles.h")  # files of instruction set v4amx alone
DENSE, TRANSITION, CONCAT = "dense_block", "partial_transition", "concat_conv"
GRAPHS = ("tests/stage/test_operator.py", "-k", "test_random_graphs and not channels_last")
GRAPHS_16 = ("tests/ops/test_csp_stage.py", "-k", "training and bfloat16")
EXACT_32 = ("tests/stage/test_exact.py", "-k", "float32")
EXACT = ("tests/stage/test_exact.py", "-k", "bfloat16")
GROUPS = ("tests/stage/test_exact.py", "-k", "groups and float32")
FOLDED = ("tests/stage/test_exact.py", "-k", "folded")
STATISTICS = ("tests/stage/test_exact.py", "-k", "statistics")
MANY_CHANNELS = ("tests/stage/test_operator.py", "-k", "stride_2_of_many_channels")
LARGE = ("tests/stage/test_operator.py", "-k", "maps_larger_than_a_cache")
WIDE_ROWS = ("tests/stage/test_operator.py", "-k", "stride_2_on_wide_images")
HIGH = test(DENSE, "lower_matmul_precision")
BLOCK = test(DENSE, "test_training and float32 and (basic or odd) or without_kinks and float32 and train")
DROPOUT = test(DENSE, "dropout")
INFERENCE = test(DENSE, "test_inference and float32")
MERGED = test(DENSE, "test_training and float and 32x32")  # several tasks
LARGE_MEAN = ("tests/ops/test_large_means.py",)
POSTS = ("tests/layers/test_post_dense_block.py", "tests/layers/test_two_way_dense_block.py", "-k", "three_steps")
JOINS = ("tests/layers/test_partial_transition.py", "-k", "three_steps")
CONCATS = ("tests/layers/test_concat_conv.py", "-k", "three_steps or train or eval")

FAULTS = [
    # norm.h
    Fault("norm.h", "return centre(c) - double(T(centre(c)));", "return 0;", LARGE_MEAN),
    Fault("norm.h", " - (m - double(T(m))) * s)", ")", (*LARGE_MEAN, "-k", "behind")),
    # statistics.h
    Fault("statistics.h", "if (i < rows) s0 += row(i) - pivot;", "", BLOCK),
    Fault("statistics.h", "(q0 + q1) + d * d * (n * k / (n + k))", "(q0 + q1)", BLOCK),
    Fault("statistics.h", "+ d * d * n * part", "", MERGED),
    Fault("statistics.h", "mean[c] += d * part", "mean[c] = d * part", MERGED),
    # direct3x3.h, tiles.h
    Fault("direct3x3.h", "row % (H + 1) == H;", "false;", EXACT),
    Fault("direct3x3.h", "memmove(static_cast<void*>(row(0)), row(count)", "memmove(static_cast<void*>(row(0)), row(count - 1)", EXACT),
    Fault("direct3x3.h", "(o * 9 + 8 - tap) * b + n", "(o * 9 + tap) * b + n", EXACT),
    Fault("direct3x3.h", "odd = tap % 3 == 1, shift", "odd = 0, shift", EXACT),
    Fault("direct3x3.h", "2 * (q + i) < real ?", "true ?", EXACT),
    Fault("direct3x3.h", "(blank ? 0 : tall.W)), row(r + 1));", "(blank ? 0 : tall.W) + 1), row(r + 1));", EXACT),
    Fault("direct3x3.h", "for (int t = 1; t < sets(); t++) sum", "for (int t = 1; t < 1; t++) sum", EXACT),
    Fault("direct3x3.h", "value(x + i) + lost[i];", "value(x + i);", test(DENSE, "without_kinks and bfloat16")),
    Fault("direct3x3.h", "if (stats && pixels) add_rows(stats[part], ch, seen,", "if (stats && pixels) add_rows(stats[part], ch, 0,", STATISTICS),
    Fault("direct3x3.h", "!correction.owes) return put", "true) return put", GRAPHS_16),
    Fault("tiles.h", "add_products<2, NV>(a + k, units, L * units,", "add_products<2, NV>(a + k, units, (L - 1) * units,", EXACT),
    Fault("tiles.h", "add_products<2, NV>(A, L, L * L, B, NV * L, L);", "add_products<2, NV>(A, L, L * L, B, NV * L, 0);", EXACT),
    Fault("tiles.h", "load_sums<1, NV>(dW, ldw);", "clear_sums<1, NV>();", EXACT),
    Fault("tiles.h", "COUNT = 3, A[] = {0, 0, 1}", "COUNT = 3, A[] = {0, 0, 0}", HIGH),
    Fault("direct3x3.h", "x = U::rest(x, rounded);", "x = Vec<float>{};", HIGH),
    # shared channels
    Fault("conv3x3.h", "first < min64(r.end * some, vectors); first", "first < min64(r.end * some, vectors - 1); first", EXACT_32),
    Fault("conv3x3.h", "dM + r.begin * tl.TW * L, Streamed", "dM, Streamed", EXACT_32),
    Fault("conv3x3.h", "finish((first + k) * L, dW2", "finish(first * L, dW2", EXACT_32),
    Fault("conv3x3.h", "dgrad_shares.panels_of(panels<T>(c.b), task)", "dgrad_shares.panels_of(panels<T>(c.b) - 1, task)", EXACT_32),
    Fault("conv3x3.h", "for (int t = 1; t < sets(); t++) sum", "for (int t = 1; t < 1; t++) sum", MERGED),
    Fault("conv3x3.h", "weights.pack_panel(room, p, {0,", "weights.pack_panel(room, 0, {0,", EXACT_32),
    Fault("mix.h", "parts[apart ? 0 : task].weight", "parts[task].weight", EXACT_32),
    Fault("mix.h", "Range r = apart ? Range{0, tiles} : share(tiles, task, mix.tasks);", "Range r = share(tiles, task, mix.tasks);", EXACT_32),
    Fault("mix.h", "own.begin * 2 * L, min64(Kp, own.end * 2 * L)", "own.begin * 2 * L, min64(Kp, own.end * L)", EXACT_32),
    Fault("direct3x3.h", "ldw + first + ch, ldw);", "ldw + ch, ldw);", EXACT),
    Fault("direct3x3.h", "const int64_t k = of.begin + at;", "const int64_t k = at;", EXACT),
    Fault("stage.cpp", "* 9 + kernel[size_t(q / each)]) * C + at : nullptr", "* 9 + kernel[0]) * C + at : nullptr", EXACT_32),
    Fault("stage.cpp", "(x = 0, ++y == rows)) y = 0, image++;", "(x = 0, ++y == rows)) y = 0;", EXACT_32),
    # shared panels, few rows
    Fault("scratch.h", "return share(n, task % panels, panels);", "return share(n, 0, panels);", EXACT_32),
    Fault("conv3x3.h", "std::integral_constant<int, FEW>{}), t += FEW;", "std::integral_constant<int, FEW>{}), t += MR;", BLOCK),
    Fault("conv3x3.h", "int64_t end = min64(r.end * batch, tl.rows);", "int64_t end = min64(r.end * batch, tl.rows - 1);", BLOCK),
    # groups side by side
    Fault("stage.cpp", "each_groups(i.conv, i.nodes[0], twice,", "each_groups(i.conv, i.nodes[0], false,", EXACT_32),
    Fault("stage.cpp", "first * in, end * in, first * out, end * out);", "first * in, end * in, first, end * out);", EXACT_32),
    Fault("stage.cpp", "out, in, number + size_t(part)}", "out, in, number}", GROUPS),
    # sums that begin with a product, and dW in place
    Fault("mix.h", "wgrad_panel<U>(A, ak, units, dW, ldw, t == r.begin, Kp - k <= L);", "wgrad_panel<U>(A, ak, units, dW, ldw, t == 0, Kp - k <= L);", EXACT_32),
    Fault("mix.h", "sets() == 1 && mix.K == mix.Kp && mix.O", "sets() == 1 && mix.O", EXACT_32),
    Fault("mix.h", "if (c0 >= c1) continue;\n      Unit<U>* to = A + (c0 - k0) / (L * D) * step;", "if (c0 >= c1) continue;\n      Unit<U>* to = A + c0 / (L * D) * step;", EXACT_32),
    Fault("pointwise.h", "Kp, t == r.begin, K - k <= L);", "Kp, t == 0, K - k <= L);", MERGED),
    Fault("pointwise.h", "for (int t = 1; t < tasks; t++) sum += load(parts[t].weight + at + c);", "", MERGED),
    # strided3x3.h
    Fault("strided3x3.h", "for (int k = 0; k < PIXEL; k++) to[k] = T(0);", "", WIDE_ROWS),
    Fault("strided3x3.h", "for (int k = 0; k < PIXEL; k++) to[(W + 1) * PIXEL + k] = T(0);", "", WIDE_ROWS),
    Fault("strided3x3.h", "y < 0 || y >= H ? zeros", "y < 0 ? zeros", WIDE_ROWS),
    Fault("strided3x3.h", "Silu<T>{}.value((value - mean) * scale + shift);", "Silu<T>{}.value((value - mean) * scale);", WIDE_ROWS),
    Fault("strided3x3.h", "load(w + ((n + i) * 9 + ky * 3 + kx) * C + first, channels) * (scale ? scale[n + i] : T(1))", "load(w + ((n + i) * 9 + ky * 3 + kx) * C + first, channels)", WIDE_ROWS),
    Fault("strided3x3.h", "if (v + 1 < vectors) outer<2>(A, b, input(v + 1), to, q == begin);", "if (v + 1 < vectors) outer<2>(A, b, input(v + 1), to, q == 0);", WIDE_ROWS),
    Fault("strided3x3.h", "else outer<1>(A, b, b, to, q == begin);", "else outer<1>(A, b, b, to, true);", WIDE_ROWS),
    Fault("strided3x3.h", "add_weights(parts, shares.rows, at, RUN, to);", "add_weights(parts, 1, at, RUN, to);", EXACT_32),
    Fault("strided3x3.h", "add_weights(parts, shares.rows, at + kx * PIXEL, channels, to + kx * C);", "add_weights(parts, 1, at + kx * PIXEL, channels, to + kx * C);", EXACT_32),
    Fault("strided3x3.h", "return odd ? 2 - 2 * k : 1;", "return odd ? 2 * k : 1;", WIDE_ROWS),
    Fault("strided3x3.h", "q % h + k == h ? zeros", "false ? zeros", WIDE_ROWS),
    Fault("strided3x3.h", "store(to + w * L, Vec<T>{});", "", WIDE_ROWS),
    Fault("strided3x3.h", "min64(2, H - q % h * 2)", "2", WIDE_ROWS),
    Fault("strided3x3.h", "const int64_t columns = (W + 1 - odd_x) / 2,", "const int64_t columns = (W + 1) / 2,", WIDE_ROWS),
    # strided_winograd.h
    Fault("strided_winograd.h", "o[2] = x[2] - x[4], o[3] = x[1]", "o[2] = x[4] - x[2], o[3] = x[1]", MANY_CHANNELS),
    Fault("strided_winograd.h", "x[2] = o[4], x[3] = o[1] - o[2]", "x[2] = o[4], x[3] = o[1] + o[2]", MANY_CHANNELS),
    Fault("strided_winograd.h", "w[2] = u[1] + u[2]", "w[2] = u[2]", MANY_CHANNELS),
    Fault("strided_winograd.h", "copy = (i == 4) * (j < 3 ? 1 : 2) + (j == 4)", "copy = (i == 4) + (j == 4)", MANY_CHANNELS),
    Fault("strided_winograd.h", "if (segments[i].channels % L) return false;", "", MANY_CHANNELS),
    Fault("strided_winograd.h", "x == 0 || x > tiles.W", "x == 0 || x > tiles.W + 1", MANY_CHANNELS),
    Fault("strided_winograd.h", "y < 0 || y >= tiles.H) return", "y < 0) return", MANY_CHANNELS),
    Fault("strided_winograd.h", "v < min64(2, tiles.h - tiles.y(row + q))", "v < 2", MANY_CHANNELS),
    Fault("strided_winograd.h", "i < min64(4, tiles.H - tiles.y(row + q) * 2)", "i < min64(4, tiles.H)", MANY_CHANNELS),
    Fault("strided_winograd.h", "columns_of = (tiles.W + 1 - odd_x) / 2", "columns_of = (tiles.W + 1) / 2", MANY_CHANNELS),
    Fault("strided_winograd.h", "y * 3 + x)) * L) * s;", "y * 3 + x)) * L);", MANY_CHANNELS),
    Fault("strided_winograd.h", "for (int t = 1; t < sets; t++) u[y] += load(from + t * set);", "", EXACT_32),
    Fault("strided_winograd.h", "row == of_rows.begin ? products<true>", "row == 0 ? products<true>", EXACT_32),
    Fault("strided_winograd.h", "tiles.y(row)) * tiles.w;\n  }\n  // f(block", "tiles.y(row) / 2) * tiles.w;\n  }\n  // f(block", STATISTICS),
    Fault("mix.h", "int64_t seen = pixel - product.first_pixel(part);", "int64_t seen = pixel;", STATISTICS),
    # grouped3x3.h
    Fault("grouped3x3.h", "(I / SIZE * SIZE + K)...);\n#else", "(I / SIZE * SIZE)...);\n#else", GROUPS),
    Fault("grouped3x3.h", "x >= 0 && x < width ? value(x) : Vec<T>{}", "value(x)", GROUPS),
    Fault("scratch.h", "if (held[at % 3] != at)", "if (held[at % 3] < 0)", GROUPS),
    Fault("grouped3x3.h", "t = TRANSPOSED ? 8 - tap : tap;", "t = tap;", GROUPS),
    Fault("grouped3x3.h", "out = TRANSPOSED ? group + k : group + i,", "out = group + i,", GROUPS),
    Fault("grouped3x3.h", "write(to, q * c.w + left, right", "write(to, q * c.w, right", GROUPS),
    Fault("grouped3x3.h", "if (first + i < outputs) f(", "f(", GROUPS),
    Fault("grouped3x3.h", "y >= 0 && y < H) f(", "y >= 0) f(", GROUPS),
    Fault("grouped3x3.h", "|| to >= c.h) continue;", ") continue;", GROUPS),
    Fault("grouped3x3.h", "last = min64(end + 1, c.N * c.h);", "last = end;", GROUPS),
    Fault("grouped3x3.h", "part < c.shares.rows; part++)", "part < 1; part++)", GROUPS),
    Fault("grouped3x3.h", "store(to + k * L, load(to + k * L) + acc[k]);", "store(to + k * L, acc[k]);", GROUPS),
    Fault("grouped3x3.h", "(scale ? scale[out] : T(1))", "T(1)", FOLDED),
    Fault("grouped3x3.h", "(begin - r.begin) * c.w, pixels, [&]", "0, pixels, [&]", STATISTICS),
    Fault("stage.cpp", "pixel, ch), conv.channels - ch);", "pixel, ch), L);", GRAPHS),
    Fault("stage.cpp", "act, plain.residual}); });", "act, nullptr}); });", FOLDED),
    Fault("grouped3x3.h", "if (correction.owes) {", "if (false) {", GRAPHS),
    # mix.h
    Fault("mix.h", "int64_t n = s.channels - c;\n      auto at", "int64_t n = s.channels - c - 1;\n      auto at", CONCATS),
    Fault("mix.h", "(row / r * H + y) * W + x, y, x}", "(row / r * H + y) * c + x, y, x}", JOINS),
    Fault("mix.h", "s.g_in ? load(s.g_in + pixel * s.g_in_pitch + c, n) + d : d, n)", "d, n)", POSTS),
    Fault("mix.h", "sum += d, sum_x += d * centred, d *= scale;", "sum += d, sum_x += d * s.g_pitch, d *= scale;", JOINS),
    Fault("mix.h", "x = Silu<T>{}.value(pre);", "x = pre;", GRAPHS),
    Fault("mix.h", "d = Silu<T>{}.gradient(pre, d),", "d = Silu<T>{}.gradient(centred, d),", GRAPHS),
    Fault("mix.h", "for (int64_t x = 0; g.H % 2 && x < g.W; x++)", "for (int64_t x = 0; g.H % 2 && x < g.W - 1; x++)", JOINS),
    # conv3x3.h
    Fault("conv3x3.h", "top + i >= 0 && top + i < g.H ? value", "top + i >= 0 && top + i < g.H + 1 ? value", BLOCK),
    Fault("conv3x3.h", "  blank(0);\n", "", BLOCK),
    Fault("conv3x3.h", "seen += pixels;", "seen = pixels;", BLOCK),
    Fault("conv3x3.h", "return c.dropout(g, pixel, ch);", "return c.dropout(g, pixel + 1, ch);", DROPOUT),
    Fault("conv3x3.h", "sum += dn, sum_z += dn * centred;", "sum += dn, sum_z = dn * centred;", BLOCK),
    Fault("conv3x3.h", "load_masked(dz.in + pixel * dz.in_pitch + ch, n) + dn * scale", "dn * scale", GRAPHS),
    Fault("conv3x3.h", "+ dn * scale, n);\n    sum += dn", "+ dn * scale, LANES<T>);\n    sum += dn", GRAPHS),
    # vec.h
    Fault("vec.h", "const uint32_t mask = uint32_t((uint64_t(1) << min64(L, max64(0, n))) - 1);\n  if constexpr (sizeof(S) == 4) return Vec<T>",
          "const uint32_t mask = ~0u;\n  if constexpr (sizeof(S) == 4) return Vec<T>", GRAPHS),
    # pointwise.h
    Fault("pointwise.h", "load(f + d * L, K - k - d * L)", "load(f + d * L, K - k - d * L - 1)", BLOCK),
    Fault("pointwise.h", "s += d, sx += d * centred, g_out = gin + d * scale", "s += d, sx += d * centred, g_out = d * scale", BLOCK),
    Fault("pointwise.h", "if (stats) stats[task].count = seen;", "if (stats) stats[task].count = seen + 1;", BLOCK),
    # elementwise.h
    Fault("elementwise.h", "to.in ? load_ahead(to.in + p * to.in_pitch + c, n) + dn * scale : dn * scale", "dn * scale", GRAPHS),
    Fault("elementwise.h", "return Silu<T>{}.gradient(x, g);", "return g;", GRAPHS),
    Fault("elementwise.h", "{ y = a.value(x); }", "{ y = x; }", GRAPHS),
    Fault("elementwise.h", "{ d = a.gradient(x, g); }", "{ d = g; }", GRAPHS),
    Fault("elementwise.h", "y[i] = activation.value(sum), channels - c, streamed", "y[i] = activation.value(sum), channels - c + 1, streamed", GRAPHS),
    Fault("elementwise.h", "if (streamed.past_caches()) return streamed(to, x);", "if (streamed.past_caches()) return;", LARGE),
    Fault("elementwise.h", "sum += dn, sum_x += dn * centred;", "sum += dn, sum_x += dn;", GRAPHS),
    Fault("elementwise.h", "(r - top) * size + c - left}", "(r - top) * size}", GRAPHS),
    Fault("elementwise.h", "(down - r * stride) * size + right - c * stride}", "(down - r * stride) * size + right}", GRAPHS),
    Fault("elementwise.h", "(down - size + 1 + half) >> half", "(down - size + 2 + half) >> half", GRAPHS),
    Fault("elementwise.h", "min64(columns, (right >> half) + 1) - c", "min64(columns, (right >> half) + 1) - c - 1", GRAPHS),
    Fault("elementwise.h", "a.value((x - mean) * scale + shift);", "a.value((x - mean) * scale);", GRAPHS),
    Fault("elementwise.h", "one(0, 0) + one(0, 1) + one(1, 0) + one(1, 1)", "one(0, 0) + one(0, 1) + one(1, 0)", GRAPHS),
    # pack.h
    Fault("pack.h", "TRANSPOSED ? 8 - t : t", "t", BLOCK),
    Fault("pack.h", "c = n + j * L, left = depth - k;", "c = n + j * L, left = depth - k - 1;", CONCATS),
    Fault("pack.h", "(b - k0) * 9 - q * L,", "(b - k0) * 9 - q * L - 1,", BLOCK),
    # fused_layer.h
    Fault("fused_layer.h", "min64(H, tl.y(last) + M + 1)", "min64(H, tl.y(last) + M)", INFERENCE),
    Fault("fused_layer.h", "if (u < ym && v < xm) store", "if (u < ym && v <= xm) store", INFERENCE),
    # the executor
    Fault("stage.cpp", "owed_mean[s] += scale * dbeta", "owed_mean[s] = scale * dbeta", BLOCK),
    Fault("stage.cpp", "sum_x[b.column + c] - lost[b.column + c] * dbeta", "sum_x[b.column + c]", LARGE_MEAN),
    Fault("stage.cpp", "to.in_pitch = gradient_pitch(s.place), to.in = gradient(s.place);", "to.in_pitch = gradient_pitch(s.place);", GRAPHS),
    Fault("stage.cpp", "!sum.g || sum.last_g != now || ", "!sum.g || ", GRAPHS),
    Fault("stage.cpp", "return t.place.buffer == s.place.buffer; }) == 1) return &s;", "return t.place.buffer == s.place.buffer; }) >= 1) return &s;", GRAPHS),
    Fault("stage.cpp", "s.column >= 0 || s.act != Activation::Identity || s.sums) continue;", "s.sums) continue;", GRAPHS),
    Fault("stage.cpp", "kernel.push_back(ky * 3 + kx)", "kernel.push_back(kx * 3 + ky)", GRAPHS),
    Fault("stage.cpp", "false, 2, ceil_div(g.H, 2), ceil_div(g.W, 2)}", "false, 2, g.H / 2, ceil_div(g.W, 2)}", GRAPHS),
    Fault("stage.cpp", "      if (i.statistics >= 0) part.statistics += out;\n", "", GRAPHS),
    Fault("stage.cpp", "      if (i.column >= 0) part.column += out;\n", "", GRAPHS),
    Fault("stage.cpp", "      if (i.owed >= 0) part.owed += out;\n", "", GRAPHS),
    Fault("stage.cpp", "if (to.in && to.in != to.g) copy_channels<S>", "if (false) copy_channels<S>", GRAPHS),
    Fault("stage.cpp", "to.g && !to.in && q < P; q++) memset", "to.g && !to.in && q < P - 1; q++) memset", GRAPHS),
    Fault("stage.cpp", "if (m.take && m.x && m.last == int64_t(i)) pool.give_back(m.x)", "if (m.take && m.x) pool.give_back(m.x)", GRAPHS),
    Fault("stage.cpp", "double(affine.shift[column + c]) - double(affine.mean[column + c]) * double(affine.scale[column + c])",
          "double(affine.shift[column + c])", test(CONCAT, "test_inference")),
    Fault("stage.cpp", "dy.set(at / L, of(b.output).given", "dy.set(0, of(b.output).given", CONCATS),
    Fault("stage.cpp", "load(dy + ((pixel / (W * H) * h + y) * w + x) * pitch + c, n - c) * T(0.25)",
          "load(dy + ((pixel / (W * H) * h + y) * w + x) * pitch + c, n - c)", JOINS),
    Fault("stage.cpp", "memset(static_cast<void*>(m.g + q * m.g_pitch + i.place.start), 0, size_t(i.place.channels())",
          "memset(static_cast<void*>(m.g + q * m.g_pitch + i.place.start), 0, size_t(i.place.channels() - 1)", GRAPHS),
]  # fmt: skip


class Copy:
    """A copy of the sources, built; one fault at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("csp_kernels", "csrc", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, root / name, ignore=ignored, dirs_exist_ok=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root)
        self.build()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        flags = {
            "CSP_KERNELS_CUDA": "0",
            "CSP_KERNELS_ISAS": "native",
            "CXXFLAGS": "-O1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment = {**os.environ, **flags, "OMP_NUM_THREADS": "2"}
        environment.pop("CSP_KERNELS_LIBRARY", None)
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip

    def build(self) -> None:
        """Compiles what is stale and links."""
        done = self.command("setup.py", "-q", "build_ext", "--inplace")
        if done.returncode:
            raise SystemExit(done.stdout)

    def link(self, compiler: str, first: Path) -> None:
        """Of an inline function that several objects have, the linker keeps that of the first: the fault's."""
        library, torch_lib = self.root / "csp_kernels" / "_C.abi3.so", Path(torch.__file__).parent / "lib"
        objects = sorted((self.root / "build" / "native").glob("*.o"), key=lambda path: (path != first, path))
        fresh = library.with_suffix(".new")
        command = [compiler, "-shared", *map(str, objects), "-o", str(fresh), f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        fresh.replace(library)

    def test(self, arguments: tuple[str, ...], isa: str) -> str:
        """The last line of pytest with this instruction set; "" if all passed."""
        os.environ["CSP_KERNELS_ISA"] = isa
        done = self.command("-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments)
        if done.returncode in (2, 3, 4, 5):  # nothing selected, or an error of pytest itself
            raise SystemExit(f"{arguments}: {done.stdout}")
        return "" if done.returncode == 0 else (done.stdout.strip().splitlines() or [str(done.returncode)])[-1]

    def attempt(self, fault: Fault) -> bool:
        """Whether it is caught. Headers keep their time, so that no other unit looks stale."""
        path, start = fault.path(self.root), time.monotonic()
        stamps = (self.root / "build" / "native").glob(f"{UNIT}.{fault.isa()}.cmd")
        (unit,) = (stamp.with_suffix(".o") for stamp in stamps if f"cpu/{UNIT}.cpp" in stamp.read_text())
        text, times, kept = path.read_text(), path.stat(), unit.read_bytes()
        path.write_text(fault.applied(text))
        try:
            command = shlex.split(unit.with_suffix(".cmd").read_text(), comments=True)
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        finally:
            path.write_text(text)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if done.returncode:
            raise SystemExit(f"{fault}: does not compile\n{done.stdout}")
        self.link(command[0], unit)
        outcome = self.test(fault.tests, fault.isa())
        unit.write_bytes(kept)
        self.link(command[0], unit)  # without the fault: other tests must pass before it counts
        print(f"{'caught' if outcome else 'SURVIVED':8} {time.monotonic() - start:4.0f}s  {fault}", flush=True)
        return bool(outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginning of the file's name")
    parser.add_argument("--sample", type=int, help="so many of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which no other is begun; 0: all")
    parser.add_argument("--root", type=Path, help="where to copy to, kept; otherwise a temporary directory")
    parser.add_argument("--list", action="store_true", help="say what would be planted")
    given = parser.parse_args()
    for fault in FAULTS:  # all strings before anything is built
        fault.applied(fault.path(ROOT).read_text())
    faults = [fault for fault in FAULTS if fault.file.startswith(given.only) and fault.isa() in native.isas()]
    if given.sample is not None:
        faults = random.Random(given.seed).sample(faults, min(given.sample, len(faults)))
    if given.list:
        print(*faults, sep="\n")
        return 0
    start, survivors, passed = time.monotonic(), 0, set()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Copy(given.root or Path(temporary))
        for i, fault in enumerate(faults):
            if given.budget and time.monotonic() - start > given.budget:
                faults = faults[:i]
                break
            if (fault.tests, fault.isa()) not in passed and (failure := copy.test(fault.tests, fault.isa())):
                raise SystemExit(f"without a fault: {fault.tests}: {failure}")
            passed.add((fault.tests, fault.isa()))
            survivors += not copy.attempt(fault)
    print(f"{len(faults)} faults, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
