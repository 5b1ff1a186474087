// The device primitives of csrc/cuda/device/ptx.cuh on the host: what the kernels are tested with where there is no GPU.
//
// Seen: wrong results; addresses outside shared memory or misaligned; barriers and warp operations that not all reach; data of cp.async
// used before its wait (it arrives no earlier, until then there is NaN); registers of a load that was off (NaN). ASan adds global
// addresses, TSan missing barriers. Not seen: the order of sums within mma.sync, other blocks at the same time, time.
#pragma once
#include <cmath>
#include "warp.h"

#define DEVICE inline
#define HOST_DEVICE

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace csp::cuda {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, A... arguments) {
  emulation::launch(kernel, grid, threads, shared_bytes, arguments...);
  return cudaSuccess;
}

DEVICE uint32_t shared_base() { return 0; }
DEVICE void barrier() { emulation::barrier(); }
DEVICE int opaque(int x) { return x; }
template <class T> DEVICE T shuffle_xor(T value, int mask) { return emulation::shuffle_xor(value, mask); }

template <class T> struct Element;
template <> struct Element<Half> {
  static float widen(uint16_t bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return float(x);
  }
  static uint16_t narrow(float value) {
    _Float16 x = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &x, 2);
    return bits;
  }
};
template <> struct Element<BFloat16> {
  static float widen(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
  static uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
};
template <class T> DEVICE float2 unpack(uint32_t two) {
  return {Element<T>::widen(uint16_t(two)), Element<T>::widen(uint16_t(two >> 16))};
}
template <class T> DEVICE uint32_t pack(float low, float high) {
  return Element<T>::narrow(low) | uint32_t(Element<T>::narrow(high)) << 16;
}
template <class T> DEVICE uint32_t pack_relu(float low, float high) { return pack<T>(low < 0 ? 0 : low, high < 0 ? 0 : high); }

template <class T> DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(d, a, b0, b1, unpack<T>);
}
DEVICE float to_tf32(float x) {  // half away from zero
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & ~0x1fffu;
  memcpy(&x, &bits, 4);
  return x;
}
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emulation::mma_tf32(d, a, b0, b1); }
DEVICE void ldmatrix(uint32_t (&to)[4], uint32_t address) { emulation::ldmatrix<4, false>(to, address); }
DEVICE void ldmatrix_transposed(uint32_t (&to)[4], uint32_t address) { emulation::ldmatrix<4, true>(to, address); }
DEVICE void ldmatrix_transposed(uint32_t (&to)[2], uint32_t address) { emulation::ldmatrix<2, true>(to, address); }

// Shared memory, 16 bytes a lane: all lanes of the warp take part.
DEVICE uint4 load_shared16(uint32_t address) {
  using namespace emulation;
  check_shared(address, 16);
  Slot* warp = exchange(SharedLoad, &address, 1);
  count(&Counters::shared_loads, 1);
  count_wavefronts(warp, 4, &Counters::shared_load_wavefronts);
  uint4 value;
  memcpy(&value, shared_memory() + address, 16);
  return value;
}
template <int WORDS> DEVICE void load_shared_words(uint32_t (&v)[WORDS], uint32_t address) {
  using namespace emulation;
  check_shared(address, 4 * WORDS);
  Slot* warp = exchange(SharedLoad, &address, 1);
  count(&Counters::narrow_loads, WORDS);
  count_narrow_wavefronts(warp, WORDS);
  memcpy(v, shared_memory() + address, 4 * WORDS);
}
DEVICE void store_shared16(bool on, uint32_t address, uint4 value) {
  using namespace emulation;
  if (on) check_shared(address, 16);
  else address = NO_ADDRESS;
  Slot* warp = exchange(SharedStore, &address, 1);
  count(&Counters::shared_stores, 1);
  count_wavefronts(warp, 4, &Counters::shared_store_wavefronts);
  if (on) memcpy(shared_memory() + address, &value, 16);
}
DEVICE void store_shared16_or_zero(bool nonzero, uint32_t address, uint4 value) {
  store_shared16(true, address, nonzero ? value : uint4{0, 0, 0, 0});
}
template <class T> DEVICE T load_shared(uint32_t address) {
  emulation::check_shared(address, sizeof(T));
  T value;
  memcpy(&value, emulation::shared_memory() + address, sizeof(T));
  return value;
}
template <class T> DEVICE void store_shared(uint32_t address, T value) {
  emulation::check_shared(address, sizeof(T));
  memcpy(emulation::shared_memory() + address, &value, sizeof(T));
}
template <class T> DEVICE T load_shared4(uint32_t address) { return load_shared<T>(address); }
template <class T> DEVICE void store_shared4(uint32_t address, T value) { store_shared(address, value); }
DEVICE double load_shared8(uint32_t address) { return load_shared<double>(address); }
DEVICE void store_shared8(uint32_t address, double value) { store_shared(address, value); }

inline void check_global(const void* address, size_t bytes) {
  if (uintptr_t(address) % bytes) emulation::fail("misaligned address in global memory");
}
DEVICE void load16(bool on, uint4& value, const void* address) {
  memset(&value, 0xff, 16);  // undefined on the device
  if (!on) return;
  check_global(address, 16);
  emulation::add(&emulation::Counters::global_load_bytes, 16);
  memcpy(&value, address, 16);
}
template <int WORDS> DEVICE void store_words(bool on, void* address, const uint32_t (&words)[WORDS]) {
  if (!on) return;
  check_global(address, WORDS == 4 ? 16 : WORDS == 2 ? 8 : 4);
  emulation::add(&emulation::Counters::global_store_bytes, 4 * WORDS);
  memcpy(address, words, 4 * WORDS);
}

EMULATION_INTERNAL inline bool take_copy(unsigned allowed_groups, emulation::Copy& copy) {
  emulation::Thread& thread = emulation::self();
  if (thread.copies_begin == thread.copies_end) return false;
  copy = thread.copies[thread.copies_begin % 256];
  if (copy.group + allowed_groups >= thread.group) return false;
  thread.copies_begin++;
  return true;
}
EMULATION_INTERNAL inline void put_copy(uint32_t to, const void* from) {
  emulation::Thread& thread = emulation::self();
  thread.copies[thread.copies_end++ % 256] = {to, from, thread.group};
  if (thread.copies_end - thread.copies_begin > 256) emulation::fail("more copies in flight than the emulation holds");
}
EMULATION_INTERNAL inline void close_group() { emulation::self().group++; }
DEVICE void copy16(bool on, uint32_t to, const void* from) {
  if (!on) return;
  emulation::check_shared(to, 16);
  check_global(from, 16);
  emulation::add(&emulation::Counters::copy_bytes, 16);
  put_copy(to, from);
  memset(emulation::shared_memory() + to, 0xff, 16);
}
DEVICE void commit_copies() { close_group(); }
template <int GROUPS> DEVICE void wait_copies() {  // until at most GROUPS are in flight
  for (emulation::Copy copy; take_copy(GROUPS, copy);) memcpy(emulation::shared_memory() + copy.to, copy.from, 16);
}

}  // namespace csp::cuda
