// torch.ops.csp_kernels.conv3x3_* and dense_layer* (schemas: csrc/library.cpp): the launchers of dense_block.h and dense_layer.h on
// tensors. csp_kernels/kernels/cuda.py calls them. Images are views [P, channels] with unit channel stride.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "dense_block.h"
#include "dense_block_float32.h"
#include "dense_layer.h"
#include "host.h"

namespace csp::cuda::operators {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "csp_kernels: a CUDA kernel did not start: ", cudaGetErrorString(error)); }

std::optional<Type> type_of(ScalarType dtype, bool tf32) {
  if (dtype == ScalarType::Half) return Type::Half;
  if (dtype == ScalarType::BFloat16) return Type::BFloat16;
  if (dtype == ScalarType::Float) return tf32 ? Type::TensorFloat32 : Type::Float32;
  return std::nullopt;
}
bool wide(const Layer& layer) { return layer.type == Type::Float32 || layer.type == Type::TensorFloat32; }

const void* data(const Tensor& x) { return x.const_data_ptr(); }
View view(const Tensor& x) { return {data(x), x.stride(0)}; }
Output output(const Tensor& x) { return {const_cast<void*>(data(x)), x.stride(0)}; }
const float* floats(const Tensor& x) { return static_cast<const float*>(data(x)); }
Norm norm_of(const Tensors& t) { return {floats(t[0]), floats(t[1]), floats(t[2])}; }
Correction correction_of(const Tensors& t) { return {floats(t[0]), floats(t[1]), floats(t[2])}; }
Weight weight_of(const Tensor& w) {
  STD_TORCH_CHECK(w.stride(2) == 3 * w.stride(3), "conv3x3: the taps of weight must lie at one distance");
  return {data(w), w.scalar_type() == ScalarType::Float, w.stride(0), w.stride(1), w.stride(3)};
}
Weight pointwise_weight_of(const Tensor& w) { return {data(w), w.scalar_type() == ScalarType::Float, w.stride(0), w.stride(1), 0}; }
Dropout dropout_of(const std::optional<Tensor>& seed, int64_t layer, int64_t threshold, double scale) {
  if (!seed) return {};
  return {static_cast<const int64_t*>(data(*seed)), uint32_t(layer), uint32_t(threshold), float(scale)};
}
Layer layer_of(const Tensor& z, const Tensor& weight, const std::vector<int64_t>& images, bool tf32) {
  const std::optional<Type> type = type_of(z.scalar_type(), tf32);
  STD_TORCH_CHECK(type, "conv3x3: no kernels for this dtype");
  return {*type, {images[0], images[1], images[2]}, weight.size(1), weight.size(0)};
}

// In bytes, uninitialised, on the device of `like`.
Tensor workspace(const Tensor& like, int64_t bytes) { return torch::stable::new_empty(like, {bytes}, ScalarType::Byte); }
Tensor fresh(const Tensor& like, std::vector<int64_t> size) { return torch::stable::new_empty(like, size, ScalarType::Float); }

int64_t bytes_of(const Layer& layer, const Device& device, Pass pass) {
  return wide(layer) ? float32::workspace_bytes(layer, device, pass) : workspace_bytes(layer, device, pass);
}

const char* reason_against(const Layer& layer, const Tensor& x) { return wide(layer) ? float32::unsupported(view(x)) : unsupported(view(x)); }
const char* reason_against(const Layer& layer, const Device& device, const Tensor& z, const Tensor& weight, const Tensor& slice) {
  for (const Tensor& x : {z, slice})
    if (const char* reason = reason_against(layer, x)) return reason;
  if (!wide(layer)) return unsupported(layer, device);
  const char* reason = float32::unsupported(weight_of(weight));
  return reason ? reason : float32::unsupported(layer, device);
}

// A misaligned access would end the process' use of the device.
void check_aligned(const Layer& layer, const Tensor& x, const char* name) {
  const char* reason = reason_against(layer, x);
  STD_TORCH_CHECK(!reason, "conv3x3: ", name, ": ", reason);
}

// Why the kernels cannot take this layer, whose slice of the features is `slice`; "" if they can.
std::string refusal(const Tensor& z, const Tensor& weight, const Tensor& slice, std::vector<int64_t> images, bool tf32) {
  if (!type_of(z.scalar_type(), tf32)) return "no kernels for this dtype";
  const Current current(z.get_device_index());
  const char* reason = reason_against(layer_of(z, weight, images, tf32), current.device(), z, weight, slice);
  return reason ? reason : "";
}

void forward(const Tensor& z, Tensors norm, const Tensor& weight, const Tensor& out, std::optional<Tensor> statistics,
                     std::vector<int64_t> images, std::optional<Tensor> seed, int64_t layer_index, int64_t threshold, double scale,
                     bool tf32) {
  const Current current(z.get_device_index());
  const Device device = current.device();
  const Layer layer = layer_of(z, weight, images, tf32);
  check_aligned(layer, z, "z"), check_aligned(layer, out, "out");
  const Tensor memory = workspace(z, bytes_of(layer, device, Pass::Forward));
  Statistics moments;
  if (statistics) moments = {static_cast<double*>(statistics->mutable_data_ptr()), statistics->stride(0)};
  const auto convolve = wide(layer) ? float32::conv3x3_forward : conv3x3_forward;
  check(convolve(layer, device, view(z), norm_of(norm), weight_of(weight), dropout_of(seed, layer_index, threshold, scale), output(out),
                 moments, memory.mutable_data_ptr()));
}

Tensor dgrad(const Tensor& features, const Tensor& gradient, Tensors correction, const Tensor& weight, const Tensor& z,
                     Tensors norm, const Tensor& out, std::vector<int64_t> images, std::optional<Tensor> seed, int64_t layer_index,
                     int64_t threshold, double scale, bool tf32) {
  const Current current(z.get_device_index());
  const Device device = current.device();
  const Layer layer = layer_of(z, weight, images, tf32);
  check_aligned(layer, features, "features"), check_aligned(layer, gradient, "gradient");
  check_aligned(layer, z, "z"), check_aligned(layer, out, "out");
  const Tensor memory = workspace(z, bytes_of(layer, device, Pass::Dgrad)), sums = fresh(z, {2, layer.bottleneck});
  const auto convolve = wide(layer) ? float32::conv3x3_dgrad : conv3x3_dgrad;
  check(convolve(layer, device, view(features), view(gradient), correction_of(correction),
                 dropout_of(seed, layer_index, threshold, scale), weight_of(weight), view(z), norm_of(norm), output(out),
                 static_cast<float*>(sums.mutable_data_ptr()), memory.mutable_data_ptr()));
  return sums;
}

Tensor wgrad(const Tensor& features, const Tensor& gradient, Tensors correction, const Tensor& weight, const Tensor& z,
                     Tensors norm, std::vector<int64_t> images, std::optional<Tensor> seed, int64_t layer_index, int64_t threshold,
                     double scale, bool tf32) {
  const Current current(z.get_device_index());
  const Device device = current.device();
  const Layer layer = layer_of(z, weight, images, tf32);
  const int64_t b = layer.bottleneck, g = layer.growth;
  check_aligned(layer, features, "features"), check_aligned(layer, gradient, "gradient"), check_aligned(layer, z, "z");
  const Tensor memory = workspace(z, bytes_of(layer, device, Pass::Wgrad)), dweight = fresh(z, {g, b, 3, 3});
  const auto convolve = wide(layer) ? float32::conv3x3_wgrad : conv3x3_wgrad;
  check(convolve(layer, device, view(features), view(gradient), correction_of(correction),
                 dropout_of(seed, layer_index, threshold, scale), view(z), norm_of(norm),
                 {static_cast<float*>(dweight.mutable_data_ptr()), 9 * b, 9, 1}, memory.mutable_data_ptr()));
  return dweight;
}

DenseLayer dense_layer_of(const Tensor& features, const Tensor& weight2, const std::vector<int64_t>& images) {
  const std::optional<Type> type = type_of(features.scalar_type(), false);
  STD_TORCH_CHECK(type, "dense_layer: no kernel for this dtype");
  return {*type, {images[0], images[1], images[2]}, features.size(1), weight2.size(1), weight2.size(0)};
}

// Whether one kernel takes the layer and is estimated to be faster than two. features: those that enter.
bool dense_layer_wins(const Tensor& features, const Tensor& weight2, const Tensor& out, std::vector<int64_t> images) {
  if (features.element_size() != 2) return false;
  const Current current(features.get_device_index());
  const DenseLayer layer = dense_layer_of(features, weight2, images);
  return !unsupported(view(features)) && !unsupported(view(out)) && !unsupported(layer, current.device()) &&
         wins(layer, current.capability());
}

void dense_layer(const Tensor& features, Tensors norm1, const Tensor& weight1, Tensors norm2, const Tensor& weight2, const Tensor& out,
                 std::vector<int64_t> images) {
  const Current current(features.get_device_index());
  const Device device = current.device();
  const DenseLayer layer = dense_layer_of(features, weight2, images);
  const Tensor memory = workspace(features, workspace_bytes(layer, device));
  check(dense_layer_forward(layer, device, view(features), norm_of(norm1), pointwise_weight_of(weight1), norm_of(norm2),
                            weight_of(weight2), {}, output(out), memory.mutable_data_ptr()));
}

// Of the runtime on this machine.
std::string error() {
  const cudaError_t found = find_devices();
  return found == cudaSuccess ? "" : cudaGetErrorString(found);
}

}  // namespace
}  // namespace csp::cuda::operators

#ifndef CSP_EMULATION
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CompositeExplicitAutograd, m) { m.impl("cuda_error", TORCH_BOX(&csp::cuda::operators::error)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CSP_DISPATCH_KEY, m) {
  m.impl("conv3x3_unsupported", TORCH_BOX(&csp::cuda::operators::refusal));
  m.impl("conv3x3_forward", TORCH_BOX(&csp::cuda::operators::forward));
  m.impl("conv3x3_dgrad", TORCH_BOX(&csp::cuda::operators::dgrad));
  m.impl("conv3x3_wgrad", TORCH_BOX(&csp::cuda::operators::wgrad));
  m.impl("dense_layer_wins", TORCH_BOX(&csp::cuda::operators::dense_layer_wins));
  m.impl("dense_layer", TORCH_BOX(&csp::cuda::operators::dense_layer));
}
