// torch.ops.csp_kernels.conv3x3_* and dense_layer* (schemas: csrc/library.cpp): the launchers of dense_block.h and dense_layer.h on
// tensors. csp_kernels/kernels/cuda.py calls them. Images are views [P, channels] with unit channel stride.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "dense_block.h"
#include "dense_block_float32.h"
#include "dense_layer.h"
#include "host.h"

namespace csp::cuda::operators {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void check(cudaError_t error) {
  if (error != cudaSuccess) refuse({"csp_kernels", "CUDA"}, "a kernel did not start: ", cudaGetErrorString(error));
}

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
Weight pointwise_weight_of(const Tensor& w) { return {data(w), w.scalar_type() == ScalarType::Float, w.stride(0), w.stride(1), 0}; }
Weight weight_of(const Tensor& w) { return {data(w), w.scalar_type() == ScalarType::Float, w.stride(0), w.stride(1), w.stride(3)}; }

// The arguments of one call, checked: images of P pixels in one dtype, on one device.
class Door {
  const char* op;
  Place place;
  int32_t dtype;
  int64_t pixels = 1;

  const float* floats(const Argument& a, const Tensor& x, int64_t n) const {
    return static_cast<const float*>(checked(a, x, CODES.float32, {n}, Lies::Contiguous, place));
  }

 public:
  Door(const char* op, const Tensor& like, const std::vector<int64_t>& images) : op(op), place(Place::of(like)), dtype(dtype_of(like)) {
    check_count({op, "images"}, images.size(), 3, "N, H and W");
    for (int i = 0; i < 3; i++) {
      check_range({op, "images", i}, images[size_t(i)], 1, int64_t(1) << 31);
      require(!__builtin_mul_overflow(pixels, images[size_t(i)], &pixels), {op, "images"}, "got ", list(images), ", expected fewer pixels");
    }
  }
  void rows(const char* name, const Tensor& x, int64_t channels) const { checked({op, name}, x, dtype, {pixels, channels}, Lies::Rows, place); }
  // A weight of an image's dtype or in float32; taps: of a side.
  void weight(const char* name, const Tensor& w, int64_t in, int64_t taps) const {
    const int32_t own = dtype_of(w) == CODES.float32 ? CODES.float32 : dtype;
    if (taps > 1) checked({op, name}, w, own, {ANY, in, taps, taps}, Lies::Anyhow, place);
    else if (w.dim() == 2) checked({op, name}, w, own, {ANY, in}, Lies::Anyhow, place);
    else checked({op, name}, w, own, {ANY, in, 1, 1}, Lies::Anyhow, place);
    require(w.numel() > 0, {op, name}, "got ", Shown{w}, ", expected at least one channel on each side");
    require(taps == 1 || w.stride(2) == 3 * w.stride(3), {op, name}, "got strides ", List{w.strides().data(), w.dim()}, ", expected taps at one distance");
  }
  std::array<const float*, 3> vectors(const char* name, const Tensors& t, int64_t n) const {
    check_count({op, name}, t.size(), 3, "vectors of a value a channel");
    return {floats({op, name, 0}, t[0], n), floats({op, name, 1}, t[1], n), floats({op, name, 2}, t[2], n)};
  }
  Norm norm(const char* name, const Tensors& t, int64_t n) const {
    const auto [mean, scale, shift] = vectors(name, t, n);
    return {mean, scale, shift};
  }
  Correction correction(const Tensors& t, int64_t n) const {
    const auto [mean, slope, offset] = vectors("correction", t, n);
    return {mean, slope, offset};
  }
  Statistics statistics(const std::optional<Tensor>& t, int64_t channels) const {
    if (!t) return {};
    return {static_cast<double*>(const_cast<void*>(checked({op, "statistics"}, *t, CODES.float64, {2, channels}, Lies::Rows, place))), t->stride(0)};
  }
  Dropout dropout(const std::optional<Tensor>& seed, int64_t layer, int64_t threshold, double scale) const {
    check_range({op, "layer"}, layer, 0, UINT32_MAX), check_range({op, "threshold"}, threshold, 0, UINT32_MAX);
    require(std::isfinite(scale), {op, "scale"}, "got ", scale, ", expected a finite number");
    if (!seed) return {};
    return {static_cast<const int64_t*>(checked({op, "seed"}, *seed, CODES.int64, {1}, Lies::Contiguous, place)), uint32_t(layer), uint32_t(threshold), float(scale)};
  }
  // `out` is written while `in` is read: slices of one tensor may alternate, and may not overlap.
  void apart(const Tensor& out, const char* name, const Tensor& in) const {
    const int64_t bytes = CODES.bytes(dtype), pitch = out.stride(0);
    const char *o = static_cast<const char*>(data(out)), *i = static_cast<const char*>(data(in));
    auto end = [&](const Tensor& t, const char* begin) { return begin + ((pixels - 1) * t.stride(0) + t.size(1)) * bytes; };
    if (o >= end(in, i) || i >= end(out, o)) return;
    const int64_t behind = (o - i) % (pitch * bytes), from = (behind < 0 ? behind + pitch * bytes : behind) / bytes;
    const bool alternate = pitch == in.stride(0) && from >= in.size(1) && from + out.size(1) <= pitch;
    require(alternate, {op, "out"}, "got memory that overlaps that of ", name, ", expected it apart: it is read while out is written");
  }
};

// Checks z, the weight and the images.
Layer layer_of(const Door& door, const char* op, const Tensor& z, const Tensor& weight, const std::vector<int64_t>& images, bool tf32) {
  const std::optional<Type> type = type_of(z.scalar_type(), tf32);
  require(type.has_value(), {op, "z"}, "got ", Shown{z}, ", expected float16, bfloat16 or float32");
  door.weight("weight", weight, ANY, 3);
  door.rows("z", z, weight.size(1));
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
  require(!reason, {"conv3x3", name}, reason ? reason : "");
}

// Why the kernels cannot take this layer, whose slice of the features is `slice`; "" if they can.
std::string refusal(const Tensor& z, const Tensor& weight, const Tensor& slice, std::vector<int64_t> images, bool tf32) {
  constexpr const char* OP = "conv3x3_unsupported";
  if (!type_of(z.scalar_type(), tf32)) return "no kernels for this dtype";
  const Current current(z.get_device_index());
  const Door door(OP, z, images);
  const Layer layer = layer_of(door, OP, z, weight, images, tf32);
  door.rows("slice", slice, layer.growth);
  const char* reason = reason_against(layer, current.device(), z, weight, slice);
  return reason ? reason : "";
}

void forward(const Tensor& z, Tensors norm, const Tensor& weight, const Tensor& out, std::optional<Tensor> statistics,
                     std::vector<int64_t> images, std::optional<Tensor> seed, int64_t layer_index, int64_t threshold, double scale,
                     bool tf32) {
  constexpr const char* OP = "conv3x3_forward";
  const Current current(z.get_device_index());
  const Device device = current.device();
  const Door door(OP, z, images);
  const Layer layer = layer_of(door, OP, z, weight, images, tf32);
  door.rows("out", out, layer.growth), door.apart(out, "z", z);
  const Norm affine = door.norm("norm", norm, layer.bottleneck);
  const Dropout dropout = door.dropout(seed, layer_index, threshold, scale);
  const Statistics moments = door.statistics(statistics, layer.growth);
  check_aligned(layer, z, "z"), check_aligned(layer, out, "out");
  const Tensor memory = workspace(z, bytes_of(layer, device, Pass::Forward));
  const auto convolve = wide(layer) ? float32::conv3x3_forward : conv3x3_forward;
  check(convolve(layer, device, view(z), affine, weight_of(weight), dropout, output(out),
                 moments, memory.mutable_data_ptr()));
}

Tensor dgrad(const Tensor& features, const Tensor& gradient, Tensors correction, const Tensor& weight, const Tensor& z,
                     Tensors norm, const Tensor& out, std::vector<int64_t> images, std::optional<Tensor> seed, int64_t layer_index,
                     int64_t threshold, double scale, bool tf32) {
  constexpr const char* OP = "conv3x3_dgrad";
  const Current current(z.get_device_index());
  const Device device = current.device();
  const Door door(OP, z, images);
  const Layer layer = layer_of(door, OP, z, weight, images, tf32);
  door.rows("features", features, layer.growth), door.rows("gradient", gradient, layer.growth), door.rows("out", out, layer.bottleneck);
  door.apart(out, "features", features), door.apart(out, "gradient", gradient), door.apart(out, "z", z);
  const Correction owed = door.correction(correction, layer.growth);
  const Norm affine = door.norm("norm", norm, layer.bottleneck);
  const Dropout dropout = door.dropout(seed, layer_index, threshold, scale);
  check_aligned(layer, features, "features"), check_aligned(layer, gradient, "gradient");
  check_aligned(layer, z, "z"), check_aligned(layer, out, "out");
  const Tensor memory = workspace(z, bytes_of(layer, device, Pass::Dgrad)), sums = fresh(z, {2, layer.bottleneck});
  const auto convolve = wide(layer) ? float32::conv3x3_dgrad : conv3x3_dgrad;
  check(convolve(layer, device, view(features), view(gradient), owed, dropout, weight_of(weight), view(z), affine, output(out),
                 static_cast<float*>(sums.mutable_data_ptr()), memory.mutable_data_ptr()));
  return sums;
}

Tensor wgrad(const Tensor& features, const Tensor& gradient, Tensors correction, const Tensor& weight, const Tensor& z,
                     Tensors norm, std::vector<int64_t> images, std::optional<Tensor> seed, int64_t layer_index, int64_t threshold,
                     double scale, bool tf32) {
  constexpr const char* OP = "conv3x3_wgrad";
  const Current current(z.get_device_index());
  const Device device = current.device();
  const Door door(OP, z, images);
  const Layer layer = layer_of(door, OP, z, weight, images, tf32);
  door.rows("features", features, layer.growth), door.rows("gradient", gradient, layer.growth);
  const Correction owed = door.correction(correction, layer.growth);
  const Norm affine = door.norm("norm", norm, layer.bottleneck);
  const Dropout dropout = door.dropout(seed, layer_index, threshold, scale);
  const int64_t b = layer.bottleneck, g = layer.growth;
  check_aligned(layer, features, "features"), check_aligned(layer, gradient, "gradient"), check_aligned(layer, z, "z");
  const Tensor memory = workspace(z, bytes_of(layer, device, Pass::Wgrad)), dweight = fresh(z, {g, b, 3, 3});
  const auto convolve = wide(layer) ? float32::conv3x3_wgrad : conv3x3_wgrad;
  check(convolve(layer, device, view(features), view(gradient), owed, dropout, view(z), affine,
                 {static_cast<float*>(dweight.mutable_data_ptr()), 9 * b, 9, 1}, memory.mutable_data_ptr()));
  return dweight;
}

// Checks both images, the 3x3 weight and the images' size.
DenseLayer dense_layer_of(const Door& door, const char* op, const Tensor& features, const Tensor& weight2, const Tensor& out,
                          const std::vector<int64_t>& images) {
  const std::optional<Type> type = type_of(features.scalar_type(), false);
  require(type.has_value(), {op, "features"}, "got ", Shown{features}, ", expected float16 or bfloat16");
  door.weight("weight2", weight2, ANY, 3);
  door.rows("features", features, ANY), door.rows("out", out, weight2.size(0));
  return {*type, {images[0], images[1], images[2]}, features.size(1), weight2.size(1), weight2.size(0)};
}

// Whether one kernel takes the layer and is estimated to be faster than two. features: those that enter.
bool dense_layer_wins(const Tensor& features, const Tensor& weight2, const Tensor& out, std::vector<int64_t> images) {
  if (features.element_size() != 2) return false;
  constexpr const char* OP = "dense_layer_wins";
  const Current current(features.get_device_index());
  const DenseLayer layer = dense_layer_of(Door(OP, features, images), OP, features, weight2, out, images);
  return !unsupported(view(features)) && !unsupported(view(out)) && !unsupported(layer, current.device()) &&
         wins(layer, current.capability());
}

void dense_layer(const Tensor& features, Tensors norm1, const Tensor& weight1, Tensors norm2, const Tensor& weight2, const Tensor& out,
                 std::vector<int64_t> images) {
  constexpr const char* OP = "dense_layer";
  const Current current(features.get_device_index());
  const Device device = current.device();
  const Door door(OP, features, images);
  const DenseLayer layer = dense_layer_of(door, OP, features, weight2, out, images);
  door.apart(out, "features", features), door.weight("weight1", weight1, layer.entering, 1);
  require(weight1.size(0) == layer.bottleneck, {OP, "weight1"}, "got ", Shown{weight1}, ", expected ", layer.bottleneck, " rows, the input channels of weight2");
  const Norm first = door.norm("norm1", norm1, layer.entering), second = door.norm("norm2", norm2, layer.bottleneck);
  const Tensor memory = workspace(features, workspace_bytes(layer, device));
  check(dense_layer_forward(layer, device, view(features), first, pointwise_weight_of(weight1), second,
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
