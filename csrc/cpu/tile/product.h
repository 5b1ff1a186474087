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

#if defined(__AMX_BF16__)
// What the processor's tiles multiply (tiles.h): pairs of values, each value the sum of PARTS bfloat16. One part is the value rounded
// to bfloat16; two have 16 or 17 binary digits of it. A vector of 16 pairs lies as [part][16].
template <int PARTS> struct Pairs { uint32_t part[PARTS]; };
template <int PARTS> struct PairsVector { Vec<uint32_t> part[PARTS]; };
template <int PARTS> struct VecOf<Pairs<PARTS>> { typedef PairsVector<PARTS> type; };
template <int PARTS> constexpr int LANES<Pairs<PARTS>> = 16;
template <int PARTS> CSP_INLINE const uint32_t* part_of(const Pairs<PARTS>* p, int part) { return reinterpret_cast<const uint32_t*>(p) + 16 * part; }
template <int PARTS> CSP_INLINE uint32_t* part_of(Pairs<PARTS>* p, int part) { return reinterpret_cast<uint32_t*>(p) + 16 * part; }
template <int PARTS> CSP_INLINE PairsVector<PARTS> load(const Pairs<PARTS>* p) {
  PairsVector<PARTS> v;
  CSP_UNROLL(2) for (int i = 0; i < PARTS; i++) v.part[i] = load(part_of(p, i));
  return v;
}
template <int PARTS> CSP_INLINE void store(Pairs<PARTS>* p, const PairsVector<PARTS>& v) {
  CSP_UNROLL(2) for (int i = 0; i < PARTS; i++) store(part_of(p, i), v.part[i]);
}
template <int PARTS> CSP_INLINE void store_past_caches(Pairs<PARTS>* p, const PairsVector<PARTS>& v) {
  CSP_UNROLL(2) for (int i = 0; i < PARTS; i++) store_past_caches(part_of(p, i), v.part[i]);
}
template <int PARTS> CSP_INLINE void transpose(PairsVector<PARTS> (&v)[16]) {
  CSP_UNROLL(2) for (int p = 0; p < PARTS; p++) {
    Vec<uint32_t> rows[16];
    CSP_UNROLL(16) for (int i = 0; i < 16; i++) rows[i] = v[i].part[p];
    transpose(rows);
    CSP_UNROLL(16) for (int i = 0; i < 16; i++) v[i].part[p] = rows[i];
  }
}

template <int COUNT> struct TileProduct {
  using Acc = float;
  using unit = Pairs<COUNT>;
  static constexpr int DEPTH = 2, PARTS = COUNT;
  // What is left of x behind the part `rounded`; of an infinity, also one that comes of rounding, nothing.
  static CSP_INLINE Vec<float> rest(Vec<float> x, Vec<uint32_t> rounded) {
    const __mmask16 infinite = _mm512_fpclass_ps_mask((__m512)rounded, 0x18);
    return Vec<float>(_mm512_maskz_sub_ps(__mmask16(~infinite), (__m512)x, (__m512)rounded));
  }
  // Stores the first part of x; that part.
  static CSP_INLINE Vec<uint32_t> store_part(uint16_t* to, Vec<float> x) {
    const U16 rounded = (U16)_mm512_cvtneps_pbh((__m512)x);
    *reinterpret_cast<U16*>(to) = rounded;
    return __builtin_convertvector(rounded, Vec<uint32_t>) << 16;
  }
  // Lane i of both side by side.
  static CSP_INLINE PairsVector<PARTS> join(Vec<float> first, Vec<float> second) {
    const __m512i order = (__m512i)(Vec<uint32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001u + 0x100000u);
    PairsVector<PARTS> to;
    CSP_UNROLL(2) for (int p = 0; p < PARTS; p++) {
      to.part[p] = Vec<uint32_t>(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first)));
      if (p + 1 < PARTS) first = rest(first, to.part[p] << 16), second = rest(second, to.part[p] & 0xffff0000u);
    }
    return to;
  }
  // Each value beside the next.
  static CSP_INLINE PairsVector<PARTS> neighbours(Vec<float> first, Vec<float> second) {
    PairsVector<PARTS> to = join(first, second);
    const Vec<uint32_t> of_first{0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29};
    const __m512i order = (__m512i)(of_first * 0x10001u + 0x20000u);
    CSP_UNROLL(2) for (int p = 0; p < PARTS; p++) to.part[p] = Vec<uint32_t>(_mm512_permutexvar_epi16(order, (__m512i)to.part[p]));
    return to;
  }
};
// A float of which products read two parts.
struct Split { float value; };
CSP_INLINE float widen(Split x) { return x.value; }
CSP_INLINE void narrow(float x, Split* p) { p->value = x; }
CSP_INLINE Vec<float> load(const Split* p) { return load(&p->value); }
CSP_INLINE void store(Split* p, Vec<float> x) { store(&p->value, x); }
#elif defined(__AVX512BF16__)
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
template <class U> constexpr bool TILES = false;
#if defined(__AMX_BF16__)
template <int PARTS> constexpr bool TILES<TileProduct<PARTS>> = true;
template <> struct Types<BFloat16> { using T = float; using Product = TileProduct<1>; };
template <> struct Types<Split> { using T = float; using Product = TileProduct<2>; };
#elif defined(__AVX512BF16__)
template <> struct Types<BFloat16> { using T = float; using Product = Bf16Pair; };
#endif

template <class U> using Acc = typename U::Acc;
template <class U> using Unit = typename U::unit;

template <class V, int MR, int NV> CSP_INLINE void clear(V (&acc)[MR][NV]) {
  CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(4) for (int j = 0; j < NV; j++) acc[i][j] = V{};
}

// acc[MR][NV] += A * B over `blocks` blocks of LANES units.
// A: [block][pixel][LANES], blocks a_step units apart. B: [block][LANES][NV * LANES], read once from front to back: asked for AHEAD
// units before it is multiplied, or a third of the time would be waiting where it comes from beyond the second-level cache.
template <class U> constexpr int64_t AHEAD = 4096 / int64_t(sizeof(U));
template <class U, int MR, int NV>
CSP_INLINE void product(Vec<Acc<U>> (&acc)[MR][NV], const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t blocks) {
  constexpr int L = LANES<Unit<U>>;
  for (int64_t k = 0; k < blocks; k++, A += a_step, B += L * NV * L) {
    CSP_UNROLL(2)
    for (int kk = 0; kk < L; kk++) {
      Vec<Unit<U>> b[NV];
      CSP_UNROLL(4) for (int j = 0; j < NV; j++) b[j] = load(B + (kk * NV + j) * L), __builtin_prefetch(B + (kk * NV + j) * L + AHEAD<Unit<U>>);
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
