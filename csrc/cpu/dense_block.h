// What a dense block's operators hand to the kernels.
#pragma once
#include "call.h"

namespace csp {

struct DenseLayer {  // parameters and gradients in the accumulation type; null gradients are never passed
  const void *gamma1, *beta1, *w1, *gamma2, *beta2, *w2;              // [K] [K] [b,K] [b] [b] [g,b,3,3]
  const void *mean1, *var1, *mean2, *var2;                            // running statistics, null: those of the batch
  double eps1, eps2;
  bool w2_channels_last;                                              // w2 and dw2 lie as [g,3,3,b]
  void *dgamma1, *dbeta1, *dw1, *dgamma2, *dbeta2, *dw2;
};

struct DenseBlock {
  Parallel parallel;
  Storage storage;
  int64_t N, H, W, in_channels, growth, bottleneck, num_layers;
  int winograd;                                                       // 2 or 4: output tile of the 3x3
  double drop_rate;
  uint64_t seed;
  const DenseLayer* layers;
  const void* x;                                                      // [P, c0], pixels x_pitch apart
  int64_t x_pitch;
  void* features;                                                     // [P, C], the output
  bool features_read;                                                 // a norm behind the block needs their batch statistics
  void* const* z;                                                     // L of [P][bp], null: not kept
  double *mean, *var;                                                 // [C + L*b]
  const void* grad_features;                                          // [P, C]
  const double* owed;                                                 // [2][C], null: nothing; see PartialTransition
  void* dx;                                                           // [P, c0], pixels dx_pitch apart
  int64_t dx_pitch;

  int64_t pixels() const { return N * H * W; }
  int64_t channels() const { return in_channels + num_layers * growth; }
  int64_t prefix(int64_t l) const { return in_channels + l * growth; }
  int64_t z_pitch() const { return padded_channels(bottleneck); }
};

struct DenseBlockKernels {
  void (*forward)(const DenseBlock&);
  void (*backward)(const DenseBlock&);
  void (*inference)(const DenseBlock&);
};

}  // namespace csp
