// The register-tile product and the units it multiplies: one float (or double), or a pair of bfloat16.
#pragma once
#include "vec.h"

namespace csp::CSP_ISA {

// A unit is what one lane of a product holds: DEPTH values of the reduction.
template <class T> struct Plain {
  using Acc = T;
  using unit = T;
  static constexpr int DEPTH = 1;
  static CSP_INLINE Vec<T> fma(Vec<T> acc, unit a, Vec<T> b) { return acc + b * a; }
  static CSP_INLINE Vec<unit> join(Vec<T> first, Vec<T>) { return first; }
};

#if defined(__AVX512BF16__)
struct Bf16Pair {
  using Acc = float;
  using unit = uint32_t;
  static constexpr int DEPTH = 2;
  static CSP_INLINE Vec<float> fma(Vec<float> acc, unit a, Vec<uint32_t> b) {
    return Vec<float>(_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b));
  }
  static CSP_INLINE Vec<uint32_t> join(Vec<float> first, Vec<float> second) {
    // [first | second] rounded, then lane i of both side by side
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i order = (__m512i)(Vec<uint32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001u + 0x100000u);
    return Vec<uint32_t>(_mm512_permutexvar_epi16(order, both));
  }
};
#endif

// Storage -> accumulation type and unit of its products.
template <class S> struct Types { using T = decltype(widen(S{})); using Product = Plain<T>; };
#if defined(__AMX_BF16__)
struct Bf16Tile : Bf16Pair {  // in the same order, multiplied by tiles.h
  // [first | second] rounded, each value beside the next.
  static CSP_INLINE Vec<uint32_t> neighbours(Vec<float> first, Vec<float> second) {
    return Vec<uint32_t>((__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};
template <> struct Types<BFloat16> { using T = float; using Product = Bf16Tile; };
template <class U> constexpr bool TILES = std::is_same_v<U, Bf16Tile>;
#else
template <class U> constexpr bool TILES = false;
#if defined(__AVX512BF16__)
template <> struct Types<BFloat16> { using T = float; using Product = Bf16Pair; };
#endif
#endif

template <class U> using Acc = typename U::Acc;
template <class U> using Unit = typename U::unit;

template <class V, int MR, int NV> CSP_INLINE void clear(V (&acc)[MR][NV]) {
  CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(4) for (int j = 0; j < NV; j++) acc[i][j] = V{};
}

// acc[MR][NV] += A * B over `blocks` blocks of LANES units.
// A: [block][pixel][LANES], blocks a_step units apart. B: [block][LANES][NV * LANES].
template <class U, int MR, int NV>
CSP_INLINE void product(Vec<Acc<U>> (&acc)[MR][NV], const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t blocks) {
  constexpr int L = LANES<Unit<U>>;
  for (int64_t k = 0; k < blocks; k++, A += a_step, B += L * NV * L) {
    CSP_UNROLL(2)
    for (int kk = 0; kk < L; kk++) {
      Vec<Unit<U>> b[NV];
      CSP_UNROLL(4) for (int j = 0; j < NV; j++) b[j] = load(B + (kk * NV + j) * L);
      CSP_UNROLL(16) for (int i = 0; i < MR; i++) {
        Unit<U> a = A[i * L + kk];
        CSP_UNROLL(4) for (int j = 0; j < NV; j++) acc[i][j] = U::fma(acc[i][j], a, b[j]);
      }
    }
  }
}

// dW[MR][NV * LANES] += A^T B over n units of pixels. A: [pixel][LANES], its first MR lanes are rows of dW;
// b0, b1: LANES of each pixel, pixels b_step apart. dW rows lie ldw apart. FIRST: dW begins here.
template <class U, int MR, int NV, bool FIRST = false>
CSP_NOINLINE void outer_product(const Unit<U>* A, const Unit<U>* b0, const Unit<U>* b1, int64_t n, Acc<U>* dW, int64_t ldw,
                                int64_t b_step = LANES<Unit<U>>) {
  constexpr int L = LANES<Unit<U>>;
  Vec<Acc<U>> acc[MR][NV];
  if constexpr (FIRST) clear(acc);
  else CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(4) for (int j = 0; j < NV; j++) acc[i][j] = load(dW + i * ldw + j * L);
  CSP_UNROLL(2) for (int64_t p = 0; p < n; p++) {
    Vec<Unit<U>> b[2] = {load(b0 + p * b_step), NV > 1 ? load(b1 + p * b_step) : load(b0 + p * b_step)};
    CSP_UNROLL(16) for (int i = 0; i < MR; i++) {
      Unit<U> a = A[p * L + i];
      CSP_UNROLL(4) for (int j = 0; j < NV; j++) acc[i][j] = U::fma(acc[i][j], a, b[j]);
    }
  }
  CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(4) for (int j = 0; j < NV; j++) store(dW + i * ldw + j * L, acc[i][j]);
}

template <class T> constexpr int WROWS = LANES<T> < WGRAD_ROWS ? LANES<T> : WGRAD_ROWS;

}  // namespace csp::CSP_ISA
