// Weights in the order the products read them.
#pragma once
#include "product.h"
#include "scratch.h"
#include "winograd.h"

namespace csp::CSP_ISA {

// Panels of two vectors (one at the end): each [rows of the reduction][NV * LANES], a fixed stride apart.
template <class T> CSP_INLINE int64_t panels(int64_t channels) { return ceil_div(channels, 2 * LANES<T>); }
template <class T> CSP_INLINE int panel_vectors(int64_t channels, int64_t panel) {
  return channels - panel * 2 * LANES<T> > LANES<T> ? 2 : 1;
}
template <class U> CSP_INLINE int64_t depth_block() { return LANES<Unit<U>> * U::DEPTH; }
template <class U> CSP_INLINE int64_t packed_size(int64_t depth, int64_t channels) {
  return panels<Acc<U>>(channels) * ceil_div(depth, depth_block<U>()) * LANES<Unit<U>> * 2 * LANES<Unit<U>>;
}

// W[depth][channels] for products from its rows: row(k), null: zeros, of which `there` channels are there, the rest is zero.
// part: which blocks of the depth this call packs.
template <class U, class Row>
inline void pack_rows_of_weights(Unit<U>* out, int64_t depth, int64_t channels, int64_t there, const Row& row, Range part) {
  using T = Acc<U>;
  constexpr int L = LANES<T>;
  const int64_t blocks = ceil_div(depth, depth_block<U>());
  const StreamedStore streamed(out);
  for (int64_t kb = part.begin; kb < part.end; kb++)
    for (int kk = 0; kk < L; kk++) {
      const int64_t k = kb * depth_block<U>() + kk;
      auto weights = [&](int64_t q) { return q < depth ? row(q) : nullptr; };
      const T *first = weights(k), *second = U::DEPTH > 1 ? weights(k + L) : nullptr;
      for (int64_t p = 0; p < panels<T>(channels); p++) {
        const int nv = panel_vectors<T>(channels, p);
        for (int j = 0; j < nv; j++) {
          const int64_t c = p * 2 * L + j * L;
          auto some = [&](const T* w) __attribute__((always_inline)) { return w ? load(w + c, there - c) : Vec<T>{}; };
          streamed(out + (p * blocks * 2 + kb * nv) * L * L + (kk * nv + j) * L, U::join(some(first), some(second)));
        }
      }
    }
}

// W[depth][channels] for products. BY_CHANNEL: w is [channels][depth], each channel times scale[n] (null: 1);
// otherwise w is [depth][channels].
// part: which blocks of the depth this call packs.
template <class U, bool BY_CHANNEL>
inline void pack_product(Unit<U>* out, int64_t depth, int64_t channels, const Acc<U>* w, const Acc<U>* scale, Range part) {
  using T = Acc<U>;
  constexpr int L = LANES<T>;
  if constexpr (!BY_CHANNEL) pack_rows_of_weights<U>(out, depth, channels, channels, [&](int64_t k) { return w + k * channels; }, part);
  else {
    int64_t blocks = ceil_div(depth, depth_block<U>());
    const StreamedStore streamed(out);
    for (int64_t p = 0; p < panels<T>(channels); p++) {
      int nv = panel_vectors<T>(channels, p);
      for (int64_t kb = part.begin; kb < part.end; kb++) {
        Unit<U>* o = out + (p * blocks * 2 + kb * nv) * L * L;
        int64_t k = kb * depth_block<U>(), n = p * 2 * L;
        for (int j = 0; j < nv; j++) {
          int64_t c = n + j * L, left = depth - k;
          bool whole = c + L <= channels && left >= depth_block<U>();
          store_transposed(o + j * L, nv * L, whole, [&](int64_t i, bool whole) __attribute__((always_inline)) {
            if (!whole && c + i >= channels) return Vec<Unit<U>>{};
            const T* row = w + (c + i) * depth + k;
            __builtin_prefetch(row + depth_block<U>());  // there are as many rows as channels, more than the processor foresees
            T s = scale ? scale[c + i] : T(1);
            auto part = [&](int64_t q) __attribute__((always_inline)) { return (whole ? load(row + q) : load(row + q, left - q)) * s; };
            return U::join(part(0), U::DEPTH > 1 ? part(L) : Vec<T>{});
          }, streamed);
        }
      }
    }
  }
}

// Where the 3x3 weights of a layer lie, [g][b][9], or [g][9][b] if the tensor is channels_last; moved by blocks of
// taps[LANES][9][LANES]. Each reads or writes 144 vectors far apart, more than the processor foresees: those of the block that most
// loops move next are asked for.
template <class T> struct Weights3x3 {
  static constexpr int L = LANES<T>;
  static constexpr int64_t SIZE = (9 * L + L) * L;  // of taps, with what one transposition may write beyond
  int64_t g, b;
  bool channels_last;

  // The taps of inputs k0 .. k0 + LANES - 1 in nine parts: part(offset in an output's weights, length, offset in taps, step).
  template <class Part> CSP_INLINE void parts(int64_t k0, Part part) const {
    for (int64_t q = 0; q < 9; q++)
      if (channels_last) part(q * b + k0, b - k0, q * L, 9 * L);
      else part(k0 * 9 + q * L, (b - k0) * 9 - q * L, q * L * L, L);
  }
  int64_t next() const { return channels_last ? L : 9 * L; }  // from the weights of LANES inputs to those behind them
  // taps[i][9][lane] of input k0 + i and output n0 + lane, zero outside.
  void gather(const T* w, int64_t k0, int64_t n0, T* taps) const {
    parts(k0, [&](int64_t from, int64_t length, int64_t to, int64_t step) __attribute__((always_inline)) {
      store_transposed(taps + to, step, n0 + L <= g && length >= L, [&](int64_t i, bool whole) __attribute__((always_inline)) {
        const T* row = w + (n0 + i) * b * 9 + from;
        __builtin_prefetch(row + next());
        return whole ? load(row) : load(row, n0 + i < g ? length : 0);
      });
    });
  }
  // taps[i][9][lane] of output k0 + i and input n0 + lane, zero outside.
  void gather_transposed(const T* w, int64_t k0, int64_t n0, T* taps) const {
    for (int64_t k = k0; k < k0 + L; k++, taps += 9 * L) {
      const T* from = w + k * b * 9;
      int64_t left = k < g ? b - n0 : 0;
      if (channels_last) {
        for (int t = 0; t < 9; t++) __builtin_prefetch(from + (t + 9 * L) * b + n0), store(taps + t * L, load(from + t * b + n0, left));
      } else {
        bool whole = left > 0 && k * b + n0 + L < g * b;  // then what is read beyond nine taps is still inside
        for (int t = 0; t < 9; t += L)
          store_transposed(taps + t * L, L, whole, [&](int64_t i, bool whole) __attribute__((always_inline)) {
            const T* row = from + (n0 + i) * 9 + t;
            return whole ? load(row) : load(row, i < left ? 9 - t : 0);
          });
      }
    }
  }
  // The reverse of gather.
  void scatter(const T* taps, int64_t k0, int64_t n0, T* w) const {
    parts(k0, [&](int64_t to, int64_t length, int64_t from, int64_t step) __attribute__((always_inline)) {
      Vec<T> v[L];
      CSP_UNROLL(16) for (int i = 0; i < L; i++) v[i] = load(taps + from + i * step);
      transpose(v);
      for (int64_t i = 0; i < L && n0 + i < g; i++) {
        T* row = w + (n0 + i) * b * 9 + to;
        __builtin_prefetch(row + next(), 1);
        store(row, v[i], length);
      }
    });
  }
};

// From one of the (M + 2)^2 parts e of transformed weights to the next one: an odd number of vectors, since a weight goes to all of them
// and lines a power of two apart would share cache sets.
template <class T> CSP_INLINE int64_t part_size(int64_t vectors) { return (vectors | 1) * LANES<T>; }

// The 3x3 weights w transformed -> U[panel][e][kblock][LANES][NV * LANES], parts e part_size apart; forward: reduction over b, channels g; transposed (dgrad): reduction over g,
// channels b, taps flipped. scale: of each of those channels, null: 1. part: which blocks of the reduction this call packs.
template <class T, int M>
inline int64_t winograd_size(int64_t depth, int64_t channels) {
  return panels<T>(channels) * (M + 2) * (M + 2) * part_size<T>(ceil_div(depth, LANES<T>) * LANES<T> * 2);
}
template <class T, int M, bool TRANSPOSED> struct WinogradWeights {
  static constexpr int L = LANES<T>, IN = M + 2, E = IN * IN;
  const T* w;
  Weights3x3<T> place;
  const T* scale = nullptr;
  int64_t depth = TRANSPOSED ? place.g : place.b, channels = TRANSPOSED ? place.b : place.g, blocks = ceil_div(depth, L);
  int64_t panel_size() const { return E * part_size<T>(blocks * L * 2); }

  // store: of a vector, store() or StreamedStore.
  template <class Store> CSP_NOINLINE void pack_panel(T* to, int64_t p, Range part, const Store& store) const {
    alignas(64) T taps[Weights3x3<T>::SIZE];
    const int nv = panel_vectors<T>(channels, p);
    for (int64_t kb = part.begin; kb < part.end; kb++)
      for (int j = 0; j < nv; j++) {
        if (TRANSPOSED) place.gather_transposed(w, kb * L, p * 2 * L + j * L, taps);
        else place.gather(w, kb * L, p * 2 * L + j * L, taps);
        const Vec<T> s = scale ? load(scale + p * 2 * L + j * L, channels - p * 2 * L - j * L) : Vec<T>{} + T(1);
        for (int k = 0; k < L; k++) {
          Vec<T> rows[IN][3], line[IN];
          CSP_UNROLL(3) for (int x = 0; x < 3; x++) {
            auto tap = [&](int y) __attribute__((always_inline)) { int t = y * 3 + x; return load(taps + (k * 9 + (TRANSPOSED ? 8 - t : t)) * L) * s; };
            weight_transform<T, M>(tap(0), tap(1), tap(2), line);
            CSP_UNROLL(6) for (int i = 0; i < IN; i++) rows[i][x] = line[i];
          }
          CSP_UNROLL(6) for (int i = 0; i < IN; i++) {
            weight_transform<T, M>(rows[i][0], rows[i][1], rows[i][2], line);
            CSP_UNROLL(6) for (int x = 0; x < IN; x++) store(to + (i * IN + x) * part_size<T>(blocks * L * nv) + ((kb * L + k) * nv + j) * L, line[x]);
          }
        }
      }
  }
  void pack(T* to, Range part) const {
    const StreamedStore streamed(to);
    for (int64_t p = 0; p < panels<T>(channels); p++) pack_panel(to + p * panel_size(), p, part, streamed);
  }
};

}  // namespace csp::CSP_ISA
