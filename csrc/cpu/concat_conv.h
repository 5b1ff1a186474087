// What the operators of a concatenating 1x1 convolution hand to the kernels.
#pragma once
#include "call.h"

namespace csp {

enum class Activation : int { Identity, Relu, LeakyRelu, Silu, Mish, Hardswish };

struct ConcatConv {
  Parallel parallel;
  Storage storage;
  int64_t N, H, W;
  const Slice* inputs;
  int64_t count;
  const void* weight;      // [out, K]
  void* dweight;
  BatchNorm norm;
  Activation activation;
  double negative_slope;
  const int64_t* splits;   // channels of each output
  const Slice* outputs;    // x: gradients (null: zero), dx: values
  int64_t split_count;
  void* raw;               // [P, columns(splits)], null: not kept
};

struct ConcatConvKernels {
  void (*forward)(const ConcatConv&);
  void (*backward)(const ConcatConv&);
  void (*inference)(const ConcatConv&);
};

}  // namespace csp
