// Activations and their derivatives on vectors.
#pragma once
#include <cmath>
#include "../call.h"
#include "vec.h"

namespace csp::CSP_ISA {

CSP_INLINE Vec<double> exponential(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < LANES<double>; i++) y[i] = std::exp(x[i]);
  return y;
}
// 2^n * e^r, r = x - n log 2, by a polynomial of degree 6: within 2 units in the last place; 0 and infinite beyond normal numbers.
CSP_INLINE Vec<float> exponential(Vec<float> x) {
  Vec<float> low = Vec<float>{} - 88.0f, high = Vec<float>{} + 89.0f, clamped = x < low ? low : x > high ? high : x;
  constexpr float MAGIC = 12582912.0f;  // adding it rounds to an integer
  Vec<float> n = (clamped * 1.44269504f + MAGIC) - MAGIC, r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f, p = p * r + 1.6666667e-1f, p = p * r + 0.5f, p = p * r * r + r + 1.0f;
  Vec<int32_t> bits = (__builtin_convertvector(n, Vec<int32_t>) + 127) << 23;
  return x != x ? x : p * Vec<float>(bits);
}

// value(x), and gradient(x, g) of x from that of the value; NaN and infinities as in torch, so 0 whatever g is where the value is
// constant.
template <class T> struct Identity {
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x; }
  CSP_INLINE Vec<T> gradient(Vec<T>, Vec<T> g) const { return g; }
};
template <class T> struct LeakyRelu {  // negative = 0: ReLU
  T negative;
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x <= 0 ? x * negative : x; }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const { return x > 0 ? g : g * negative; }
};
template <class T> struct Relu {
  CSP_INLINE Vec<T> value(Vec<T> x) const { return act<T>(x); }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const { return act_gradient<T>(x, g); }
};
CSP_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
// 1 / x of x >= 1: an estimate of 14 bits and a step of Newton's method, within 2 units in the last place, where division takes three
// times as long.
CSP_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> r = Vec<float>(_mm512_maskz_rcp14_ps(0xffff, (__m512)x)), largest = Vec<float>{} + 3.4e38f;
  return x > largest ? Vec<float>{} : r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
template <class T> CSP_INLINE Vec<T> sigmoid(Vec<T> x) { return reciprocal(T(1) + exponential(-x)); }
template <class T> struct Silu {
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x * sigmoid<T>(x); }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const { Vec<T> s = sigmoid<T>(x); return g * (s * (T(1) + x * (T(1) - s))); }
};
template <class T> struct Mish {  // x tanh(log(1 + e^x))
  static CSP_INLINE Vec<T> gate(Vec<T> x) {
    Vec<T> large = Vec<T>{} + T(20), e = exponential(x > large ? large : x), w = e * (e + T(2));
    return w / (w + T(2));
  }
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x * gate(x); }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const { Vec<T> t = gate(x); return g * (t + x * (T(1) - t * t) * sigmoid<T>(x)); }
};
template <class T> struct Hardswish {
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x * clamp(x + T(3)) * T(1.0 / 6); }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const {
    Vec<T> inside = g * (x * T(1.0 / 3) + T(0.5));
    return x <= -3 ? Vec<T>{} : x >= 3 ? g : inside;
  }
  static CSP_INLINE Vec<T> clamp(Vec<T> x) { Vec<T> six = Vec<T>{} + T(6); return x < 0 ? Vec<T>{} : x > 6 ? six : x; }
};
template <class T> struct Relu6 {
  CSP_INLINE Vec<T> value(Vec<T> x) const { return Hardswish<T>::clamp(x); }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const { return x > 0 ? x < 6 ? g : Vec<T>{} : Vec<T>{}; }  // of NaN too
};
// P(X <= -z) of a normal X for z >= 0; peak: e^(-z^2 / 2).
CSP_INLINE Vec<double> normal_tail(Vec<double> z, Vec<double>) {
  Vec<double> y{};
  for (int i = 0; i < LANES<double>; i++) y[i] = 0.5 * std::erfc(z[i] * M_SQRT1_2);
  return y;
}
// peak * t * polynomial of t = 1 / (1 + 0.35 z), fitted to a relative error of 3e-8 where peak is a normal number.
CSP_INLINE Vec<float> normal_tail(Vec<float> z, Vec<float> peak) {
  Vec<float> t = 1.0f / (1.0f + z * 0.35f), p = Vec<float>{} + -0.0291450983f;
  p = p * t + 0.143967551f, p = p * t - 0.25570546f, p = p * t + 0.159163826f, p = p * t - 0.0231024978f, p = p * t + 0.105504792f;
  p = p * t + 0.119833711f, p = p * t + 0.139861749f, p = p * t + 0.139621412f;
  return peak * (p * t);
}
template <class T> struct Gelu {  // x P(X <= x)
  struct Normal { Vec<T> below, peak; };
  static CSP_INLINE Normal normal(Vec<T> x) {
    Vec<T> z = x < 0 ? -x : x, peak = exponential(z * z * T(-0.5)), tail = normal_tail(z, peak);
    return {x < 0 ? tail : T(1) - tail, peak};
  }
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x * normal(x).below; }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const {
    Normal n = normal(x);
    return g * (n.below + x * n.peak * T(0.3989422804014327));  // 1 / sqrt(2 pi)
  }
};
template <class T> struct GeluTanh {  // x / 2 (1 + tanh(u / 2)), u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
  static constexpr T LINEAR = T(1.5957691216057308), CUBIC = T(1.5957691216057308 * 0.044715);
  struct Gate { Vec<T> value, slope; };  // s(u) and s(u) (1 - s(u)) of the sigmoid s, without a difference of near numbers
  static CSP_INLINE Gate gate(Vec<T> x) {
    Vec<T> u = x * (LINEAR + CUBIC * x * x), e = exponential(x < 0 ? u : -u), r = T(1) / (T(1) + e);
    return {x < 0 ? e * r : r, e * r * r};
  }
  CSP_INLINE Vec<T> value(Vec<T> x) const { return x * gate(x).value; }
  CSP_INLINE Vec<T> gradient(Vec<T> x, Vec<T> g) const {
    Gate s = gate(x);
    return g * (s.value + x * s.slope * (LINEAR + T(3) * CUBIC * x * x));
  }
};

template <class T, class F> inline void with_activation(Activation kind, double negative, F f) {
  switch (kind) {
    case Activation::Identity: f(Identity<T>{}); break;
    case Activation::Relu: f(Relu<T>{}); break;
    case Activation::LeakyRelu: f(LeakyRelu<T>{T(negative)}); break;
    case Activation::Silu: f(Silu<T>{}); break;
    case Activation::Mish: f(Mish<T>{}); break;
    case Activation::Hardswish: f(Hardswish<T>{}); break;
    case Activation::Relu6: f(Relu6<T>{}); break;
    case Activation::Gelu: f(Gelu<T>{}); break;
    case Activation::GeluTanh: f(GeluTanh<T>{}); break;
  }
}

}  // namespace csp::CSP_ISA
