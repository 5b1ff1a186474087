// A normalisation as an affine applied on load.
#pragma once
#include "scratch.h"

namespace csp::CSP_ISA {

// act((x - mean) * scale + shift), the normalisation as a load-time affine; arrays padded with zeros to a multiple of 64.
template <class T> struct Affine {
  T *mean, *scale, *shift;
  static int64_t padded(int64_t n) { return round_up(n, 64) + 64; }
  explicit Affine(Frame& frame, int64_t n)
      : mean(frame.zeroed<T>(padded(n))), scale(frame.zeroed<T>(padded(n))), shift(frame.zeroed<T>(padded(n))) {}
  Affine from(int64_t channel) const { return Affine(mean + channel, scale + channel, shift + channel); }

 private:
  Affine(T* mean, T* scale, T* shift) : mean(mean), scale(scale), shift(shift) {}
};

}  // namespace csp::CSP_ISA
