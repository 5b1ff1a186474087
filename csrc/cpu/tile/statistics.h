// Mean and sum of squared deviations per channel: Chan's update per tile, relative to a pivot (the first row seen), so that
// features with a large mean lose nothing. Merged over tasks in double, in task order.
#pragma once
#include <cmath>
#include "scratch.h"

namespace csp::CSP_ISA {

template <class T> struct Statistics {  // [channels] each
  T *pivot, *mean, *m2;                 // mean is relative to the pivot
  T *mean_low, *m2_low;                 // what the running sums lost to rounding
  int64_t count;

  static int64_t size(int64_t channels) { return 5 * channels; }
  void bind(T* memory, int64_t channels) {
    pivot = memory, mean = memory + channels, m2 = mean + channels, mean_low = m2 + channels, m2_low = mean_low + channels;
  }
};

template <class T> inline Statistics<T>* take_statistics(Frame& frame, int tasks, int64_t channels) {
  int64_t padded = round_up(channels, 64);
  Statistics<T>* s = frame.take<Statistics<T>>(tasks);
  for (int t = 0; t < tasks; t++) s[t].bind(frame.take<T>(Statistics<T>::size(padded)), padded);
  return s;
}

// *sum += x, compensated (Kahan): thousands of tiles lose no more than one.
template <class T, class V> CSP_INLINE void add_compensated(T* sum, T* low, V x) {
  V old = load(sum), y = x + load(low), total = old + y;
  store(sum, total), store(low, y - (total - old));
}

// Adds `rows` rows row(i) -> Vec of the channels at c.. to one channel vector. seen: pixels added before.
template <class T, class Row>
CSP_INLINE void add_rows(Statistics<T>& st, int64_t c, int64_t seen, int64_t rows, Row row) {
  Vec<T> pivot;
  if (seen == 0) {
    pivot = row(0);
    store(st.pivot + c, pivot);
    store(st.mean + c, Vec<T>{}), store(st.m2 + c, Vec<T>{}), store(st.mean_low + c, Vec<T>{}), store(st.m2_low + c, Vec<T>{});
  } else {
    pivot = load(st.pivot + c);
  }
  Vec<T> s0{}, s1{}, q0{}, q1{};
  int64_t i = 0;
  CSP_UNROLL(8) for (; i + 1 < rows; i += 2) s0 += row(i) - pivot, s1 += row(i + 1) - pivot;
  if (i < rows) s0 += row(i) - pivot;
  Vec<T> m = (s0 + s1) * (T(1) / T(rows)), shift = pivot + m, lost = (shift - pivot) - m;
  // shift is rounded; put what it lost back, so that deviations are exact for a large pivot
  i = 0;
  CSP_UNROLL(8) for (; i + 1 < rows; i += 2) {
    Vec<T> d = (row(i) - shift) + lost, e = (row(i + 1) - shift) + lost;
    q0 += d * d, q1 += e * e;
  }
  if (i < rows) { Vec<T> d = (row(i) - shift) + lost; q0 += d * d; }
  T n = T(seen), k = T(rows);
  Vec<T> d = m - load(st.mean + c);
  add_compensated(st.mean + c, st.mean_low + c, d * (k / (n + k)));
  add_compensated(st.m2 + c, st.m2_low + c, (q0 + q1) + d * d * (n * k / (n + k)));
}

template <class T, int MR, int NV>
CSP_INLINE void add_tile(Statistics<T>& st, int64_t c, int64_t seen, const Vec<T> (&acc)[MR][NV]) {
  CSP_UNROLL(4) for (int j = 0; j < NV; j++)
    add_rows(st, c + j * LANES<T>, seen, MR, [&](int64_t i) __attribute__((always_inline)) { return acc[i][j]; });
}

// Once more from x [P][pitch], in double, where float was too short for the squares: deviations above 1e19, or NaN.
template <class S>
CSP_NOINLINE void retake(const Parallel& parallel, const S* x, int64_t pitch, int64_t P, int64_t channels, double* mean, double* var) {
  constexpr int64_t WIDTH = 16;
  int64_t blocks = ceil_div(channels, WIDTH);
  int tasks = choose_tasks(parallel, blocks, 8.0 * double(P * channels));
  for_tasks(parallel, tasks, [&](int task) {
    Range r = share(blocks, task, tasks);
    for (int64_t c = r.begin * WIDTH; c < min64(channels, r.end * WIDTH); c += WIDTH) {
      int64_t n = min64(WIDTH, channels - c);
      bool finite = true;
      for (int64_t i = 0; i < n; i++) finite = finite && std::isfinite(var[c + i]);
      if (finite) continue;
      double sum[WIDTH]{}, square[WIDTH]{};
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = 0; i < n; i++) sum[i] += double(widen(x[p * pitch + c + i]));
      for (int64_t i = 0; i < n; i++) sum[i] /= double(P);
      for (int64_t p = 0; p < P; p++)
        for (int64_t i = 0; i < n; i++) {
          double d = double(widen(x[p * pitch + c + i])) - sum[i];
          square[i] += d * d;
        }
      for (int64_t i = 0; i < n; i++)
        if (!std::isfinite(var[c + i])) mean[c + i] = sum[i], var[c + i] = square[i] / double(P);
    }
  });
}

// mean[channels] and biased variance var[channels] of all tasks, which took them of x [P][pitch].
template <class T, class S>
inline void merge(const Parallel& parallel, const Statistics<T>* parts, int tasks, const S* x, int64_t pitch, int64_t P, int64_t channels,
                  double* mean, double* var) {
  double n = 0;
  for (int64_t c = 0; c < channels; c++) mean[c] = var[c] = 0;
  for (int t = 0; t < tasks; t++) {
    const Statistics<T>& p = parts[t];
    double k = double(p.count), part = k / (n + k);
    if (k == 0) continue;
    CSP_PRAGMA(GCC ivdep) for (int64_t c = 0; c < channels; c++) {
      double d = double(p.pivot[c]) + double(p.mean[c]) + double(p.mean_low[c]) - mean[c];
      var[c] += double(p.m2[c]) + double(p.m2_low[c]) + d * d * n * part;
      mean[c] += d * part;
    }
    n += k;
  }
  bool finite = true;
  for (int64_t c = 0; c < channels; c++) var[c] /= n, finite &= std::isfinite(var[c]);
  if (!finite) retake(parallel, x, pitch, P, channels, mean, var);
}

}  // namespace csp::CSP_ISA
