// What every call carries from the operators (csrc/*.cpp) to the code compiled per instruction set.
#pragma once
#include <cstdint>

namespace csp {

// In the order of csp_kernels/vocabulary.py.
enum class Activation : int { Identity, Relu, LeakyRelu, Silu, Mish, Hardswish, Relu6, Gelu, GeluTanh };

enum class Storage : int { Float32, BFloat16, Float16, Float64 };

// Runs body(task) for task = 0 .. tasks-1 on the threads of the framework.
struct Parallel {
  int threads;
  void (*run)(int tasks, void (*body)(void*, int), void* context);
};

// A batch norm: parameters and gradients in the accumulation type.
struct BatchNorm {
  const void *gamma, *beta;
  const void *running_mean, *running_var;  // null: normalises with the batch's
  double eps;
  double *mean, *var;                      // of the batch
  void *dgamma, *dbeta;
};

// What is kept of a convolution's raw output has its channels padded so that each split starts a vector.
inline int64_t padded_channels(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t columns(const int64_t* sizes, int64_t count) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; i++) n += padded_channels(sizes[i]);
  return n;
}

}  // namespace csp
