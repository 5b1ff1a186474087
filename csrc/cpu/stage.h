// What the operators of a stage hand to the kernels.
#pragma once
#include "../program.h"
#include "call.h"

namespace csp {

struct StageBuffer {
  void* x;               // [pixels][pitch]; null: scratch memory, which the call takes
  int64_t pitch;
  const void* gradient;  // of an output, backward: [pixels][pitch]
  void* dx;              // of an input, backward: [pixels][channels], null: not wanted
};

struct StageWeight {
  const void* weight;
  void* dweight;         // null: not wanted
  bool channels_last;    // both lie as [out, 3, 3, in]
};

// Packed weights that calls of inference share: made by one, read by the next.
struct PackedWeights {
  const void* memory;
  int64_t bytes;
};

struct StageCall {
  Parallel parallel;
  Storage storage;
  const stage::Program* program;
  int64_t N, H, W;       // of the inputs
  int winograd;          // 2 or 4: output tile of the 3x3
  uint64_t seed;
  const StageBuffer* buffers;
  const StageWeight* weights;  // of each node
  const BatchNorm* norms;      // their means and variances are `mean` and `var`
  double *mean, *var;          // [program->statistics]
  const PackedWeights* packed = nullptr;                      // of an earlier call, in the order in which it asked for them
  int64_t packed_count = 0;
  void* (*keep)(void* context, int64_t bytes) = nullptr;      // memory, whole lines of 64 bytes, for packed weights that later calls read; null: none
  void* keep_context = nullptr;
};

struct StageKernels {
  void (*forward)(const StageCall&);
  void (*backward)(const StageCall&);
};

}  // namespace csp
