// Batch norms: their statistics as load-time affines.
#pragma once
#include <cmath>
#include "affine.h"

namespace csp::CSP_ISA {

// Statistics of one normalisation, in double: those of the batch, or the running ones.
template <class T> struct Moments {
  const double *mean, *var;   // of the batch
  const T *running_mean, *running_var;
  double eps;
  bool frozen() const { return running_mean != nullptr; }
  double centre(int64_t c) const { return frozen() ? double(running_mean[c]) : mean[c]; }
  double rstd(int64_t c) const { return 1 / std::sqrt((frozen() ? double(running_var[c]) : var[c]) + eps); }
  double lost(int64_t c) const { return centre(c) - double(T(centre(c))); }  // what T cannot hold of the mean
  void fill(const Affine<T>& a, const T* gamma, const T* beta, int64_t n) const {
    if (frozen()) fill(a, running_mean, running_var, gamma, beta, n);
    else fill(a, mean, var, gamma, beta, n);
  }

 private:
  template <class D> void fill(const Affine<T>& a, const D* centre, const D* var, const T* gamma, const T* beta, int64_t n) const {
    CSP_PRAGMA(GCC ivdep) for (int64_t c = 0; c < n; c++) {
      double m = double(centre[c]), s = double(gamma[c]) / std::sqrt(double(var[c]) + eps);
      a.mean[c] = T(m), a.scale[c] = T(s), a.shift[c] = T(double(beta[c]) - (m - double(T(m))) * s);
    }
  }
};

}  // namespace csp::CSP_ISA
