// What is done to pixels alone: copies with statistics, sums, and the gradient of a read. Any activation, no tile behind the last
// channel is read or written.
#pragma once
#include <limits>

#include "activation.h"
#include "mix.h"

namespace csp::CSP_ISA {

// An activation chosen at run time. Those of most networks are part of the loops that use it, the others a call for each vector:
// with all of them inside, loops keep too little in registers.
template <class T> struct AnyActivation {
  Activation kind;
  T negative;
  CSP_INLINE Vec<T> value(Vec<T> x) const {
    if (kind == Activation::Silu) return Silu<T>{}.value(x);
    if (kind == Activation::Relu) return act<T>(x);
    return kind == Activation::Identity ? x : other_value(x);
  }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const {
    if (kind == Activation::Silu) return Silu<T>{}.gradient(x, g);
    if (kind == Activation::Relu) return act_gradient<T>(x, g);
    return kind == Activation::Identity ? g : other_gradient(x, g);
  }

 private:
  CSP_NOINLINE Vec<T> other_value(Vec<T> x) const {
    Vec<T> y = x;
    with_activation<T>(kind, double(negative), [&](auto a) __attribute__((always_inline)) { y = a.value(x); });
    return y;
  }
  CSP_NOINLINE Vec<T> other_gradient(Vec<T> x, Vec<T> g) const {
    Vec<T> d = g;
    with_activation<T>(kind, double(negative), [&](auto a) __attribute__((always_inline)) { d = a.gradient(x, g); });
    return d;
  }
};

// The first n lanes at p. The next vector of the same pixel is asked for: loops over pixels within loops over vectors of channels come
// to it when all their pixels are through, too far apart for the processor to see it coming.
template <class S> CSP_INLINE auto load_ahead(const S* p, int64_t n) {
  __builtin_prefetch(p + LANES<decltype(widen(S{}))>);
  return load(p, n);
}

// act((x - mean) * scale + shift) of some channels.
template <class S> struct Read {
  using T = typename Types<S>::T;
  const S* x;
  int64_t pitch, channels;
  Affine<T> norm;
  AnyActivation<T> activation;
  CSP_INLINE Vec<T> value(int64_t pixel, int64_t c) const {
    return activation.value((load_ahead(x + pixel * pitch + c, channels - c) - load(norm.mean + c)) * load(norm.scale + c) + load(norm.shift + c));
  }
};

// What follows a convolution in inference, its norm being in its weights: activation(y + bias) + residual.
template <class S, class A> struct After {
  using T = typename Types<S>::T;
  const T* bias;                // padded to whole vectors
  A activation;
  const Read<S>* residual;      // null: none
  CSP_INLINE Vec<T> operator()(Vec<T> y, int64_t pixel, int64_t c) const {
    y = activation.value(y + load(bias + c));
    return residual ? y + residual->value(pixel, c) : y;
  }
};

// to[P][pitch] = after(the product of the segments).
template <class M, class W, class S, class A>
void forward_after(const M& product, const W* weight, const After<S, A>& after, S* to, int64_t pitch, int64_t channels) {
  constexpr int L = LANES<typename M::T>, MR = M::MR;
  product.forward(weight, [&](int, int64_t pixel, int m, int64_t n, const auto& acc) __attribute__((always_inline)) {
    constexpr int NV = int(sizeof(acc[0]) / sizeof(acc[0][0]));
    auto one = [&](int i, int j) __attribute__((always_inline)) { store(to + (pixel + i) * pitch + n + j * L, after(acc[i][j], pixel + i, n + j * L), channels - n - j * L); };
    if constexpr (M::IN_MEMORY) {
      for (int j = 0; j < NV; j++) for (int i = 0; i < m; i++) one(i, j);
    } else {
      CSP_UNROLL(2) for (int j = 0; j < NV; j++) CSP_UNROLL(16) for (int i = 0; i < MR; i++) if (i < m) one(i, j);
    }
  });
}

// Windows of size x size pixels of a map, those of their pixels that are there. The first pixel of window (y, x) is that of row
// y * stride - before(), column x * stride - before(): an odd size lies around pixel (y * stride, x * stride), an even one begins there.
struct Windows {
  Grid grid;                            // what is read
  int64_t size, stride, rows, columns;  // stride: 1 or 2, so that a division by it is a shift
  int64_t before() const { return (size - 1) / 2; }
  int64_t count() const { return grid.N * rows * columns; }
  // Some rows and columns of a map, from `first`; at: the number of the first of them in the window, row by row.
  struct Part {
    int64_t first, rows, columns, at;
  };
  // The pixels of the window in row y and column x of an image.
  Part pixels(int64_t image, int64_t y, int64_t x) const {
    const int64_t top = y * stride - before(), left = x * stride - before(), r = max64(0, top), c = max64(0, left);
    return {(image * grid.H + r) * grid.W + c, min64(grid.H, top + size) - r, min64(grid.W, left + size) - c, (r - top) * size + c - left};
  }
  // The windows that the pixel in row y and column x of an image is in; at: its number in the first of them, `stride` rows (columns)
  // more in the one above (to the left).
  Part windows(int64_t image, int64_t y, int64_t x) const {
    const int64_t down = y + before(), right = x + before();  // as counted from the first window's first pixel
    const int64_t half = stride - 1, r = max64(0, (down - size + 1 + half) >> half), c = max64(0, (right - size + 1 + half) >> half);
    return {(image * rows + r) * columns + c, min64(rows, (down >> half) + 1) - r, min64(columns, (right >> half) + 1) - c, (down - r * stride) * size + right - c * stride};
  }
};

// The rows and columns of pixels that follow each other: part(image, row, column) of `count` of them from `first`, maps being h x w.
template <class Part, class F> void each_of_map(int64_t first, int64_t count, int64_t h, int64_t w, Part* parts, F part) {
  int64_t x = first % w, y = first / w % h, image = first / (w * h);
  for (int64_t i = 0; i < count; i++) {
    parts[i] = part(image, y, x);
    if (++x < w) continue;
    x = 0;
    if (++y == h) y = 0, image++;
  }
}

// The largest of values, and `position`, where it is in its window; as PyTorch's: the first of equal ones, NaN before all numbers.
template <class T, bool WITH_POSITION> struct Largest {
  Vec<T> value = Vec<T>{} - std::numeric_limits<T>::infinity(), position;
  CSP_INLINE void take(Vec<T> v, int64_t at) {
    auto larger = (v > value) | (v != v);
    value = larger ? v : value;
    if constexpr (WITH_POSITION) position = larger ? Vec<T>{} + T(at) : position;
  }
  template <class F> CSP_INLINE void take_all(const Windows::Part& p, int64_t size, int64_t row, F at) {
    position = Vec<T>{} + T(p.at);
    if (p.rows == 3 && p.columns == 3 && size == 3) return take_square<3>(p.first, row, at);
    if (p.rows == 2 && p.columns == 2 && size == 2) return take_square<2>(p.first, row, at);
    for (int64_t y = 0; y < p.rows; y++)
      for (int64_t x = 0; x < p.columns; x++) take(at(p.first + y * row + x), p.at + y * size + x);
  }

 private:
  template <int SIZE, class F> CSP_INLINE void take_square(int64_t first, int64_t row, F at) {
    CSP_UNROLL(3) for (int y = 0; y < SIZE; y++) CSP_UNROLL(3) for (int x = 0; x < SIZE; x++) take(at(first + y * row + x), y * SIZE + x);
  }
};

// What becomes of what is read: nothing, or what a norm and an activation make of it. at(channel): of those from there, of one vector.
template <class T> struct Nothing {
  CSP_INLINE auto at(int64_t) const { return [](Vec<T> x) __attribute__((always_inline)) { return x; }; }
};
template <class T, class A> struct NormAct {
  Affine<T> norm;
  A activation;
  CSP_INLINE auto at(int64_t c) const {
    return [a = activation, mean = load(norm.mean + c), scale = load(norm.scale + c), shift = load(norm.shift + c)](Vec<T> x) __attribute__((always_inline)) {
      return a.value((x - mean) * scale + shift);
    };
  }
};

// to [windows][pitch] (null: not wanted) = the maximum in each window of prologue(x); its statistics; position, as large (WITH_POSITION):
// where each maximum is in its window.
template <bool WITH_POSITION, class S, class Prologue>
void maxima(const Parallel& parallel, int tasks, const Windows& windows, const S* x, int64_t x_pitch, int64_t channels, const Prologue& prologue,
            S* to, typename Types<S>::T* position, int64_t pitch, Statistics<typename Types<S>::T>* stats) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>;
  const int64_t P = windows.count(), tiles = ceil_div(P, 16);
  for_tasks(parallel, tasks, [&](int task) {
    Range r = share(tiles, task, tasks);
    int64_t seen = 0;
    for (int64_t t = r.begin; t < r.end; t++) {
      const int64_t m = min64(16, P - t * 16), first = t * 16;
      Windows::Part parts[16];
      each_of_map(first, m, windows.rows, windows.columns, parts, [&](int64_t image, int64_t y, int64_t x) { return windows.pixels(image, y, x); });
      for (int64_t c = 0; c < channels; c += L) {
        const auto become = prologue.at(c);
        Vec<T> y[16];
        for (int64_t i = 0; i < m; i++) {
          Largest<T, WITH_POSITION> largest;
          largest.take_all(parts[i], windows.size, windows.grid.W, [&](int64_t pixel) __attribute__((always_inline)) {
            return become(load_ahead(x + pixel * x_pitch + c, channels - c));
          });
          y[i] = largest.value;
          if (to) store(to + (first + i) * pitch + c, y[i], channels - c);
          if constexpr (WITH_POSITION) store(position + (first + i) * pitch + c, largest.position, channels - c);
        }
        if (stats) add_rows(stats[task], c, seen, m, [&](int64_t i) __attribute__((always_inline)) { return y[i]; });
      }
      seen += m;
    }
    if (stats) stats[task].count = seen;
  });
}

constexpr int64_t SUMMED = 32;  // pixels of a short sum: it loses less than a long one

// The gradient of what maxima are of: the sum of d(window, channel) over the windows whose maximum a pixel is. position: of `maxima`, rows
// of whole vectors.
template <class T, class D> struct MaximaGradient {
  Windows windows;
  const T* position;
  int64_t pitch;
  D d;
  // Of pixels that follow each other, up to SUMMED.
  struct Along {
    const MaximaGradient& of;
    int64_t begin;
    Windows::Part parts[SUMMED];
    CSP_INLINE Vec<T> operator()(int64_t pixel, int64_t c) const {
      const Windows& w = of.windows;
      const Windows::Part& p = parts[pixel - begin];
      auto one = [&](int64_t y, int64_t x) __attribute__((always_inline)) {
        const int64_t q = p.first + y * w.columns + x, at = p.at - (y * w.size + x) * w.stride;
        return load(of.position + q * of.pitch + c) == Vec<T>{} + T(at) ? of.d(q, c) : Vec<T>{};
      };
      if (p.rows * p.columns == 1) return one(0, 0);
      if (p.rows == 2 && p.columns == 2) return one(0, 0) + one(0, 1) + one(1, 0) + one(1, 1);
      Vec<T> sum{};
      for (int64_t y = 0; y < p.rows; y++)
        for (int64_t x = 0; x < p.columns; x++) sum += one(y, x);
      return sum;
    }
  };
  Along along(int64_t begin, int64_t end) const {
    Along run{*this, begin, {}};
    each_of_map(begin, end - begin, windows.grid.H, windows.grid.W, run.parts, [&](int64_t image, int64_t y, int64_t x) { return windows.windows(image, y, x); });
    return run;
  }
};
// What gives the gradient of the pixels of a run.
template <class Value> CSP_INLINE const Value& along(const Value& dy, int64_t, int64_t) { return dy; }
template <class T, class D> CSP_INLINE auto along(const MaximaGradient<T, D>& dy, int64_t begin, int64_t end) { return dy.along(begin, end); }

// Where the gradient of what is read goes: g = in (null: 0) + scale * dn.
template <class S> struct Spread {
  S* g;  // null: not wanted
  int64_t pitch;
  const S* in;
  int64_t in_pitch;
};

// The statistics of x [P][pitch], and to = x (null: no copy). stats: take_statistics of `tasks` tasks, null: not wanted.
template <class S>
void copy_channels(const Parallel& parallel, int tasks, int64_t P, int64_t channels, const S* x, int64_t pitch, S* to, int64_t to_pitch,
                   Statistics<typename Types<S>::T>* stats) {
  constexpr int L = LANES<typename Types<S>::T>;
  int64_t tiles = ceil_div(P, 16);
  for_tasks(parallel, tasks, [&](int task) {
    Range r = share(tiles, task, tasks);
    int64_t seen = 0;
    for (int64_t t = r.begin; t < r.end; t++) {
      int64_t m = min64(16, P - t * 16);
      const S* xt = x + t * 16 * pitch;
      for (int64_t i = 0; to && i < m; i++) memcpy(static_cast<void*>(to + (t * 16 + i) * to_pitch), xt + i * pitch, size_t(channels) * sizeof(S));
      for (int64_t c = 0; stats && c < channels; c += L)
        add_rows(stats[task], c, seen, m, [&](int64_t i) __attribute__((always_inline)) { return load(xt + i * pitch + c, channels - c); });
      seen += m;
    }
    if (stats) stats[task].count = seen;
  });
}

// Whether [P][pitch], of which so many channels are written, is larger than a core's second-level cache, so that its memory has mostly been
// another core's: StreamedStore. Of whole lines alone.
template <class S> bool streams(const S* to, int64_t P, int64_t pitch, int64_t channels) {
  constexpr int64_t LINE = 64 / int64_t(sizeof(S));
  return to && std::is_same_v<S, typename Types<S>::T> && P * pitch * int64_t(sizeof(S)) >= int64_t(1) << 20 && channels % LINE == 0 && pitch % LINE == 0;
}
// Past the caches, or as usual with the line behind it asked for.
template <class S, class V> CSP_INLINE void store(S* to, V x, int64_t n, const StreamedStore& streamed) {
  if constexpr (std::is_same_v<S, typename Types<S>::T>) {
    if (streamed.past_caches()) return streamed(to, x);
  }
  __builtin_prefetch(to + LANES<decltype(widen(S{}))>, 1);
  store(to, x, n);
}

// to[P][pitch] = activation(sum of the terms); statistics of it.
template <class S>
void add_terms(const Parallel& parallel, int tasks, int64_t P, const Read<S>* terms, int64_t count, const AnyActivation<typename Types<S>::T>& activation,
               S* to, int64_t pitch, Statistics<typename Types<S>::T>* stats) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>;
  int64_t tiles = ceil_div(P, 16), channels = terms[0].channels;
  const bool large = streams(to, P, pitch, channels);
  for_tasks(parallel, tasks, [&](int task) {
    const StreamedStore streamed(to, large);
    Range r = share(tiles, task, tasks);
    int64_t seen = 0;
    for (int64_t t = r.begin; t < r.end; t++) {
      int64_t m = min64(16, P - t * 16), first = t * 16;
      for (int64_t c = 0; c < channels; c += L) {
        Vec<T> y[16];
        for (int64_t i = 0; i < m; i++) {
          Vec<T> sum = terms[0].value(first + i, c);
          for (int64_t k = 1; k < count; k++) sum += terms[k].value(first + i, c);
          store(to + (first + i) * pitch + c, y[i] = activation.value(sum), channels - c, streamed);
        }
        if (stats) add_rows(stats[task], c, seen, m, [&](int64_t i) __attribute__((always_inline)) { return y[i]; });
      }
      seen += m;
    }
    if (stats) stats[task].count = seen;
  });
}

// The gradient of what is read, from dy(pixel, channel) of what that became; its sums of dn and of dn * (x - mean). activation: read's.
template <class S, class A, class Value>
void spread_gradient(const Parallel& parallel, int tasks, int64_t P, const Read<S>& read, const A& activation, const Spread<S>& to,
                     const PartialSums<typename Types<S>::T>* parts, const Value& dy) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>;
  const bool large = to.in != to.g && streams(to.g, P, to.pitch, read.channels);
  for_tasks(parallel, tasks, [&](int task) {
    const StreamedStore streamed(to.g, large);
    Range r = share(P, task, tasks);
    parts[task].clear(0, round_up(read.channels, L));
    for (int64_t begin = r.begin; begin < r.end; begin += SUMMED) {
      const int64_t end = min64(begin + SUMMED, r.end);
      const auto& value = along(dy, begin, end);
      for (int64_t c = 0; c < read.channels; c += L) {
        Vec<T> mean = load(read.norm.mean + c), scale = load(read.norm.scale + c), shift = load(read.norm.shift + c), sum{}, sum_x{};
        int64_t n = read.channels - c;
        for (int64_t p = begin; p < end; p++) {
          Vec<T> centred = load_ahead(read.x + p * read.pitch + c, n) - mean, dn = activation.gradient(centred * scale + shift, value(p, c));
          if (to.g) store(to.g + p * to.pitch + c, to.in ? load_ahead(to.in + p * to.in_pitch + c, n) + dn * scale : dn * scale, n, streamed);
          sum += dn, sum_x += dn * centred;
        }
        T *s = parts[task].sum + c, *sx = parts[task].sum_x + c;
        store(s, load(s) + sum), store(sx, load(sx) + sum_x);
      }
    }
  });
}

}  // namespace csp::CSP_ISA
