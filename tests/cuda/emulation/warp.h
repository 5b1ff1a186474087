// What the lanes of a warp do together: shuffles, ldmatrix, mma.sync; and how many wavefronts shared memory needs for it.
#pragma once
#include "block.h"

namespace emulation {

// Instructions of warps, and what they move.
struct Counters {
  int64_t mma, shuffles;
  int64_t matrices, matrix_wavefronts;            // of ldmatrix: eight rows of 16 bytes, one wavefront at best
  int64_t shared_loads, shared_load_wavefronts;   // of 16 bytes a lane: four wavefronts at best
  int64_t shared_stores, shared_store_wavefronts;
  int64_t global_load_bytes, global_store_bytes, copy_bytes;
  int64_t narrow_loads, narrow_wavefronts;  // of 4 or 8 bytes a lane: wavefronts at best, and needed
};
inline Counters counters;
EMULATION_INTERNAL inline void add(int64_t Counters::*counter, int64_t n) { counters.*counter += n; }

inline constexpr uint32_t NO_ADDRESS = ~0u;

// Shows n words to the warp; returns what its 32 lanes show. All must do the same thing.
EMULATION_INTERNAL inline Slot* exchange(int operation, const uint32_t* words, int n) {
  Thread& thread = self();
  Slot* slots = block->slots[thread.exchanges & 1];
  Slot& own = slots[running];
  own.operation = operation, own.exchange = ++thread.exchanges;
  for (int i = 0; i < n; i++) own.words[i] = words[i];
  unsigned expected = thread.exchanges;
  yield(Wait::Warp);
  Slot* warp = slots + running / 32 * 32;
  for (int i = 0; i < 32; i++)
    if (warp[i].operation != operation || warp[i].exchange != expected) fail("the lanes of a warp differ in what they do together");
  return warp;
}

inline int lane() { return running % 32; }

// Of n accesses at once, each of so many words: the most words that one bank has to give.
EMULATION_INTERNAL inline int wavefronts(const Slot* slots, int n, uint32_t words = 4) {
  uint32_t seen[32][32];
  int used[32] = {}, most = 0;
  for (int i = 0; i < n; i++)
    for (uint32_t w = 0; w < words && slots[i].words[0] != NO_ADDRESS; w++) {
      uint32_t word = slots[i].words[0] / 4 + w, bank = word % 32;
      int k = 0;
      while (k < used[bank] && seen[bank][k] != word) k++;
      if (k == used[bank]) seen[bank][used[bank]++] = word;
      if (used[bank] > most) most = used[bank];
    }
  return most;
}

EMULATION_INTERNAL inline void count_wavefronts(const Slot* warp, int groups, int64_t Counters::*total) {
  if (lane()) return;
  for (int g = 0; g < groups; g++) counters.*total += wavefronts(warp + 8 * g, 8);
}

EMULATION_INTERNAL inline void count_narrow_wavefronts(const Slot* warp, int words) {
  if (lane()) return;
  for (int g = 0; g < words; g++) counters.narrow_wavefronts += wavefronts(warp + 32 / words * g, 32 / words, uint32_t(words));
}

// Once a warp.
EMULATION_INTERNAL inline void count(int64_t Counters::*counter, int64_t n) {
  if (!lane()) counters.*counter += n;
}

EMULATION_INTERNAL inline uint32_t word(const Slot* warp, int lane, int i) { return warp[lane].words[i]; }

inline void check_shared(uint32_t address, size_t bytes) {
  if (address % bytes) fail("misaligned address in shared memory");
  if (address + bytes > block->shared_bytes) fail("address outside shared memory");
}

enum Operation : int { Shuffle = 1, LoadMatrix, LoadMatrixTransposed, Multiply, SharedLoad, SharedStore };

template <class T> T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  Slot* warp = exchange(Shuffle, &bits, 1);
  count(&Counters::shuffles, 1);
  bits = word(warp, lane() ^ mask, 0);
  memcpy(&value, &bits, 4);
  return value;
}

// N 8x8 matrices of 16-bit elements; lane 8m + r holds the address of row r of matrix m.
template <int N, bool TRANSPOSED> void ldmatrix(uint32_t* to, uint32_t address) {
  if (lane() < 8 * N) check_shared(address, 16);
  Slot* warp = exchange(TRANSPOSED ? LoadMatrixTransposed : LoadMatrix, &address, 1);
  count(&Counters::matrices, N);
  count_wavefronts(warp, N, &Counters::matrix_wavefronts);
  int row = lane() / 4, column = lane() % 4 * 2;
  const unsigned char* shared = shared_memory();
  for (int m = 0; m < N; m++) {
    if constexpr (TRANSPOSED) {
      uint16_t low, high;
      memcpy(&low, shared + word(warp, 8 * m + column, 0) + 2 * row, 2);
      memcpy(&high, shared + word(warp, 8 * m + column + 1, 0) + 2 * row, 2);
      to[m] = low | uint32_t(high) << 16;
    } else {
      memcpy(&to[m], shared + word(warp, 8 * m + row, 0) + 2 * column, 4);
    }
  }
}

// d [16, 8] += a [16, 16] b [16, 8] in float32; widen turns two packed elements into two floats.
template <class Widen> void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen) {
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Slot* warp = exchange(Multiply, words, 6);
  count(&Counters::mma, 1);
  int row = lane() / 4, column = lane() % 4 * 2;
  float sums[4] = {};
  for (int half = 0; half < 2; half++)  // of the 16 that are summed
    for (int t = 0; t < 4; t++) {
      auto x0 = widen(word(warp, 4 * row + t, 2 * half)), x1 = widen(word(warp, 4 * row + t, 2 * half + 1));
      auto y0 = widen(word(warp, 4 * column + t, 4 + half)), y1 = widen(word(warp, 4 * (column + 1) + t, 4 + half));
      sums[0] += x0.x * y0.x + x0.y * y0.y, sums[1] += x0.x * y1.x + x0.y * y1.y;
      sums[2] += x1.x * y0.x + x1.y * y0.y, sums[3] += x1.x * y1.x + x1.y * y1.y;
    }
  for (int i = 0; i < 4; i++) d[i] += sums[i];
}

// d [16, 8] += a [16, 8] b [8, 8] in float32; the low 13 bits of what is multiplied are not seen.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Slot* warp = exchange(Multiply, words, 6);
  count(&Counters::mma, 1);
  auto value = [warp](int lane, int i) {
    const uint32_t bits = word(warp, lane, i) & ~0x1fffu;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  const int row = lane() / 4, column = lane() % 4 * 2;
  float sums[4] = {};
  for (int k = 0; k < 8; k++)
    for (int i = 0; i < 4; i++)  // rows 8 apart, neighbouring columns
      sums[i] += value(4 * row + k % 4, k / 4 * 2 + i / 2) * value(4 * (column + i % 2) + k % 4, 4 + k / 4);
  for (int i = 0; i < 4; i++) d[i] += sums[i];
}

}  // namespace emulation
