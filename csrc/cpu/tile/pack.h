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

// W[depth][channels] for products. BY_CHANNEL: w is [channels][depth], each channel times scale[n] (null: 1);
// otherwise w is [depth][channels].
// part: which blocks of the depth this call packs.
template <class U, bool BY_CHANNEL>
inline void pack_product(Unit<U>* out, int64_t depth, int64_t channels, const Acc<U>* w, const Acc<U>* scale, Range part) {
  using T = Acc<U>;
  constexpr int L = LANES<T>;
  int64_t blocks = ceil_div(depth, depth_block<U>());
  for (int64_t p = 0; p < panels<T>(channels); p++) {
    int nv = panel_vectors<T>(channels, p);
    for (int64_t kb = part.begin; kb < part.end; kb++) {
      Unit<U>* o = out + (p * blocks * 2 + kb * nv) * L * L;
      int64_t k = kb * depth_block<U>(), n = p * 2 * L;
      if constexpr (BY_CHANNEL) {
        for (int j = 0; j < nv; j++) {
          int64_t c = n + j * L, left = depth - k;
          bool whole = c + L <= channels && left >= depth_block<U>();
          store_transposed(o + j * L, nv * L, whole, [&](int64_t i, bool whole) __attribute__((always_inline)) {
            if (!whole && c + i >= channels) return Vec<Unit<U>>{};
            const T* row = w + (c + i) * depth + k;
            T s = scale ? scale[c + i] : T(1);
            auto part = [&](int64_t q) __attribute__((always_inline)) { return (whole ? load(row + q) : load(row + q, left - q)) * s; };
            return U::join(part(0), U::DEPTH > 1 ? part(L) : Vec<T>{});
          });
        }
      } else {
        for (int kk = 0; kk < L; kk++)
          for (int j = 0; j < nv; j++) {
            auto row = [&](int64_t q) {
              return q < depth ? load(w + q * channels + n + j * L, channels - n - j * L) : Vec<T>{};
            };
            store(o + (kk * nv + j) * L, U::join(row(k + kk), U::DEPTH > 1 ? row(k + kk + L) : Vec<T>{}));
          }
      }
    }
  }
}

// Where the 3x3 weights of a layer lie, [g][b][9], or [g][9][b] if the tensor is channels_last; moved by blocks of
// taps[LANES][9][LANES].
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
  // taps[i][9][lane] of input k0 + i and output n0 + lane, zero outside.
  void gather(const T* w, int64_t k0, int64_t n0, T* taps) const {
    parts(k0, [&](int64_t from, int64_t length, int64_t to, int64_t step) __attribute__((always_inline)) {
      store_transposed(taps + to, step, n0 + L <= g && length >= L, [&](int64_t i, bool whole) __attribute__((always_inline)) {
        const T* row = w + (n0 + i) * b * 9 + from;
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
        for (int t = 0; t < 9; t++) store(taps + t * L, load(from + t * b + n0, left));
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
      for (int64_t i = 0; i < L && n0 + i < g; i++) store(w + (n0 + i) * b * 9 + to, v[i], length);
    });
  }
};

// The 3x3 weights w transformed -> U[panel][e][kblock][LANES][NV * LANES]; forward: reduction over b, channels g; transposed (dgrad): reduction over g,
// channels b, taps flipped. scale: of each of those channels, null: 1. part: which blocks of the reduction this call packs.
template <class T, int M>
inline int64_t winograd_size(int64_t depth, int64_t channels) {
  return panels<T>(channels) * (M + 2) * (M + 2) * ceil_div(depth, LANES<T>) * LANES<T> * 2 * LANES<T>;
}
template <class T, int M, bool TRANSPOSED> struct WinogradWeights {
  static constexpr int L = LANES<T>, IN = M + 2, E = IN * IN;
  const T* w;
  Weights3x3<T> place;
  const T* scale = nullptr;
  int64_t depth = TRANSPOSED ? place.g : place.b, channels = TRANSPOSED ? place.b : place.g, blocks = ceil_div(depth, L);
  int64_t panel_size() const { return E * blocks * L * 2 * L; }

  CSP_NOINLINE void pack_panel(T* to, int64_t p, Range part) const {
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
            CSP_UNROLL(6) for (int x = 0; x < IN; x++) store(to + ((((i * IN + x) * blocks + kb) * L + k) * nv + j) * L, line[x]);
          }
        }
      }
  }
  void pack(T* to, Range part) const {
    for (int64_t p = 0; p < panels<T>(channels); p++) pack_panel(to + p * panel_size(), p, part);
  }
};

}  // namespace csp::CSP_ISA
