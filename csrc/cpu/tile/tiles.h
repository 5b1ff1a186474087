// Products of bfloat16 pairs on the processor's tiles of 16 rows of 64 bytes (AMX). Compiled for instruction set v4amx alone,
// where Types<BFloat16>::Product is Bf16Tile; for every other unit TILES is false and nothing here is used.
#pragma once
#include "product.h"

namespace csp::CSP_ISA {

// The tile registers of one task: C += A * B, C of TILE_ROWS or 16 rows of 16 sums, A of as many rows of 16 pairs, B of 16 rows
// of 16 pairs. Which registers have TILE_ROWS rows (the others have 16) is fixed while the object lives.
template <class U> struct TileRegisters {
#if defined(__AMX_BF16__)
  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  // low: how many of the registers, the first ones, have TILE_ROWS rows
  explicit TileRegisters(int low) {
    if constexpr (TILES<U>) {
      Configuration c;
      for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = uint8_t(i < low ? TILE_ROWS : 16);
      asm volatile("ldtilecfg %0" ::"m"(c) : "memory");
    }
  }
  ~TileRegisters() {
    if constexpr (TILES<U>) asm volatile("tilerelease" ::: "memory");
  }
#else
  explicit TileRegisters(int) {}
  ~TileRegisters() {}
#endif
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};
constexpr int LOW_REGISTERS = 3;  // registers of the products of product.h: 0 and 1 are sums, 2 is A; 3 and 4 are B; 5 is A, 6 and 7 are sums of outer_product

#if defined(__AMX_BF16__)
#define CSP_TILE_LOAD(register, from, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #register ::"r"(from), "r"(int64_t(stride)) : "memory")
#define CSP_TILE_STORE(register, to, stride) asm volatile("tilestored %%tmm" #register ", (%0,%1,1)" ::"r"(to), "r"(int64_t(stride)) : "memory")
#define CSP_TILE_ZERO(register) asm volatile("tilezero %%tmm" #register ::: "memory")
#define CSP_TILE_PRODUCT(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::: "memory")
#else  // never run
#define CSP_TILE_LOAD(register, from, stride) ((void)(from), (void)(stride))
#define CSP_TILE_STORE(register, to, stride) ((void)(to), (void)(stride))
#define CSP_TILE_ZERO(register) ((void)0)
#define CSP_TILE_PRODUCT(sum, a, b) ((void)0)
#endif

// sums[MR][NV] = (first ? 0 : sums) + A * B: product() of product.h on tiles.
template <class U, int NV> CSP_INLINE void tile_product(Acc<U>* sums, const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t blocks, bool first) {
  constexpr int L = 16, PITCH = NV * 64;
  if (first) {
    CSP_TILE_ZERO(0);
    if (NV > 1) CSP_TILE_ZERO(1);
  } else {
    CSP_TILE_LOAD(0, sums, PITCH);
    if (NV > 1) CSP_TILE_LOAD(1, sums + L, PITCH);
  }
  for (int64_t k = 0; k < blocks; k++, A += a_step, B += L * NV * L) {
    CSP_TILE_LOAD(2, A, 64);
    CSP_TILE_LOAD(3, B, PITCH);
    CSP_TILE_PRODUCT(0, 2, 3);
    if (NV == 1) continue;
    CSP_TILE_LOAD(4, B + L, PITCH);
    CSP_TILE_PRODUCT(1, 2, 4);
  }
  CSP_TILE_STORE(0, sums, PITCH);
  if (NV > 1) CSP_TILE_STORE(1, sums + L, PITCH);
}

// dW[16][NV * 16] += A^T B over n pairs of pixels, n a multiple of 16: outer_product() of product.h on tiles. A: [n / 16][row of dW][16
// pairs]; b0, b1: [n][16]. dW rows lie ldw apart.
template <class U, int NV> CSP_INLINE void tile_outer_product(const Unit<U>* A, const Unit<U>* b0, const Unit<U>* b1, int64_t n, Acc<U>* dW, int64_t ldw) {
  constexpr int L = 16;
  CSP_TILE_LOAD(6, dW, ldw * 4);
  if (NV > 1) CSP_TILE_LOAD(7, dW + L, ldw * 4);
  for (int64_t p = 0; p < n * L; p += L * L) {
    CSP_TILE_LOAD(5, A + p, 64);
    CSP_TILE_LOAD(3, b0 + p, 64);
    CSP_TILE_PRODUCT(6, 5, 3);
    if (NV == 1) continue;
    CSP_TILE_LOAD(4, b1 + p, 64);
    CSP_TILE_PRODUCT(7, 5, 4);
  }
  CSP_TILE_STORE(6, dW, ldw * 4);
  if (NV > 1) CSP_TILE_STORE(7, dW + L, ldw * 4);
}

// sums[Q][NV * 16] of a 3x3, Q a multiple of 32, all registers of 16 rows. rows: [position][depth], depth a multiple of 32; a tap reads
// dy * pitch + dx positions further on. W: [tap][depth / 32][16][NV * 16].
template <class U, int NV, class S> CSP_NOINLINE void tile_product3x3(const S* rows, int64_t depth, int64_t pitch, int64_t Q, const Unit<U>* W, Acc<U>* sums) {
  constexpr int L = 16, PITCH = NV * 64;
  for (int64_t q = 0; q < Q; q += 32, sums += 32 * NV * L) {
    CSP_TILE_ZERO(0);
    CSP_TILE_ZERO(2);
    if (NV > 1) {
      CSP_TILE_ZERO(1);
      CSP_TILE_ZERO(3);
    }
    const Unit<U>* B = W;
    for (int64_t tap = 0; tap < 9; tap++) {
      const S* a = rows + (q + tap / 3 * pitch + tap % 3) * depth;
      for (int64_t k = 0; k < depth; k += 32, B += L * NV * L) {
        CSP_TILE_LOAD(4, a + k, depth * 2);
        CSP_TILE_LOAD(6, B, PITCH);
        CSP_TILE_PRODUCT(0, 4, 6);
        CSP_TILE_LOAD(5, a + 16 * depth + k, depth * 2);
        CSP_TILE_PRODUCT(2, 5, 6);
        if (NV == 1) continue;
        CSP_TILE_LOAD(7, B + L, PITCH);
        CSP_TILE_PRODUCT(1, 4, 7);
        CSP_TILE_PRODUCT(3, 5, 7);
      }
    }
    CSP_TILE_STORE(0, sums, PITCH);
    CSP_TILE_STORE(2, sums + 16 * NV * L, PITCH);
    if (NV == 1) continue;
    CSP_TILE_STORE(1, sums + L, PITCH);
    CSP_TILE_STORE(3, sums + 16 * NV * L + L, PITCH);
  }
}

// dW[32][32] += A^T B over n pairs of pixels, n a multiple of 16, all registers of 16 rows. A: two of [n / 16][row of dW][16 pairs],
// a_step units apart; B: two of [n][16], b_step apart. dW rows lie ldw apart.
template <class U> CSP_NOINLINE void tile_outer_product3x3(const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t b_step, int64_t n, Acc<U>* dW, int64_t ldw) {
  constexpr int L = 16;
  CSP_TILE_LOAD(0, dW, ldw * 4);
  CSP_TILE_LOAD(1, dW + L, ldw * 4);
  CSP_TILE_LOAD(2, dW + L * ldw, ldw * 4);
  CSP_TILE_LOAD(3, dW + L * ldw + L, ldw * 4);
  for (int64_t p = 0; p < n * L; p += L * L) {
    CSP_TILE_LOAD(4, A + p, 64);
    CSP_TILE_LOAD(6, B + p, 64);
    CSP_TILE_PRODUCT(0, 4, 6);
    CSP_TILE_LOAD(7, B + b_step + p, 64);
    CSP_TILE_PRODUCT(1, 4, 7);
    CSP_TILE_LOAD(5, A + a_step + p, 64);
    CSP_TILE_PRODUCT(2, 5, 6);
    CSP_TILE_PRODUCT(3, 5, 7);
  }
  CSP_TILE_STORE(0, dW, ldw * 4);
  CSP_TILE_STORE(1, dW + L, ldw * 4);
  CSP_TILE_STORE(2, dW + L * ldw, ldw * 4);
  CSP_TILE_STORE(3, dW + L * ldw + L, ldw * 4);
}

// [16][16] units, their rows made columns, in place.
template <class U> CSP_INLINE void transpose_units(Unit<U>* block) {
  constexpr int L = LANES<Unit<U>>;
  Vec<Unit<U>> v[L];
  CSP_UNROLL(16) for (int i = 0; i < L; i++) v[i] = load(block + i * L);
  transpose(v);
  CSP_UNROLL(16) for (int i = 0; i < L; i++) store(block + i * L, v[i]);
}

}  // namespace csp::CSP_ISA
