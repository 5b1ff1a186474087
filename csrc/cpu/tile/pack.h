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
        for (int j = 0; j < nv * L; j++) {
          alignas(64) Unit<U> line[L] = {};
          if (n + j < channels) {
            const T* row = w + (n + j) * depth + k;
            T s = scale ? scale[n + j] : T(1);
            store(line, U::join(load(row, depth - k) * s, U::DEPTH > 1 ? load(row + L, depth - k - L) * s : Vec<T>{}));
          }
          for (int kk = 0; kk < L; kk++) o[kk * nv * L + j] = line[kk];
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

// w [g][b][3][3] -> U[panel][e][kblock][LANES][NV * LANES]; forward: reduction over b, channels g;
// transposed (dgrad): reduction over g, channels b, taps flipped. part: which blocks of the reduction this call packs.
template <class T, int M>
inline int64_t winograd_size(int64_t depth, int64_t channels) {
  return panels<T>(channels) * (M + 2) * (M + 2) * ceil_div(depth, LANES<T>) * LANES<T> * 2 * LANES<T>;
}
template <class T, int M, bool TRANSPOSED>
inline void pack_winograd(T* out, const T* w, int64_t g, int64_t b, Range part) {
  constexpr int L = LANES<T>, IN = M + 2, E = IN * IN;
  int64_t depth = TRANSPOSED ? g : b, channels = TRANSPOSED ? b : g, blocks = ceil_div(depth, L);
  for (int64_t p = 0; p < panels<T>(channels); p++) {
    int nv = panel_vectors<T>(channels, p);
    T* o = out + p * E * blocks * L * 2 * L;
    for (int64_t k = part.begin * L; k < part.end * L; k++)
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
