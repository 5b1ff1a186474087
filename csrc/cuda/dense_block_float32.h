// The functions of dense_block.h for Type::Float32 and Type::TensorFloat32: pixels and weights are float32.
#pragma once
#include "dense_block.h"

namespace csp::cuda::float32 {

const char* unsupported(const Layer& layer, const Device& device);
const char* unsupported(const View& view);
const char* unsupported(const Weight& weight);
int64_t workspace_bytes(const Layer& layer, const Device& device, Pass pass);

cudaError_t conv3x3_forward(const Layer& layer, const Device& device, const View& z, const Norm& norm, const Weight& weight,
                            const Dropout& dropout, const Output& out, const Statistics& statistics, void* workspace);
cudaError_t conv3x3_dgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const Weight& weight, const View& z, const Norm& norm,
                          const Output& out, float* sums, void* workspace);
cudaError_t conv3x3_wgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const View& z, const Norm& norm,
                          const WeightGradient& dweight, void* workspace);

}  // namespace csp::cuda::float32
