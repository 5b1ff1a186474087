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

// Windows of size x size pixels of a map, those that are there: f(pixel, position in the window), in the order of rows.
struct Windows {
  Grid grid;             // what is read
  int64_t size, stride;  // windows lie around each `stride`-th pixel of each `stride`-th row
  int64_t rows() const { return ceil_div(grid.H, stride); }
  int64_t columns() const { return ceil_div(grid.W, stride); }
  int64_t count() const { return grid.N * rows() * columns(); }
  // The pixels of window q.
  template <class F> CSP_INLINE void each_pixel(int64_t q, F f) const {
    const int64_t h = rows(), w = columns(), y = q / w % h * stride, x = q % w * stride, first = q / (w * h) * grid.H, half = size / 2;
    for (int64_t dy = max64(-half, -y); dy <= min64(half, grid.H - 1 - y); dy++)
      for (int64_t dx = max64(-half, -x); dx <= min64(half, grid.W - 1 - x); dx++)
        f((first + y + dy) * grid.W + x + dx, (dy + half) * size + dx + half);
  }
  // The windows that pixel p is in, and where it is in each.
  template <class F> CSP_INLINE void each_window(int64_t p, F f) const {
    const int64_t h = rows(), w = columns(), y = p / grid.W % grid.H, x = p % grid.W, first = p / (grid.W * grid.H) * h, half = size / 2;
    for (int64_t r = ceil_div(max64(0, y - half), stride); r < h && r * stride <= y + half; r++)
      for (int64_t c = ceil_div(max64(0, x - half), stride); c < w && c * stride <= x + half; c++)
        f((first + r) * w + c, (y - r * stride + half) * size + x - c * stride + half);
  }
};

// The largest of x over size x size pixels, and `position`, where it is in the window; as PyTorch's: the first of equal ones, NaN
// before all numbers.
template <class S> struct Largest {
  using T = typename Types<S>::T;
  Vec<T> value, position{};
  Largest(const S* x, int64_t pitch, int64_t left, const Windows& windows, int64_t q) : value(Vec<T>{} - std::numeric_limits<T>::infinity()) {
    bool first = true;
    windows.each_pixel(q, [&](int64_t pixel, int64_t at) __attribute__((always_inline)) {
      Vec<T> v = load(x + pixel * pitch, left), here = Vec<T>{} + T(at);
      if (first) position = here, first = false;
      auto larger = (v > value) | (v != v);
      value = larger ? v : value, position = larger ? here : position;
    });
  }
};

// to [windows][pitch] (null: not wanted) = the maximum of x in each window; its statistics; position, as large: of each maximum.
template <class S>
void maxima(const Parallel& parallel, int tasks, const Windows& windows, const S* x, int64_t x_pitch, int64_t channels, S* to,
            typename Types<S>::T* position, int64_t pitch, Statistics<typename Types<S>::T>* stats) {
  using T = typename Types<S>::T;
  constexpr int L = LANES<T>;
  const int64_t P = windows.count(), tiles = ceil_div(P, 16);
  for_tasks(parallel, tasks, [&](int task) {
    Range r = share(tiles, task, tasks);
    int64_t seen = 0;
    for (int64_t t = r.begin; t < r.end; t++) {
      int64_t m = min64(16, P - t * 16), first = t * 16;
      for (int64_t c = 0; c < channels; c += L) {
        Vec<T> y[16];
        for (int64_t i = 0; i < m; i++) {
          Largest<S> largest(x + c, x_pitch, channels - c, windows, first + i);
          y[i] = largest.value;
          if (to) store(to + (first + i) * pitch + c, y[i], channels - c);
          if (position) store(position + (first + i) * pitch + c, largest.position, channels - c);
        }
        if (stats) add_rows(stats[task], c, seen, m, [&](int64_t i) __attribute__((always_inline)) { return y[i]; });
      }
      seen += m;
    }
    if (stats) stats[task].count = seen;
  });
}

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
  constexpr int L = LANES<T>, RUN = 32;  // pixels of a short sum: it loses less than a long one
  const bool large = to.in != to.g && streams(to.g, P, to.pitch, read.channels);
  for_tasks(parallel, tasks, [&](int task) {
    const StreamedStore streamed(to.g, large);
    Range r = share(P, task, tasks);
    parts[task].clear(0, round_up(read.channels, L));
    for (int64_t begin = r.begin; begin < r.end; begin += RUN)
      for (int64_t c = 0; c < read.channels; c += L) {
        Vec<T> mean = load(read.norm.mean + c), scale = load(read.norm.scale + c), shift = load(read.norm.shift + c), sum{}, sum_x{};
        int64_t n = read.channels - c;
        for (int64_t p = begin; p < min64(begin + RUN, r.end); p++) {
          Vec<T> centred = load_ahead(read.x + p * read.pitch + c, n) - mean, dn = activation.gradient(centred * scale + shift, dy(p, c));
          if (to.g) store(to.g + p * to.pitch + c, to.in ? load_ahead(to.in + p * to.in_pitch + c, n) + dn * scale : dn * scale, n, streamed);
          sum += dn, sum_x += dn * centred;
        }
        T *s = parts[task].sum + c, *sx = parts[task].sum_x + c;
        store(s, load(s) + sum), store(sx, load(sx) + sum_x);
      }
  });
}

}  // namespace csp::CSP_ISA
