// Weights in the order the products read them.
#pragma once
#include "product.h"
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

// get(k, n): element of the reduction index k and output channel n; out of range reads as zero.
template <class U, class Get>
inline void pack_product(Unit<U>* out, int64_t depth, int64_t channels, Get get) {
  constexpr int L = LANES<Unit<U>>;
  int64_t blocks = ceil_div(depth, depth_block<U>());
  for (int64_t p = 0; p < panels<Acc<U>>(channels); p++) {
    int nv = panel_vectors<Acc<U>>(channels, p);
    Unit<U>* o = out + p * blocks * L * 2 * L;
    for (int64_t kb = 0; kb < blocks; kb++)
      for (int kk = 0; kk < L; kk++)
        for (int j = 0; j < nv * L; j++) {
          int64_t k = kb * depth_block<U>() + kk, n = p * 2 * L + j;
          auto at = [&](int64_t q) { return q < depth && n < channels ? get(q, n) : Acc<U>(0); };
          o[((kb * L + kk) * nv) * L + j] = U::join1(at(k), U::DEPTH > 1 ? at(k + L) : Acc<U>(0));
        }
  }
}

// w [g][b][3][3] -> U[panel][e][kblock][LANES][NV * LANES]; forward: reduction over b, channels g;
// transposed (dgrad): reduction over g, channels b, taps flipped.
template <class T, int M>
inline int64_t winograd_size(int64_t depth, int64_t channels) {
  return panels<T>(channels) * (M + 2) * (M + 2) * ceil_div(depth, LANES<T>) * LANES<T> * 2 * LANES<T>;
}
template <class T, int M, bool TRANSPOSED>
inline void pack_winograd(T* out, const T* w, int64_t g, int64_t b) {
  constexpr int L = LANES<T>, IN = M + 2, E = IN * IN;
  int64_t depth = TRANSPOSED ? g : b, channels = TRANSPOSED ? b : g, blocks = ceil_div(depth, L);
  for (int64_t p = 0; p < panels<T>(channels); p++) {
    int nv = panel_vectors<T>(channels, p);
    T* o = out + p * E * blocks * L * 2 * L;
    for (int64_t k = 0; k < blocks * L; k++)
      for (int j = 0; j < nv; j++) {
        Vec<T> taps[9];
        int64_t n0 = p * 2 * L + j * L;
        alignas(64) T gathered[9][L];
        for (int lane = 0; lane < L; lane++) {
          int64_t n = n0 + lane;
          bool inside = k < depth && n < channels;
          const T* q = inside ? w + (TRANSPOSED ? k * b + n : n * b + k) * 9 : nullptr;
          for (int t = 0; t < 9; t++) gathered[t][lane] = inside ? q[TRANSPOSED ? 8 - t : t] : T(0);
        }
        for (int t = 0; t < 9; t++) taps[t] = load(gathered[t]);
        Vec<T> rows[IN][3], line[IN];
        CSP_UNROLL(3) for (int x = 0; x < 3; x++) {
          weight_transform<T, M>(taps[x], taps[3 + x], taps[6 + x], line);
          CSP_UNROLL(6) for (int i = 0; i < IN; i++) rows[i][x] = line[i];
        }
        CSP_UNROLL(6) for (int i = 0; i < IN; i++) {
          weight_transform<T, M>(rows[i][0], rows[i][1], rows[i][2], line);
          CSP_UNROLL(6) for (int x = 0; x < IN; x++)
            store(o + ((((i * IN + x) * blocks + k / L) * L + k % L) * nv + j) * L, line[x]);
        }
      }
  }
}

}  // namespace csp::CSP_ISA
