// Device primitives: PTX, or with CSP_EMULATION defined the same functions on the host (tests/cuda/emulation). An address in shared
// memory is a number of bytes. Predicated forms are free of branches. Tensor cores multiply 16-bit elements into float32.
#pragma once
#include <cstdint>
#include <type_traits>

namespace csp::cuda {
struct Half {};  // types of elements; their bits travel as integers, two to a word
struct BFloat16 {};
}  // namespace csp::cuda

#ifdef CSP_EMULATION
#include "emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__

namespace csp::cuda {

// The error, which is also taken from where the next launch would find it.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}
// Lets a kernel have all the shared memory that a block may: one value for all callers, since it stays with the kernel and another
// thread may launch it with another size.
inline cudaError_t allow_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return taken(error);
}
// Of kernels with dynamic shared memory only.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  if (shared_bytes > 48 * 1024) {  // what every kernel may have
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared_memory));
}
DEVICE void barrier() { __syncthreads(); }
// The compiler cannot know what it is: keeps what depends on it from being moved out of a loop, where it would take registers.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class T> DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

template <class T> DEVICE float2 unpack(uint32_t two) {
  if constexpr (std::is_same_v<T, BFloat16>) return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
  else return __half22float2(*reinterpret_cast<__half2*>(&two));
}
template <class T> DEVICE uint32_t pack(float low, float high) {
  uint32_t two;
  if constexpr (std::is_same_v<T, BFloat16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
template <class T> DEVICE uint32_t pack_relu(float low, float high) {  // keeps NaN
  uint32_t two;
  if constexpr (std::is_same_v<T, BFloat16>) asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  else asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// d [16, 8] += a [16, 16] b [16, 8].
template <class T> DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define CSP_MMA(TYPE)                                                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                             \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, BFloat16>) CSP_MMA("bf16");
  else CSP_MMA("f16");
#undef CSP_MMA
}

// d [16, 8] += a [16, 8] b [8, 8] of values that to_tf32 has rounded.
DEVICE float to_tf32(float x) {  // half away from zero
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 8x8 matrices; lane 8m + r holds the address of row r of matrix m.
DEVICE void ldmatrix(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_transposed(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
}

// Shared memory, 16 bytes a lane: all lanes of the warp take part.
DEVICE uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}
// Of one or two words a lane.
template <int WORDS> DEVICE void load_shared_words(uint32_t (&v)[WORDS], uint32_t address) {
  static_assert(WORDS == 1 || WORDS == 2);
  if constexpr (WORDS == 2) asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
  else asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v[0]) : "r"(address) : "memory");
}
DEVICE void store_shared16(bool on, uint32_t address, uint4 v) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %5, 0; @q st.shared.v4.b32 [%0], {%1, %2, %3, %4};}" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w), "r"(int(on))
               : "memory");
}
DEVICE void store_shared16_or_zero(bool nonzero, uint32_t address, uint4 v) {
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %5, 0; @q st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
      " @!q st.shared.v4.b32 [%0], {%6, %6, %6, %6};}" ::"r"(address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(nonzero)), "r"(0)
      : "memory");
}
template <class T> DEVICE T load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return *reinterpret_cast<T*>(&v);
}
template <class T> DEVICE void store_shared4(uint32_t address, T value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(*reinterpret_cast<uint32_t*>(&value)) : "memory");
}
DEVICE double load_shared8(uint32_t address) {
  double v;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(v) : "r"(address) : "memory");
  return v;
}
DEVICE void store_shared8(uint32_t address, double value) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(address), "d"(value) : "memory");
}

// Global memory. What a load that is off returns is undefined.
DEVICE void load16(bool on, uint4& v, const void* address) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %5, 0; @q ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address), "r"(int(on)));
}
template <int WORDS> DEVICE void store_words(bool on, void* address, const uint32_t (&words)[WORDS]) {
  if constexpr (WORDS == 4)
    asm volatile("{.reg .pred q; setp.ne.s32 q, %5, 0; @q st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(int(on))
                 : "memory");
  else if constexpr (WORDS == 2)
    asm volatile("{.reg .pred q; setp.ne.s32 q, %3, 0; @q st.global.v2.b32 [%0], {%1, %2};}" ::"l"(address), "r"(words[0]),
                 "r"(words[1]), "r"(int(on))
                 : "memory");
  else
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q st.global.b32 [%0], %1;}" ::"l"(static_cast<uint32_t*>(address) + i),
                   "r"(words[i]), "r"(int(on))
                   : "memory");
}

// Copies from global to shared memory that go on beside the computation, in groups.
DEVICE void copy16(bool on, uint32_t to, const void* from) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to), "l"(from), "r"(int(on))
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS> DEVICE void wait_copies() {  // until at most GROUPS are in flight
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

}  // namespace csp::cuda
#endif
