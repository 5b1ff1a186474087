// The dense block's operators on CPU tensors.
#include "dense_block.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace csp {
namespace {

std::tuple<Tensor, std::vector<Tensor>, Tensor> dense_block(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running,
                                               std::vector<int64_t> frozen, std::vector<double> eps, std::optional<Tensor> seed,
                                               double drop_rate, bool keep_bottleneck, int64_t winograd) {
  constexpr const char* OP = "dense_block";
  const Shape s = first_image({OP, "x"}, x);
  Parameters p(OP, s.dtype, params, running, &frozen, eps, 6);
  DenseBlockCall call(s, s.C, p, winograd);
  p.end();
  call.dropout(OP, drop_rate, seed);
  DenseBlock& a = call.block;
  Tensor y = channels_last(x, a.N, a.channels(), a.H, a.W);
  Tensor stats = statistics(x, call.columns());
  Kept z(x, keep_bottleneck ? a.num_layers : 0, {a.pixels(), a.z_pitch()});
  a.x = s.data, a.features = y.mutable_data_ptr(), a.z = z.data();
  call.statistics(static_cast<double*>(stats.mutable_data_ptr()));
  if (!call.empty()) isa().dense_block->forward(a);
  return {y, z.tensors, stats};
}

std::vector<Tensor> dense_block_backward(const Tensor& grad_y, const Tensor& y, std::vector<Tensor> kept_z, const Tensor& stats,
                                         std::vector<Tensor> params, std::vector<Tensor> running, std::vector<int64_t> frozen,
                                         std::vector<double> eps, std::optional<Tensor> seed, double drop_rate,
                                         int64_t in_channels, int64_t winograd) {
  constexpr const char* OP = "dense_block_backward";
  const Shape s = first_image({OP, "y"}, y);
  check_range({OP, "in_channels"}, in_channels, 1, s.C - 1);
  Parameters p(OP, s.dtype, params, running, &frozen, eps, 6);
  DenseBlockCall call(s, in_channels, p, winograd);
  p.end();
  call.dropout(OP, drop_rate, seed);
  DenseBlock& a = call.block;
  const int64_t N = a.N, C = a.channels(), H = a.H, W = a.W;
  a.features = const_cast<void*>(image({OP, "y"}, y, s.dtype, {N, C, H, W}, Lies::Packed).data);
  a.grad_features = image({OP, "grad_y"}, grad_y, s.dtype, {N, C, H, W}, Lies::Packed).data;
  Kept z({OP, "z"}, kept_z, s.dtype, a.num_layers, {a.pixels(), a.z_pitch()}, true);
  a.z = z.data();
  call.statistics(statistics_of(OP, stats, call.columns()));
  std::vector<Tensor> grads{channels_last(y, N, in_channels, H, W)};
  append_gradients(grads, params, call.empty());
  if (call.empty()) return grads;
  call.gradients(grads, 1);
  a.dx = grads[0].mutable_data_ptr(), a.dx_pitch = in_channels;
  isa().dense_block->backward(a);
  return grads;
}

Tensor dense_block_inference(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running, std::vector<double> eps,
                             int64_t winograd) {
  constexpr const char* OP = "dense_block_inference";
  const Shape s = first_image({OP, "x"}, x);
  Parameters p(OP, s.dtype, params, running, nullptr, eps, 6);
  DenseBlockCall call(s, s.C, p, winograd);
  p.end();
  DenseBlock& a = call.block;
  Tensor y = channels_last(x, a.N, a.channels(), a.H, a.W);
  a.x = s.data, a.features = y.mutable_data_ptr();
  if (!call.empty()) isa().dense_block->inference(a);
  return y;
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("dense_block(Tensor x, Tensor[] params, Tensor[] running, int[] frozen, float[] eps, Tensor? seed, float drop_rate, "
        "bool keep_bottleneck, int winograd) -> (Tensor, Tensor[], Tensor)");
  m.def("dense_block_backward(Tensor grad_y, Tensor y, Tensor[] z, Tensor stats, Tensor[] params, Tensor[] running, int[] frozen, "
        "float[] eps, Tensor? seed, float drop_rate, int in_channels, int winograd) -> Tensor[]");
  m.def("dense_block_inference(Tensor x, Tensor[] params, Tensor[] running, float[] eps, int winograd) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("dense_block", TORCH_BOX(&csp::dense_block));
  m.impl("dense_block_backward", TORCH_BOX(&csp::dense_block_backward));
  m.impl("dense_block_inference", TORCH_BOX(&csp::dense_block_inference));
}
