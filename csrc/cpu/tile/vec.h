// Vectors of one instruction set and the storage types they load from. Everything here is compiled once per instruction
// set inside namespace csp::CSP_ISA, so that no symbol of one set can stand in for another's.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CSP_INLINE inline __attribute__((always_inline))
#define CSP_NOINLINE __attribute__((noinline))
#define CSP_PRAGMA(x) _Pragma(#x)
#define CSP_UNROLL(n) CSP_PRAGMA(GCC unroll n)

namespace csp::CSP_ISA {

// REGISTER_ROWS x 2 vectors of sums fit into the registers, FEW_REGISTER_ROWS x 2 where fewer are left.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int REGISTER_ROWS = 14;
constexpr int FEW_REGISTER_ROWS = 8;
constexpr int WGRAD_ROWS = 8;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int REGISTER_ROWS = 6;
constexpr int FEW_REGISTER_ROWS = 4;
constexpr int WGRAD_ROWS = 4;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int REGISTER_ROWS = 6;
constexpr int FEW_REGISTER_ROWS = 4;
constexpr int WGRAD_ROWS = 4;
#endif
#if defined(__AMX_BF16__)
constexpr int TILE_ROWS = 32;  // of two tile registers
constexpr int FEW_ROWS = TILE_ROWS;
#else
constexpr int TILE_ROWS = REGISTER_ROWS;
constexpr int FEW_ROWS = FEW_REGISTER_ROWS;
#endif

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <class T> struct VecOf { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vec = typename VecOf<T>::type;
template <class T> struct LooseOf { typedef T type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias)); };
template <class T> using Loose = typename LooseOf<T>::type;
template <class T> constexpr int LANES = VECTOR_BYTES / int(sizeof(T));
typedef uint16_t U16 __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

CSP_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CSP_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
CSP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CSP_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ReLU as torch has it: NaN passes through.
template <class T> CSP_INLINE Vec<T> act(Vec<T> x) { return x <= 0 ? Vec<T>{} : x; }
// The gradient g where ReLU of x passes it, and where x is NaN, as in torch.
template <class T> CSP_INLINE Vec<T> act_gradient(Vec<T> x, Vec<T> g) { return x <= 0 ? Vec<T>{} : g; }
// What products apply to what they load, behind a norm: the larger of x and `number` (0: ReLU, minus infinity: nothing), or
// leaky ReLU whose slope for negative x is `number`.
template <class T> struct OnLoad {
  T number = 0;
  bool leaky = false;
};
template <bool LEAKY, class T> CSP_INLINE Vec<T> on_load(Vec<T> x, Vec<T> number) {
  if constexpr (LEAKY) return x <= 0 ? x * number : x;
  else return x <= number ? number : x;
}
template <bool LEAKY, class T> CSP_INLINE Vec<T> on_load_gradient(Vec<T> x, Vec<T> g, Vec<T> number) {
  if constexpr (LEAKY) return x > 0 ? g : g * number;
  else return x <= number ? Vec<T>{} : g;
}

// ---- scalar conversions
CSP_INLINE float widen(BFloat16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; memcpy(&f, &u, 4); return f; }
CSP_INLINE float widen(float x) { return x; }
CSP_INLINE double widen(double x) { return x; }
CSP_INLINE float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, u;
  if (rest >= 0x7c00) u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) u = sign | ((rest << 13) + (112u << 23));
  else { float f = float(rest) * 5.9604644775390625e-8f; memcpy(&u, &f, 4); u |= sign; }
  float f; memcpy(&f, &u, 4); return f;
#endif
}
CSP_INLINE void narrow(float x, float* p) { *p = x; }
CSP_INLINE void narrow(double x, double* p) { *p = x; }
CSP_INLINE void narrow(float x, BFloat16* p) {
  uint32_t u; memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
CSP_INLINE void narrow(float x, Half* p) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, 0);
#else
  uint32_t u; memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) { p->bits = uint16_t(sign | 0x7e00); return; }
  if (rest >= 0x477ff000) { p->bits = uint16_t(sign | 0x7c00); return; }
  if (rest < 0x38800000) {  // subnormal: let the float adder round
    float f; memcpy(&f, &rest, 4); f += 0.5f; uint32_t v; memcpy(&v, &f, 4);
    p->bits = uint16_t(sign | (v - 0x3f000000)); return;
  }
  p->bits = uint16_t(sign | ((rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13));
#endif
}

// ---- whole vectors
CSP_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const Loose<float>*>(p); }
CSP_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const Loose<double>*>(p); }
CSP_INLINE Vec<uint32_t> load(const uint32_t* p) { return *reinterpret_cast<const Loose<uint32_t>*>(p); }
CSP_INLINE void store(float* p, Vec<float> x) { *reinterpret_cast<Loose<float>*>(p) = x; }
CSP_INLINE void store(double* p, Vec<double> x) { *reinterpret_cast<Loose<double>*>(p) = x; }
CSP_INLINE void store(uint32_t* p, Vec<uint32_t> x) { *reinterpret_cast<Loose<uint32_t>*>(p) = x; }
CSP_INLINE Vec<float> load(const BFloat16* p) {
  Vec<uint32_t> u = __builtin_convertvector(*reinterpret_cast<const U16*>(p), Vec<uint32_t>) << 16;
  return Vec<float>(u);
}
CSP_INLINE Vec<uint32_t> bf16_bits(Vec<float> x) {  // in the low half of each lane, round to nearest even
  Vec<uint32_t> u = Vec<uint32_t>(x);
  Vec<uint32_t> r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return x != x ? Vec<uint32_t>{} + 0x7fc0u : r;
}
CSP_INLINE void store(BFloat16* p, Vec<float> x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  *reinterpret_cast<U16*>(p) = __builtin_convertvector(bf16_bits(x), U16);
#endif
}
CSP_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> x; for (int i = 0; i < LANES<float>; i++) x[i] = widen(p[i]); return x;
#endif
}
CSP_INLINE void store(Half* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, __m512(x), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(x), 0));
#else
  for (int i = 0; i < LANES<float>; i++) narrow(x[i], p + i);
#endif
}

// ---- the first n lanes (n may be <= 0 or >= LANES); the rest is zero or left untouched
template <class S> CSP_INLINE auto load_partial(const S* p, int64_t n) {
  using T = decltype(widen(S{}));
  Vec<T> x{};
#if defined(__AVX512F__)
  if (n <= 0) return x;
  if constexpr (sizeof(S) == 4) x = Vec<T>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  else if constexpr (sizeof(S) == 8) x = Vec<T>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
  else {
    alignas(32) S tmp[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(tmp), _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
    x = load(tmp);
  }
#else
  for (int64_t i = 0; i < n; i++) x[i] = widen(p[i]);
#endif
  return x;
}
template <class S, class V> CSP_INLINE void store_partial(S* p, V x, int64_t n) {
#if defined(__AVX512F__)
  if (n <= 0) return;
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
  else if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x);
  else {
    alignas(32) S tmp[16];
    store(tmp, x);
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm256_load_si256(reinterpret_cast<__m256i*>(tmp)));
  }
#else
  for (int64_t i = 0; i < n; i++) narrow(x[i], p + i);
#endif
}
template <class S> CSP_INLINE auto load(const S* p, int64_t n) {
  return n >= LANES<decltype(widen(S{}))> ? load(p) : load_partial(p, n);
}
// The same without a branch where masks cost nothing, for loops over pixels.
template <class S> CSP_INLINE auto load_masked(const S* p, int64_t n) {
#if defined(__AVX512F__)
  using T = decltype(widen(S{}));
  constexpr int64_t L = LANES<T>;
  const uint32_t mask = uint32_t((uint64_t(1) << min64(L, max64(0, n))) - 1);
  if constexpr (sizeof(S) == 4) return Vec<T>(_mm512_maskz_loadu_ps(__mmask16(mask), p));
  else if constexpr (sizeof(S) == 8) return Vec<T>(_mm512_maskz_loadu_pd(__mmask8(mask), p));
  else {
    const __m256i half = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
    if constexpr (std::is_same_v<S, Half>) return Vec<T>(_mm512_maskz_cvtph_ps(0xffff, half));
    else return Vec<T>(__builtin_convertvector((U16)half, Vec<uint32_t>) << 16);
  }
#else
  return load(p, n);
#endif
}
template <class S, class V> CSP_INLINE void store(S* p, V x, int64_t n) {
  if (n >= LANES<decltype(widen(S{}))>) store(p, x); else store_partial(p, x, n);
}

template <class S, class V> CSP_INLINE void store_masked(S* p, V x, int64_t n) {
#if defined(__AVX512F__)
  constexpr int64_t L = LANES<decltype(widen(S{}))>;
  const uint32_t mask = uint32_t((uint64_t(1) << min64(L, max64(0, n))) - 1);
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)x);
  else if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)x);
#endif
  store(p, x, n);
}

// ---- transposition: each round moves the top bit of the row into the lane, and that of the lane into the row
template <int HALF, class V, int... I> CSP_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (HALF * L / 2 + I / 2 + I % 2 * L)...);
#else  // GCC before 12
  return __builtin_shuffle(a, b, decltype(a < b){(HALF * L / 2 + I / 2 + I % 2 * L)...});
#endif
}
template <class V, int L> CSP_INLINE void transpose(V (&v)[L]) {
  constexpr std::make_integer_sequence<int, L> lanes{};
  CSP_UNROLL(4) for (int round = 1; round < L; round *= 2) {
    V t[L];
    CSP_UNROLL(8) for (int i = 0; i < L / 2; i++)
      t[2 * i] = interleave<0>(v[i], v[i + L / 2], lanes), t[2 * i + 1] = interleave<1>(v[i], v[i + L / 2], lanes);
    CSP_UNROLL(16) for (int i = 0; i < L; i++) v[i] = t[i];
  }
}
// Where it is to be said how a vector is stored: as usual.
template <class T> constexpr auto store_vector = [](T* p, Vec<T> x) __attribute__((always_inline)) { store(p, x); };

// out[i * step + lane] = row(lane, whole)[i]; whole says whether all rows can be read as whole vectors.
template <class T, class Row, class Store> CSP_INLINE void store_transposed(T* out, int64_t step, bool whole, Row row, const Store& store_row) {
  constexpr int L = LANES<T>;
  Vec<T> v[L];
  if (whole) CSP_UNROLL(16) for (int i = 0; i < L; i++) v[i] = row(i, true);
  else for (int i = 0; i < L; i++) v[i] = row(i, false);
  transpose(v);
  CSP_UNROLL(16) for (int i = 0; i < L; i++) store_row(out + i * step, v[i]);
}
template <class T, class Row> CSP_INLINE void store_transposed(T* out, int64_t step, bool whole, Row row) {
  store_transposed(out, step, whole, row, store_vector<T>);
}

#if defined(__AVX512F__)
template <class T, class V> CSP_INLINE void store_past_caches(T* p, V x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x); }
#endif
// Stores vectors from `memory` on that another core has had or is going to read: to write a line that another one has read, a core of
// AMD's Zen 4 waits until that one has given it up, 9 GB/s, and 2 GB/s where the two have not the same third-level cache. There such
// stores go past the caches, at 25 GB/s. Intel's processors were not compared. wanted: whether at all.
class StreamedStore {
 public:
  explicit StreamedStore([[maybe_unused]] const void* memory, [[maybe_unused]] bool wanted = true)
#if defined(__AVX512F__)
      : past_caches_(wanted && __builtin_cpu_is("amd") && reinterpret_cast<uintptr_t>(memory) % 64 == 0)
#endif
  {}
  StreamedStore(const StreamedStore&) = delete;
  StreamedStore& operator=(const StreamedStore&) = delete;
#if defined(__AVX512F__)
  ~StreamedStore() {
    if (past_caches_) _mm_sfence();
  }
  bool past_caches() const { return past_caches_; }
  template <class V, class T> CSP_INLINE void operator()(T* p, V x) const {
    if (past_caches_) store_past_caches(p, x);
    else store(p, x);
  }

 private:
  const bool past_caches_;
#else
  static constexpr bool past_caches() { return false; }
  template <class V, class T> CSP_INLINE void operator()(T* p, V x) const { store(p, x); }
#endif
};

}  // namespace csp::CSP_ISA
