// The 3x3 convolution of a dense layer on the GPU, in 16-bit types: forward, dgrad, wgrad. Plain functions on device pointers; nothing
// here synchronises or allocates. P = n * h * w pixels, b bottleneck channels enter, g grown channels leave. The forms are those of
// csp_kernels/kernels/conv3x3.py, the portable twin.
#pragma once
#include <cstdint>
#include "device/ptx.cuh"

namespace csp::cuda {

// Float32: multiplied in full, without tensor cores; TensorFloat32: inputs of the products rounded to 10 bits. dense_block_float32.h.
enum class Type : int { Half, BFloat16, Float32, TensorFloat32 };

struct Images {
  int64_t n, h, w;
};
// Pixels `pitch` elements apart; a channel slice of something wider, 16-byte aligned.
struct View {
  const void* data;
  int64_t pitch;
};
struct Output {
  void* data;
  int64_t pitch;
};
// relu((x - mean) * scale + shift) on load.
struct Norm {
  const float *mean, *scale, *shift;
};
// dY = G - ((F - mean) * slope + offset) on load: the slice's gradient with the deferred terms of batch norm.
struct Correction {
  const float *mean, *slope, *offset;
};
// Elements whose hash is below the threshold are dropped, others scaled; seed on the device, null: none are.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t layer = 0, threshold = 0;
  float scale = 1;
};
// [g, b, 3, 3] by its strides; float32, or the type of the pixels.
struct Weight {
  const void* data;
  bool float32;
  int64_t output_stride, input_stride, tap_stride;
};
struct WeightGradient {
  float* data;
  int64_t output_stride, input_stride, tap_stride;
};
// [2, channels], rows `pitch` apart: mean and biased variance. Null: not wanted.
struct Statistics {
  double* data = nullptr;
  int64_t pitch = 0;
};
// Sums depend on `multiprocessors`, and on nothing else of the device.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
  cudaStream_t stream;
  int64_t launch_ns = 2000;  // what one more kernel costs: alike on all devices; 0 in tests, so that sums are split
};
struct Layer {
  Type type;
  Images images;
  int64_t bottleneck, growth;
};

// Why the kernels cannot take this layer; null if they can.
const char* unsupported(const Layer& layer, const Device& device);
const char* unsupported(const View& view);

enum class Pass : int { Forward, Dgrad, Wgrad };
int64_t workspace_bytes(const Layer& layer, const Device& device, Pass pass);

// out [P, g] = dropout(conv3x3(relu(norm(z)), weight)); statistics: of out, if there is room for them.
cudaError_t conv3x3_forward(const Layer& layer, const Device& device, const View& z, const Norm& norm, const Weight& weight,
                            const Dropout& dropout, const Output& out, const Statistics& statistics, void* workspace);

// out [P, b] = dn * scale, dn being the gradient of norm(z); sums [2, b] of dn and dn * (z - mean). features, gradient: F and G.
cudaError_t conv3x3_dgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const Weight& weight, const View& z, const Norm& norm,
                          const Output& out, float* sums, void* workspace);

// dweight [g, b, 3, 3].
cudaError_t conv3x3_wgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const View& z, const Norm& norm,
                          const WeightGradient& dweight, void* workspace);

}  // namespace csp::cuda
