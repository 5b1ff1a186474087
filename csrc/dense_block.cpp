// The dense block's operators on CPU tensors.
#include "dense_block.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace csp {
namespace {

constexpr const char* OP = "dense_block";

std::tuple<Tensor, std::vector<Tensor>, Tensor> dense_block(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running,
                                               std::vector<int64_t> frozen, std::vector<double> eps, std::optional<Tensor> seed,
                                               double drop_rate, bool keep_bottleneck, int64_t winograd) {
  DenseBlockCall call(OP, x, x.size(1), params, running, &frozen, eps, winograd);
  call.dropout(drop_rate, seed);
  DenseBlock& a = call.block;
  Tensor y = channels_last(x, a.N, a.channels(), a.H, a.W);
  Tensor stats = statistics(x, a.channels() + a.num_layers * a.bottleneck);
  Kept z(x, keep_bottleneck ? a.num_layers : 0, {a.pixels(), a.z_pitch()});
  a.x = x.const_data_ptr(), a.features = y.mutable_data_ptr(), a.z = z.data();
  a.mean = static_cast<double*>(stats.mutable_data_ptr()), a.var = a.mean + a.channels() + a.num_layers * a.bottleneck;
  if (!call.empty()) isa().dense_block->forward(a);
  return {y, z.tensors, stats};
}

std::vector<Tensor> dense_block_backward(const Tensor& grad_y, const Tensor& y, std::vector<Tensor> kept, const Tensor& stats,
                                         std::vector<Tensor> params, std::vector<Tensor> running, std::vector<int64_t> frozen,
                                         std::vector<double> eps, std::optional<Tensor> seed, double drop_rate,
                                         int64_t in_channels, int64_t winograd) {
  DenseBlockCall call(OP, y, in_channels, params, running, &frozen, eps, winograd);
  call.dropout(drop_rate, seed);
  DenseBlock& a = call.block;
  Shape grad(OP, grad_y);
  grad.dense(OP), Shape(OP, y).dense(OP);
  STD_TORCH_CHECK(grad.N == a.N && grad.C == a.channels() && grad.H == a.H && grad.W == a.W && grad_y.scalar_type() == y.scalar_type(),
                  "dense_block_backward: grad_y must have the shape and dtype of y");
  Kept z(OP, kept, a.num_layers, a.pixels() * a.z_pitch());
  std::vector<Tensor> grads{channels_last(y, a.N, in_channels, a.H, a.W)};
  append_gradients(grads, params, call.empty());
  if (call.empty()) return grads;
  call.gradients(grads, 1);
  a.features = const_cast<void*>(y.const_data_ptr()), a.z = z.data();
  a.mean = const_cast<double*>(static_cast<const double*>(stats.const_data_ptr()));
  a.var = a.mean + a.channels() + a.num_layers * a.bottleneck;
  a.grad_features = grad_y.const_data_ptr();
  a.dx = grads[0].mutable_data_ptr(), a.dx_pitch = in_channels;
  isa().dense_block->backward(a);
  return grads;
}

Tensor dense_block_inference(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running, std::vector<double> eps,
                             int64_t winograd) {
  DenseBlockCall call(OP, x, x.size(1), params, running, nullptr, eps, winograd);
  DenseBlock& a = call.block;
  Tensor y = channels_last(x, a.N, a.channels(), a.H, a.W);
  a.x = x.const_data_ptr(), a.features = y.mutable_data_ptr();
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
