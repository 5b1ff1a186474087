// The one-dimensional transforms of Winograd's F(M x M, 3 x 3), M = 2 or 4 (Lavin & Gray, arXiv 1509.09308).
#pragma once
#include "vec.h"

namespace csp::CSP_ISA {

// o[M+2] = B^T d
template <class T, int M> CSP_INLINE void input_transform(const Vec<T>* d, Vec<T>* o) {
  if constexpr (M == 2) {
    o[0] = d[0] - d[2], o[1] = d[1] + d[2], o[2] = d[2] - d[1], o[3] = d[1] - d[3];
  } else {
    Vec<T> a = d[4] - d[2] * T(4), b = d[3] - d[1] * T(4), c = d[4] - d[2], e = (d[3] - d[1]) * T(2);
    o[0] = d[0] * T(4) - d[2] * T(5) + d[4];
    o[1] = a + b, o[2] = a - b, o[3] = c + e, o[4] = c - e;
    o[5] = d[1] * T(4) - d[3] * T(5) + d[5];
  }
}

// o[M] = A^T d
template <class T, int M> CSP_INLINE void output_transform(const Vec<T>* d, Vec<T>* o) {
  if constexpr (M == 2) {
    o[0] = d[0] + d[1] + d[2], o[1] = d[1] - d[2] - d[3];
  } else {
    Vec<T> a = d[1] + d[2], b = d[1] - d[2], c = d[3] + d[4], e = d[3] - d[4];
    o[0] = d[0] + a + c, o[1] = b + e * T(2), o[2] = a + c * T(4), o[3] = b + e * T(8) + d[5];
  }
}

// o[M+2] = A y: the transpose of output_transform
template <class T, int M> CSP_INLINE void gradient_transform(const Vec<T>* y, Vec<T>* o) {
  if constexpr (M == 2) {
    o[0] = y[0], o[1] = y[0] + y[1], o[2] = y[0] - y[1], o[3] = -y[1];
  } else {
    Vec<T> p = y[0] + y[2], q = y[1] + y[3], r = y[0] + y[2] * T(4), s = y[1] * T(2) + y[3] * T(8);
    o[0] = y[0], o[1] = p + q, o[2] = p - q, o[3] = r + s, o[4] = r - s, o[5] = y[3];
  }
}

// o[M+2] = G w
template <class T, int M> CSP_INLINE void weight_transform(Vec<T> w0, Vec<T> w1, Vec<T> w2, Vec<T>* o) {
  if constexpr (M == 2) {
    Vec<T> s = (w0 + w2) * T(0.5), h = w1 * T(0.5);
    o[0] = w0, o[1] = s + h, o[2] = s - h, o[3] = w2;
  } else {
    Vec<T> s = (w0 + w2) * T(-1.0 / 6), h = w1 * T(1.0 / 6), u = w0 * T(1.0 / 24) + w2 * T(1.0 / 6), v = w1 * T(1.0 / 12);
    o[0] = w0 * T(0.25), o[1] = s - h, o[2] = s + h, o[3] = u + v, o[4] = u - v, o[5] = w2;
  }
}

// o[3] = G^T u: the transpose of weight_transform
template <class T, int M> CSP_INLINE void weight_gradient_transform(const Vec<T>* u, Vec<T>* o) {
  if constexpr (M == 2) {
    Vec<T> s = (u[1] + u[2]) * T(0.5);
    o[0] = u[0] + s, o[1] = (u[1] - u[2]) * T(0.5), o[2] = u[3] + s;
  } else {
    Vec<T> s = (u[1] + u[2]) * T(-1.0 / 6), t = u[3] + u[4];
    o[0] = u[0] * T(0.25) + s + t * T(1.0 / 24);
    o[1] = (u[2] - u[1]) * T(1.0 / 6) + (u[3] - u[4]) * T(1.0 / 12);
    o[2] = u[5] + s + t * T(1.0 / 6);
  }
}

}  // namespace csp::CSP_ISA
