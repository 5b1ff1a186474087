// The operators of post-activation dense blocks (one branch, or PeleeNet's two) on CPU tensors.
#include "post_dense_block.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "partial_transition.h"

namespace csp {
namespace {

// y, and of what backward needs (keep: all but z and middle): raw features, bottlenecks, middles, statistics.
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> post_dense_block(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running,
                                                                    std::vector<int64_t> frozen, std::vector<double> eps, bool two_way, int64_t winograd,
                                                                    bool keep) {
  constexpr const char* OP = "post_dense_block";
  const Shape s = first_image({OP, "x"}, x);
  Parameters p(OP, s.dtype, params, running, &frozen, eps, PostDenseBlockCall::params(two_way));
  PostDenseBlockCall call(s, slice_of(s), p, two_way, winograd);
  p.end();
  PostDenseBlock& a = call.block;
  Tensor y = channels_last(x, a.N, a.channels(), a.H, a.W), features = buffer(x, {a.pixels(), a.grown()});
  Kept z(x, keep ? a.num_layers : 0, {a.pixels(), a.z_pitch()}), middle(x, keep && two_way ? a.num_layers : 0, {a.pixels(), a.middle_pitch()});
  Tensor stats = statistics(x, call.statistics_size);
  double* mean = static_cast<double*>(stats.mutable_data_ptr());
  call.statistics(mean, mean + call.statistics_size);
  a.features = features.mutable_data_ptr(), a.z = z.data(), a.middle = middle.data();
  a.y = {nullptr, 0, a.channels(), y.mutable_data_ptr(), a.channels()};
  if (y.numel() > 0) isa().post_dense_block->forward(a);
  return {y, features, z.tensors, middle.tensors, stats};
}

std::vector<Tensor> post_dense_block_backward(const Tensor& grad_y, const Tensor& x, const Tensor& features, std::vector<Tensor> kept_z, std::vector<Tensor> kept_middle,
                                              const Tensor& stats, std::vector<Tensor> params, std::vector<Tensor> running, std::vector<int64_t> frozen,
                                              std::vector<double> eps, bool two_way, int64_t winograd) {
  constexpr const char* OP = "post_dense_block_backward";
  const Shape s = first_image({OP, "x"}, x);
  Parameters p(OP, s.dtype, params, running, &frozen, eps, PostDenseBlockCall::params(two_way));
  PostDenseBlockCall call(s, slice_of(s), p, two_way, winograd);
  p.end();
  PostDenseBlock& a = call.block;
  const Shape grad = image({OP, "grad_y"}, grad_y, s.dtype, {a.N, a.channels(), a.H, a.W});
  a.features = kept({OP, "features"}, features, s.dtype, {a.pixels(), a.grown()});
  Kept z({OP, "z"}, kept_z, s.dtype, a.num_layers, {a.pixels(), a.z_pitch()}, true);
  Kept middle({OP, "middle"}, kept_middle, s.dtype, two_way ? int64_t(z.tensors.size()) : 0, {a.pixels(), a.middle_pitch()});
  double* mean = statistics_of(OP, stats, call.statistics_size);
  call.statistics(mean, mean + call.statistics_size);
  bool empty = grad_y.numel() == 0;
  std::vector<Tensor> grads{channels_last(x, a.N, s.C, a.H, a.W)};
  append_gradients(grads, params, empty);
  if (empty) return grads;
  call.gradients(grads, 1);
  Tensor G = buffer(x, {a.pixels(), a.grown()});
  a.z = z.data(), a.middle = middle.data(), a.G = G.mutable_data_ptr();
  a.y = slice_of(grad);
  a.x.dx = grads[0].mutable_data_ptr(), a.x.dx_pitch = s.C;
  isa().post_dense_block->backward(a);
  return grads;
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("post_dense_block(Tensor x, Tensor[] params, Tensor[] running, int[] frozen, float[] eps, bool two_way, int winograd, bool keep) "
        "-> (Tensor, Tensor, Tensor[], Tensor[], Tensor)");
  m.def("post_dense_block_backward(Tensor grad_y, Tensor x, Tensor features, Tensor[] z, Tensor[] middle, Tensor stats, Tensor[] params, "
        "Tensor[] running, int[] frozen, float[] eps, bool two_way, int winograd) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("post_dense_block", TORCH_BOX(&csp::post_dense_block));
  m.impl("post_dense_block_backward", TORCH_BOX(&csp::post_dense_block_backward));
}
