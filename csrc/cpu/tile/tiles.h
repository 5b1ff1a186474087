// Products of pairs of values on the processor's tiles of 16 rows of 64 bytes (AMX). Compiled for instruction set v4amx alone, where
// Types<S>::Product is a TileProduct; for every other unit TILES is false and nothing here is used.
#pragma once
#include "product.h"

namespace csp::CSP_ISA {

// The tile registers of one task, all of 16 rows, while the object lives: 0 to 3 are sums C, row by row; 4 and 5 rows of A, 6 and 7
// columns of B. C += A * B, C of 16 rows of 16 sums, A of 16 rows of 16 pairs, B of 16 rows of 16 pairs.
template <class U> struct TileRegisters {
#if defined(__AMX_BF16__)
  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  TileRegisters() {
    static const Configuration all;
    if constexpr (TILES<U>) asm volatile("ldtilecfg %0" ::"m"(all) : "memory");
  }
  ~TileRegisters() {
    if constexpr (TILES<U>) asm volatile("tilerelease" ::: "memory");
  }
#else
  TileRegisters() {}
  ~TileRegisters() {}
#endif
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

#if defined(__AMX_BF16__)
#define CSP_TILE_LOAD(register, from, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #register ::"r"(from), "r"(int64_t(stride)) : "memory")
#define CSP_TILE_STORE(register, to, stride) asm volatile("tilestored %%tmm" #register ", (%0,%1,1)" ::"r"(to), "r"(int64_t(stride)) : "memory")
#define CSP_TILE_ZERO(register) asm volatile("tilezero %%tmm" #register ::: "memory")
#define CSP_TILE_PRODUCT(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::: "memory")

// Which parts of two values are multiplied, all but that of two second ones. From one term to the next one of both stays the same.
template <int PARTS> struct Terms;
template <> struct Terms<1> { static constexpr int COUNT = 1, A[] = {0}, B[] = {0}; };
template <> struct Terms<2> { static constexpr int COUNT = 3, A[] = {0, 0, 1}, B[] = {1, 0, 0}; };

// The sums of ROWS x COLUMNS registers.
template <int ROWS, int COLUMNS> CSP_INLINE void clear_sums() {
  CSP_TILE_ZERO(0);
  if constexpr (COLUMNS > 1) CSP_TILE_ZERO(1);
  if constexpr (ROWS > 1) CSP_TILE_ZERO(2);
  if constexpr (ROWS > 1 && COLUMNS > 1) CSP_TILE_ZERO(3);
}
template <int ROWS, int COLUMNS> CSP_INLINE void load_sums(const float* from, int64_t pitch) {
  CSP_TILE_LOAD(0, from, pitch * 4);
  if constexpr (COLUMNS > 1) CSP_TILE_LOAD(1, from + 16, pitch * 4);
  if constexpr (ROWS > 1) CSP_TILE_LOAD(2, from + 16 * pitch, pitch * 4);
  if constexpr (ROWS > 1 && COLUMNS > 1) CSP_TILE_LOAD(3, from + 16 * pitch + 16, pitch * 4);
}
template <int ROWS, int COLUMNS> CSP_INLINE void store_sums(float* to, int64_t pitch) {
  CSP_TILE_STORE(0, to, pitch * 4);
  if constexpr (COLUMNS > 1) CSP_TILE_STORE(1, to + 16, pitch * 4);
  if constexpr (ROWS > 1) CSP_TILE_STORE(2, to + 16 * pitch, pitch * 4);
  if constexpr (ROWS > 1 && COLUMNS > 1) CSP_TILE_STORE(3, to + 16 * pitch + 16, pitch * 4);
}
// += 16 * ROWS rows of A times 16 * COLUMNS columns of B over 16 pairs. Units: rows of a register lie a_pitch and b_pitch apart,
// what the second register holds a_next and b_next behind the first.
template <int ROWS, int COLUMNS, int PARTS>
CSP_INLINE void add_products(const Pairs<PARTS>* a, int64_t a_pitch, int64_t a_next, const Pairs<PARTS>* b, int64_t b_pitch, int64_t b_next) {
  constexpr int64_t BYTES = sizeof(Pairs<PARTS>);
  using T = Terms<PARTS>;
  CSP_UNROLL(3) for (int t = 0; t < T::COUNT; t++) {
    if (t == 0 || T::A[t] != T::A[t - 1]) {
      CSP_TILE_LOAD(4, part_of(a, T::A[t]), a_pitch * BYTES);
      if constexpr (ROWS > 1) CSP_TILE_LOAD(5, part_of(a + a_next, T::A[t]), a_pitch * BYTES);
    }
    if (t == 0 || T::B[t] != T::B[t - 1]) {
      CSP_TILE_LOAD(6, part_of(b, T::B[t]), b_pitch * BYTES);
      if constexpr (COLUMNS > 1) CSP_TILE_LOAD(7, part_of(b + b_next, T::B[t]), b_pitch * BYTES);
    }
    CSP_TILE_PRODUCT(0, 4, 6);
    if constexpr (ROWS > 1) CSP_TILE_PRODUCT(2, 5, 6);
    if constexpr (COLUMNS > 1) CSP_TILE_PRODUCT(1, 4, 7);
    if constexpr (ROWS > 1 && COLUMNS > 1) CSP_TILE_PRODUCT(3, 5, 7);
  }
}

// Asks for the 16 x NV * 16 units of B that lie two such blocks further on; see AHEAD in product.h.
template <int NV, int PARTS> CSP_INLINE void prefetch_block(const Pairs<PARTS>* B) {
  constexpr int BYTES = 16 * NV * 16 * int(sizeof(Pairs<PARTS>));
  const char* ahead = reinterpret_cast<const char*>(B) + 2 * BYTES;
  CSP_UNROLL(4) for (int at = 0; at < BYTES; at += 64) __builtin_prefetch(ahead + at);
}

// sums[TILE_ROWS][NV * 16] = (first ? 0 : sums) + A * B: product() of product.h on tiles.
template <class U, int NV> CSP_INLINE void tile_product(float* sums, const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t blocks, bool first) {
  constexpr int L = 16;
  if (first) clear_sums<2, NV>();
  else load_sums<2, NV>(sums, NV * L);
  for (int64_t k = 0; k < blocks; k++, A += a_step, B += L * NV * L) prefetch_block<NV>(B), add_products<2, NV>(A, L, L * L, B, NV * L, L);
  store_sums<2, NV>(sums, NV * L);
}

// dW[16][NV * 16] += A^T B (FIRST: =) over n pairs of pixels, n a multiple of 16: outer_product() of product.h on tiles. A: [n / 16][row of dW][16
// pairs]; b0, b1: [n][16]. dW rows lie ldw apart.
template <class U, int NV, bool FIRST> CSP_INLINE void tile_outer_product(const Unit<U>* A, const Unit<U>* b0, const Unit<U>* b1, int64_t n, float* dW, int64_t ldw) {
  constexpr int L = 16;
  if constexpr (FIRST) clear_sums<1, NV>();
  else load_sums<1, NV>(dW, ldw);
  for (int64_t p = 0; p < n * L; p += L * L) add_products<1, NV>(A + p, L, 0, b0 + p, L, b1 - b0);
  store_sums<1, NV>(dW, ldw);
}

// sums[Q][NV * 16] of a 3x3, Q a multiple of 32. rows: [position][depth / 2] units, depth a multiple of 32; a tap reads dy * pitch + dx
// positions further on. W: [tap][depth / 32][16][NV * 16].
template <class U, int NV> CSP_NOINLINE void tile_product3x3(const Unit<U>* rows, int64_t depth, int64_t pitch, int64_t Q, const Unit<U>* W, float* sums) {
  constexpr int L = 16;
  const int64_t units = depth / 2;
  for (int64_t q = 0; q < Q; q += 2 * L, sums += 2 * L * NV * L) {
    clear_sums<2, NV>();
    const Unit<U>* B = W;
    for (int64_t tap = 0; tap < 9; tap++) {
      const Unit<U>* a = rows + (q + tap / 3 * pitch + tap % 3) * units;
      for (int64_t k = 0; k < units; k += L, B += L * NV * L) {
        if (q == 0) prefetch_block<NV>(B);
        add_products<2, NV>(a + k, units, L * units, B, NV * L, L);
      }
    }
    store_sums<2, NV>(sums, NV * L);
  }
}

// dW[32][32] += A^T B over n pairs of pixels, n a multiple of 16. A: two of [n / 16][row of dW][16 pairs], a_step units apart; B: two of
// [n][16], b_step apart. dW rows lie ldw apart.
template <class U> CSP_NOINLINE void tile_outer_product3x3(const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t b_step, int64_t n, float* dW, int64_t ldw) {
  constexpr int L = 16;
  load_sums<2, 2>(dW, ldw);
  for (int64_t p = 0; p < n * L; p += L * L) add_products<2, 2>(A + p, L, a_step, B + p, L, b_step);
  store_sums<2, 2>(dW, ldw);
}
#endif

// [16][16] units, their rows made columns, in place.
template <class U> CSP_INLINE void transpose_units(Unit<U>* block) {
  constexpr int L = LANES<Unit<U>>;
  Vec<Unit<U>> v[L];
  CSP_UNROLL(16) for (int i = 0; i < L; i++) v[i] = load(block + i * L);
  transpose(v);
  CSP_UNROLL(16) for (int i = 0; i < L; i++) store(block + i * L, v[i]);
}

}  // namespace csp::CSP_ISA
