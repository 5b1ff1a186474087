// What the operators of a partial transition hand to the kernels.
#pragma once
#include "call.h"

namespace csp {

struct TransitionConv {
  BatchNorm norm;          // of what the convolution reads (pre-activation), or of what it gives
  const void* weight;      // [out, K]
  void* dweight;
  int64_t out;
  void* raw;               // [P, padded_channels(out)]: what the convolution gave, if something follows it; null: not kept
};

struct PartialTransition {
  Parallel parallel;
  Storage storage;
  int64_t N, H, W;         // before pooling
  bool post, pool;
  Slice part, dense;       // part.channels = 0: no bypass
  const TransitionConv *t, *u;         // null: left out (fusion first, fusion last)
  Slice grown;             // more of the dense part: raw slices of post-activation layers, a norm each; none: no channels
  const BatchNorm* grown_norms;
  int64_t grown_slices;
  const double *dense_mean, *dense_var;  // its batch statistics where known, else null
  Slice y;                 // x: its gradient, dx: the output
  double* owed;            // backward, [2][dense channels] or null: dense.dx then lacks - owed[0] - (dense - mean) * owed[1]

  int64_t pixels() const { return N * H * W; }
  int64_t pooled() const { return pool ? N * (H / 2) * (W / 2) : pixels(); }
};

struct PartialTransitionKernels {
  void (*forward)(const PartialTransition&);
  void (*backward)(const PartialTransition&);
};

}  // namespace csp
