// Batch norms: their statistics as load-time affines, and what their backward passes add up and owe.
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

// The channels of a batch norm from `at` on.
template <class T> struct Norm {
  const BatchNorm& n;
  int64_t at = 0;
  const T *gamma = from<const T>(n.gamma), *beta = from<const T>(n.beta);
  T *dgamma = from<T>(n.dgamma), *dbeta = from<T>(n.dbeta);
  Moments<T> moments{from<const double>(n.mean), from<const double>(n.var), from<const T>(n.running_mean), from<const T>(n.running_var), n.eps};

  template <class V, class P> V* from(P* p) const { return p ? static_cast<V*>(p) + at : nullptr; }

  bool frozen() const { return moments.frozen(); }
  void fill(const Affine<T>& a, int64_t count) const { moments.fill(a, gamma, beta, count); }
  // y = x * scale + bias
  void fold(T* scale, T* bias, int64_t count) const {
    for (int64_t c = 0; c < count; c++) {
      double s = double(gamma[c]) * moments.rstd(c);
      scale[c] = T(s), bias[c] = T(double(beta[c]) - moments.centre(c) * s);
    }
  }
  // The tasks' sums of dn and of dn * (x - mean); ADD: to those of other readers.
  template <bool ADD = false> void add_up(const PartialSums<T>* parts, int tasks, int64_t column, int64_t count) const {
    for (int64_t c = 0; c < count; c++) {
      double sum = 0, sum_x = 0;
      for (int t = 0; t < tasks; t++) sum += double(parts[t].sum[column + c]), sum_x += double(parts[t].sum_x[column + c]);
      double slope = moments.rstd(c) * (sum_x - moments.lost(c) * sum);
      dbeta[c] = T(ADD ? double(dbeta[c]) + sum : sum), dgamma[c] = T(ADD ? double(dgamma[c]) + slope : slope);
    }
  }
  // gradient = G - mean - (x - batch mean) * slope where G = gamma * rstd * dn; P: pixels of the batch.
  double owed_mean(int64_t c, int64_t P) const { return frozen() ? 0 : double(gamma[c]) * moments.rstd(c) * double(dbeta[c]) / double(P); }
  double owed_slope(int64_t c, int64_t P) const {
    double r = moments.rstd(c);
    return frozen() ? 0 : double(gamma[c]) * r * r * double(dgamma[c]) / double(P);
  }
};

// dz = scale * d + (z - mean) * slope + offset: the gradient of what a batch norm reads, from that of what it gives.
template <class T> struct Correction {
  T *scale, *mean, *slope, *offset;
  bool owes = false;  // else slope and offset are 0 and z, which may be NaN, does not count
  Correction(Frame& frame, int64_t n)
      : scale(frame.zeroed<T>(Affine<T>::padded(n))), mean(frame.zeroed<T>(Affine<T>::padded(n))),
        slope(frame.zeroed<T>(Affine<T>::padded(n))), offset(frame.zeroed<T>(Affine<T>::padded(n))) {}
  // scaled: d is G already.
  void fill(const Norm<T>& norm, int64_t column, int64_t count, int64_t P, bool scaled) {
    owes = owes || !norm.frozen();
    for (int64_t c = 0; c < count; c++) {
      double s = norm.owed_slope(c, P);
      scale[column + c] = scaled ? T(1) : T(double(norm.gamma[c]) * norm.moments.rstd(c));
      mean[column + c] = T(norm.moments.centre(c)), slope[column + c] = T(-s);
      offset[column + c] = T(-norm.owed_mean(c, P) + s * norm.moments.lost(c));
    }
  }
};

}  // namespace csp::CSP_ISA
