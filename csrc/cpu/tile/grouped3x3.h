// The 3x3 convolution in groups narrower than a vector, down to the depthwise one, with stride 1 or 2: forward with statistics, and
// both gradients. Directly, with no product of what is zero; a vector holds the groups side by side. For groups of `size` channels, as
// many in as out,
//   y[pixel][lane] = sum over taps t and k < size of w[t][k][lane] * x[pixel of t][lane - lane % size + k],
// so a row of x is spread first: to vectors [position][k], in which each lane has channel k of its group. What is spread at a time,
// three rows of a few columns, stays in the first-level cache.
#pragma once
#include "conv3x3.h"

namespace csp::CSP_ISA {

// f(integral_constant of a size)
template <class T, class F> CSP_INLINE void with_group_size(int64_t size, F f) {
  if (size == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (LANES<T> > 2) if (size == 2) return f(std::integral_constant<int, 2>{});
  if constexpr (LANES<T> > 4) if (size == 4) return f(std::integral_constant<int, 4>{});
  if constexpr (LANES<T> > 8) if (size == 8) return f(std::integral_constant<int, 8>{});
}
// In each lane channel K of its group.
template <int SIZE, int K, class V, int... I> CSP_INLINE V of_group(V x, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, x, (I / SIZE * SIZE + K)...);
#else  // GCC before 12
  return __builtin_shuffle(x, decltype(x < x){(I / SIZE * SIZE + K)...});
#endif
}
template <class T, int SIZE, int... K> CSP_INLINE void spread(Vec<T> x, T* to, std::integer_sequence<int, K...>) {
  (store(to + K * LANES<T>, of_group<SIZE, K>(x, std::make_integer_sequence<int, LANES<T>>{})), ...);
}
// value(x) for x in `of`, zeros where it is not in [0, width), to [x][size][LANES].
template <class T, class Value> CSP_INLINE void spread_row(Range of, int64_t width, int64_t size, T* to, const Value& value) {
  with_group_size<T>(size, [&](auto constant) __attribute__((always_inline)) {
    constexpr int SIZE = decltype(constant)::value;
    for (int64_t x = of.begin; x < of.end; x++, to += SIZE * LANES<T>)
      spread<T, SIZE>(x >= 0 && x < width ? value(x) : Vec<T>{}, to, std::make_integer_sequence<int, SIZE>{});
  });
}

// The last three rows of some columns of one vector of channels, spread: for so many outputs of a row, each `step` positions from the last.
template <class T> struct SpreadRows : LastRows<T> {
  SpreadRows(Frame& frame, int64_t outputs, int64_t step, int64_t size) : LastRows<T>(frame, ((outputs + REGISTER_ROWS) * step + 2) * size * LANES<T>) {}
};

// Taps of a row of outputs whose positions and weights follow each other: what the first output reads, [count][LANES], and its weights.
template <class T> struct SpreadTaps {
  struct Run { const T *x, *w; int64_t count; };
  Run runs[6];
  int used = 0;
  void add(const T* x, const T* w, int64_t count) { runs[used++] = {x, w, count}; }
  // f(output, its sum) of `outputs` of them, `step` values from one to the next.
  template <class F> CSP_INLINE void each_output(int64_t outputs, int64_t step, F f) const {
    each_rows<REGISTER_ROWS, FEW_REGISTER_ROWS>(outputs, [&](int64_t first, auto rows) __attribute__((always_inline)) {
      constexpr int MR = decltype(rows)::value, L = LANES<T>;
      Vec<T> acc[MR] = {};
      for (int r = 0; r < used; r++) {
        const T *x = runs[r].x + first * step, *w = runs[r].w, *end = w + runs[r].count * L;
        for (; w < end; w += L, x += L) {
          const Vec<T> weight = load(w);
          CSP_UNROLL(16) for (int i = 0; i < MR; i++) acc[i] += weight * load(x + i * step);
        }
      }
      CSP_UNROLL(16) for (int i = 0; i < MR; i++) if (first + i < outputs) f(first + i, acc[i]);
    });
  }
};

// What both directions need to know. z [N * H * W][zp] normalised on load, the output [N * h * w][pitch].
template <class S> struct Grouped3x3 {
  using T = decltype(widen(S{}));
  static constexpr int L = LANES<T>;
  const Parallel& parallel;
  int64_t N, H, W, channels, size, stride, zp, pitch;
  const Affine<T>& norm;   // of z
  OnLoad<T> act;           // of norm(z)
  int64_t h = ceil_div(H, stride), w = ceil_div(W, stride);
  Shares shares = choose_shares(parallel, N * h, vectors(), 1, double(channels) / double(N * h * w), double(N * h * w * channels) * (18.0 * double(size) + BESIDE));

  static constexpr double BESIDE = 100;  // FLOPs of products in whose time a value is read, spread and written

  static bool fits(int64_t size) { return size < L && L % size == 0; }
  int64_t vectors() const { return ceil_div(channels, L); }
  int64_t set() const { return 9 * size * L; }  // weights of a vector
  int64_t weights() const { return vectors() * set(); }
  int64_t strip() const { return max64(1, 512 / w); }  // rows of the output at a time
  // Outputs of a row at a time: whole register tiles whose spread rows are 24 KiB, or one.
  int64_t columns(int64_t step) const {
    const int64_t tile = 3 * REGISTER_ROWS * step * size * L * int64_t(sizeof(T));
    return max64(1, (int64_t(24) << 10) / tile) * REGISTER_ROWS;
  }
  // f(begin, end) of the columns of a row of so many outputs
  template <class F> CSP_INLINE void each_block(int64_t outputs, int64_t step, F f) const {
    const int64_t n = columns(step);
    for (int64_t x = 0; x < outputs; x += n) f(x, min64(x + n, outputs));
  }

  // Weights [channels][size][9], if channels_last [channels][9][size], to [vector][tap][size][LANES]. scale: of each channel, null: 1.
  // TRANSPOSED: lanes are channels of the input, k those of the output; taps turned round.
  template <bool TRANSPOSED> void pack(T* to, const T* from, bool channels_last, const T* scale) const {
    for (int64_t v = 0; v < vectors(); v++)
      for (int64_t tap = 0; tap < 9; tap++)
        for (int64_t k = 0; k < size; k++)
          for (int64_t group = v * L; group < v * L + L; group += size)  // its first channel
            for (int64_t i = 0; i < size; i++, to++) {
              const int64_t out = TRANSPOSED ? group + k : group + i, in = TRANSPOSED ? i : k, t = TRANSPOSED ? 8 - tap : tap;
              *to = group < channels ? from[channels_last ? (out * 9 + t) * size + in : (out * size + in) * 9 + t] * (scale ? scale[out] : T(1)) : T(0);
            }
  }

  // Columns `of` of row `row` of all images of act(norm(z)), channels ch on, spread. Asks for the next row meanwhile.
  CSP_NOINLINE void spread_input(const S* z, int64_t ch, int64_t row, Range of, T* to) const {
    const Vec<T> mean = load(norm.mean + ch), scale = load(norm.scale + ch), shift = load(norm.shift + ch), number = Vec<T>{} + act.number;
    const S* from = z + row * W * zp + ch;
    auto with = [&](auto leaky) __attribute__((always_inline)) {
      spread_row(of, W, size, to, [&](int64_t x) __attribute__((always_inline)) {
        __builtin_prefetch(from + (W + x) * zp);
        return on_load<decltype(leaky)::value, T>((load_masked(from + x * zp, channels - ch) - mean) * scale + shift, number);
      });
    };
    act.leaky ? with(std::true_type{}) : with(std::false_type{});
  }
  // What outputs begin..end of a row read.
  Range columns_read(int64_t begin, int64_t end) const { return {begin * stride - 1, (end - 1) * stride + 2}; }
  // The rows of the input that row q of the output reads: f(row of all images, row of the kernel).
  template <class F> CSP_INLINE void each_row_read(int64_t q, F f) const {
    for (int64_t ky = 0; ky < 3; ky++)
      if (const int64_t y = q % h * stride + ky - 1; y >= 0 && y < H) f(q / h * H + y, ky);
  }
};

// write(sums, pixel, count, ch) of conv3x3(act(norm(z))): [count][LANES], of pixels that follow each other, channels ch on; statistics of
// the sums. weights: packed.
template <class S, class Write>
void grouped3x3_forward(const Grouped3x3<S>& c, const S* z, const decltype(widen(S{}))* weights, Statistics<decltype(widen(S{}))>* stats, const Write& write) {
  using T = decltype(widen(S{}));
  constexpr int L = LANES<T>;
  for_tasks(c.parallel, c.shares.tasks(), [&](int task) {
    Frame frame;
    SpreadRows<T> rows(frame, min64(c.w, c.columns(c.stride)), c.stride, c.size);
    T* sums = frame.take<T>(c.strip() * c.w * L);  // of a strip, of a vector
    const int part = c.shares.row(task);
    const Range r = c.shares.rows_of(c.N * c.h, task), own = c.shares.panels_of(c.vectors(), task);
    for (int64_t begin = r.begin; begin < r.end; begin += c.strip()) {
      const int64_t end = min64(begin + c.strip(), r.end);
      for (int64_t v = own.begin; v < own.end; v++) {
        const int64_t ch = v * L;
        int64_t pixels = 0;
        c.each_block(c.w, c.stride, [&](int64_t left, int64_t right) __attribute__((always_inline)) {
          rows.forget();
          for (int64_t q = begin; q < end; q++) {
            SpreadTaps<T> taps;
            c.each_row_read(q, [&](int64_t row, int64_t ky) {
              taps.add(rows.row(row, [&](T* to) { c.spread_input(z, ch, row, c.columns_read(left, right), to); }), weights + v * c.set() + ky * 3 * c.size * L, 3 * c.size);
            });
            T* to = sums + pixels * L;
            taps.each_output(right - left, c.stride * c.size * L, [&](int64_t x, Vec<T> sum) __attribute__((always_inline)) { store(to + x * L, sum); });
            write(to, q * c.w + left, right - left, ch);
            pixels += right - left;
          }
        });
        if (stats) add_rows(stats[part], ch, (begin - r.begin) * c.w, pixels, [&](int64_t i) __attribute__((always_inline)) { return load(sums + i * L); });
      }
    }
    if (stats && c.shares.first_panel(task)) stats[part].count = (r.end - r.begin) * c.w;
  });
}

template <class S> struct Grouped3x3Backward {
  using T = decltype(widen(S{}));
  static constexpr int L = LANES<T>;
  const Grouped3x3<S>& c;
  const S *F, *G;           // the output and its gradient
  int64_t g_pitch;
  SliceGradient<T> correction;
  const S* z;
  const T* weights;         // packed, transposed; null: no gradient of z is wanted, nor its sums
  ReadGradient<S> dz;
  const PartialSums<T>* parts;  // of each part of the rows: dW as packed weights, sums of dn and of dn * (z - mean)

  // dY [rows][w][LANES] of rows begin..end of the output
  void load_gradient(int64_t begin, int64_t end, int64_t ch, T* to) const {
    const Vec<T> mean = load(correction.mean + ch), slope = load(correction.slope + ch), offset = load(correction.offset + ch);
    const int64_t n = c.channels - ch;
    constexpr int64_t SOON = 16;  // pixels further on, asked for
    for (int64_t q = begin * c.w; q < end * c.w; q++, to += L) {
      __builtin_prefetch(G + (q + SOON) * g_pitch + ch);
      Vec<T> d = load_masked(G + q * g_pitch + ch, n);
      if (correction.owes) {
        __builtin_prefetch(F + (q + SOON) * c.pitch + ch);
        d -= (load_masked(F + q * c.pitch + ch, n) - mean) * slope + offset;
      }
      store(to, d);
    }
  }

  // dz of the rows of the input that belong to rows begin..end of the output: as many as the stride. Tap (ky, kx) takes a pixel (y, x)
  // to ((y + 1 - ky) / stride, (x + 1 - kx) / stride), where those are whole. dY begins with row `first`.
  void dgrad(int64_t begin, int64_t end, int64_t v, const T* dY, int64_t first, SpreadRows<T>& rows, const PartialSums<T>& part) const {
    const int64_t size = c.size * L;
    const T* w = weights + v * c.set();
    c.each_block(ceil_div(c.W, c.stride), 1, [&](int64_t left, int64_t right) {
      rows.forget();
      for (int64_t q = begin; q < end; q++) {
        const int64_t image = q / c.h, top = q % c.h * c.stride;
        for (int64_t y = top; y < min64(top + c.stride, c.H); y++)
          for (int64_t column = 0; column < c.stride; column++) {
            SpreadTaps<T> taps;
            for (int64_t ky = 0; ky < 3; ky++) {
              const int64_t to = (y + 1 - ky) / c.stride, row = image * c.h + to;
              if (y + 1 < ky || (y + 1 - ky) % c.stride || to >= c.h) continue;
              const T *x = rows.row(row, [&](T* to) { spread_gradient(dY + (row - first) * c.w * L, {left - 1, right + 1}, to); }), *of_row = w + (2 - ky) * 3 * size;
              if (c.stride == 1) taps.add(x, of_row, 3 * c.size);
              else if (column == 0) taps.add(x + size, of_row + size, c.size);
              else taps.add(x + size, of_row, c.size), taps.add(x + 2 * size, of_row + 2 * size, c.size);
            }
            const int64_t outputs = min64(right, (c.W - column + c.stride - 1) / c.stride) - left, from = (image * c.H + y) * c.W + left * c.stride + column;
            with_put(dz, c.act.leaky, [&](auto how, auto leaky) { emit<decltype(how)::value, decltype(leaky)::value>(taps, from, outputs, v * L, part); });
          }
      }
    });
  }
  CSP_NOINLINE void spread_gradient(const T* dy, Range of, T* to) const {
    spread_row(of, c.w, c.size, to, [&](int64_t x) __attribute__((always_inline)) { return load(dy + x * L); });
  }
  // Of `count` pixels from `first` on, each `stride` from the last.
  template <Put PUT, bool LEAKY> void emit(const SpreadTaps<T>& taps, int64_t first, int64_t count, int64_t ch, const PartialSums<T>& part) const {
    PixelBackward<PUT, LEAKY, S> back(z, c.zp, c.channels, c.norm, c.act, dz, ch);
    taps.each_output(count, c.size * L, [&](int64_t i, Vec<T> product) __attribute__((always_inline)) { back(first + i * c.stride, product); });
    back.add_to(part);
  }

  // dW[tap][k][lane] += sum over the pixels of rows begin..end of dY[pixel][lane] * spread x[pixel of the tap][k][lane]
  void wgrad(int64_t begin, int64_t end, int64_t v, const T* dY, int64_t first, SpreadRows<T>& rows, const PartialSums<T>& part) const {
    c.each_block(c.w, c.stride, [&](int64_t left, int64_t right) {
      rows.forget();
      for (int64_t q = begin; q < end; q++)
        c.each_row_read(q, [&](int64_t row, int64_t ky) {
          const T* x = rows.row(row, [&](T* to) { c.spread_input(z, v * L, row, c.columns_read(left, right), to); });
          add_row(x, dY + ((q - first) * c.w + left) * L, right - left, part.weight + v * c.set() + ky * 3 * c.size * L);
        });
    });
  }
  CSP_NOINLINE void add_row(const T* x, const T* dy, int64_t outputs, T* to) const {
    with_group_size<T>(c.size, [&](auto constant) __attribute__((always_inline)) {
      constexpr int SIZE = decltype(constant)::value, COUNT = 3 * SIZE;
      const int64_t step = c.stride * SIZE * L;
      Vec<T> acc[COUNT] = {};  // of this row
      for (int64_t i = 0; i < outputs; i++) {
        const Vec<T> d = load(dy + i * L);
        CSP_UNROLL(24) for (int k = 0; k < COUNT; k++) acc[k] += d * load(x + i * step + k * L);
      }
      CSP_UNROLL(24) for (int k = 0; k < COUNT; k++) store(to + k * L, load(to + k * L) + acc[k]);
    });
  }

  // dW null: not wanted; as the weights lie.
  void run(T* dW, bool channels_last) const {
    for_tasks(c.parallel, c.shares.tasks(), [&](int task) {
      Frame frame;
      SpreadRows<T> rows(frame, min64(c.w, c.columns(c.stride)), c.stride, c.size), gradient(frame, min64(ceil_div(c.W, c.stride), c.columns(1)), 1, c.size);
      T* dY = frame.take<T>((c.strip() + 2) * c.w * L);
      const PartialSums<T>& part = parts[c.shares.row(task)];
      const Range r = c.shares.rows_of(c.N * c.h, task), own = c.shares.panels_of(c.vectors(), task);
      for (int64_t v = own.begin; v < own.end; v++) PartialSums<T>{part.weight + v * c.set(), part.sum + v * L, part.sum_x + v * L}.clear(c.set(), L);
      for (int64_t begin = r.begin; begin < r.end; begin += c.strip()) {
        const int64_t end = min64(begin + c.strip(), r.end), first = max64(begin - 1, 0), last = min64(end + 1, c.N * c.h);
        for (int64_t v = own.begin; v < own.end; v++) {
          load_gradient(first, last, v * L, dY);
          if (weights) dgrad(begin, end, v, dY, first, gradient, part);
          if (dW) wgrad(begin, end, v, dY, first, rows, part);
        }
      }
    });
    if (dW) finish(dW, channels_last);
  }
  void finish(T* dW, bool channels_last) const {
    const int tasks = choose_tasks(c.parallel, c.vectors(), 2.0 * double(c.shares.rows * c.weights()));
    for_tasks(c.parallel, tasks, [&](int task) {
      const Range r = share(c.vectors(), task, tasks);
      for (int64_t v = r.begin; v < r.end; v++)
        for (int64_t t = 0; t < 9; t++)
          for (int64_t k = 0; k < c.size; k++) {
            const int64_t at = v * c.set() + (t * c.size + k) * L;
            Vec<T> sum = load(parts[0].weight + at);
            for (int part = 1; part < c.shares.rows; part++) sum += load(parts[part].weight + at);
            for (int64_t i = 0, out = v * L; i < L && out < c.channels; i++, out++) dW[channels_last ? (out * 9 + t) * c.size + k : (out * c.size + k) * 9 + t] = sum[i];
          }
    });
  }
};

}  // namespace csp::CSP_ISA
