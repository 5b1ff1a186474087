// A whole dense layer with frozen norms in one kernel: the bottleneck never leaves the chip.
//
//   z = relu(norm1(F[:, :K])) weight1^T,  out = dropout(conv3x3(relu(norm2(z)), weight2)),  out: a slice of F behind its channel K
//
// The pair of kernels (a 1x1, then conv3x3_forward) writes z [P, b] and reads it again; here the 1x1 is computed where the 3x3 needs it,
// on tiles with a halo, up to a third of it twice. z is rounded to 16 bits where the pair rounds it, then h: results differ by the order
// of sums only. Statistics of out are not taken: where norms are frozen nobody needs them.
#pragma once
#include "dense_block.h"

namespace csp::cuda {

struct DenseLayer {
  Type type;  // Half or BFloat16
  Images images;
  int64_t entering, bottleneck, growth;  // K, b, g
};

// Why the kernel cannot take this layer; null if it can. For views see `unsupported` in dense_block.h.
const char* unsupported(const DenseLayer& layer, const Device& device);
int64_t workspace_bytes(const DenseLayer& layer, const Device& device);

// Whether the one kernel is estimated to be faster than the pair on devices of a compute capability (80, 90, ...): estimated from what
// is multiplied and moved, not measured. Never where it is unsupported.
bool wins(const DenseLayer& layer, int compute_capability);

// Reads channels below K of the features only; weight1 [b, K] by its strides, its tap_stride is not looked at.
cudaError_t dense_layer_forward(const DenseLayer& layer, const Device& device, const View& features, const Norm& norm1,
                                const Weight& weight1, const Norm& norm2, const Weight& weight2, const Dropout& dropout,
                                const Output& out, void* workspace);

}  // namespace csp::cuda
