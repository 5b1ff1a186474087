// The partial transition's operators on CPU tensors.
#include "partial_transition.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

namespace csp {
namespace {

TransitionCall call_of(const char* op, const std::optional<Tensor>& part, const Tensor& dense, const std::vector<Tensor>& params,
                       const std::vector<Tensor>& running, const std::vector<int64_t>& frozen, const std::vector<double>& eps, int64_t fusion,
                       bool post, bool pool) {
  const Shape s = first_image({op, "dense"}, dense);
  const Slice bypass = part ? slice_of(image({op, "part"}, *part, s.dtype, {s.N, ANY, s.H, s.W})) : Slice{};
  check_fusion(op, fusion);
  const size_t expected = transition_params(fusion);
  check_count({op, "params"}, params.size(), expected, "3 tensors a transition");
  Parameters p(op, s.dtype, params, running, &frozen, eps, expected);
  return TransitionCall(bypass, slice_of(s), s, p, fusion, post, pool);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> partial_transition(std::optional<Tensor> part, const Tensor& dense, std::vector<Tensor> params,
                                                              std::vector<Tensor> running, std::vector<int64_t> frozen, std::vector<double> eps,
                                                              int64_t fusion, bool post, bool pool, bool keep) {
  TransitionCall call = call_of("partial_transition", part, dense, params, running, frozen, eps, fusion, post, pool);
  call.link();
  PartialTransition& a = call.transition;
  Tensor y = channels_last(dense, a.N, call.channels(), call.height(), call.width());
  Tensor raw_t = buffer(dense, {keep ? call.raw_t_size() : 0}), raw_u = buffer(dense, {keep ? call.raw_u_size() : 0});
  Tensor stats = statistics(dense, call.statistics_size);
  double* mean = static_cast<double*>(stats.mutable_data_ptr());
  call.statistics(mean, mean + call.statistics_size);
  call.raw(pointer_or_null(raw_t), pointer_or_null(raw_u));
  a.y = {nullptr, 0, call.channels(), y.mutable_data_ptr(), call.channels()};
  if (y.numel() > 0) isa().partial_transition->forward(a);
  return {y, raw_t, raw_u, stats};
}

std::vector<Tensor> partial_transition_backward(const Tensor& grad_y, std::optional<Tensor> part, const Tensor& dense, std::vector<Tensor> params,
                                                std::vector<Tensor> running, const Tensor& raw_t, const Tensor& raw_u, const Tensor& stats,
                                                std::vector<int64_t> frozen, std::vector<double> eps, int64_t fusion, bool post, bool pool) {
  constexpr const char* OP = "partial_transition_backward";
  TransitionCall call = call_of(OP, part, dense, params, running, frozen, eps, fusion, post, pool);
  call.link();
  PartialTransition& a = call.transition;
  const int32_t dtype = dtype_of(dense);
  const Shape grad = image({OP, "grad_y"}, grad_y, dtype, {a.N, call.channels(), call.height(), call.width()});
  call.raw(kept({OP, "raw_t"}, raw_t, dtype, {call.raw_t_size()}), kept({OP, "raw_u"}, raw_u, dtype, {call.raw_u_size()}));
  double* mean = statistics_of(OP, stats, call.statistics_size);
  call.statistics(mean, mean + call.statistics_size);
  bool empty = grad_y.numel() == 0;
  auto fresh = [&](const Tensor& like, int64_t C) { return channels_last(like, a.N, C, a.H, a.W); };
  std::vector<Tensor> grads{part ? fresh(*part, a.part.channels) : buffer(dense, {0}), fresh(dense, a.dense.channels)};
  append_gradients(grads, params, empty);
  if (empty) return grads;
  a.part.dx = pointer_or_null(grads[0]), a.part.dx_pitch = a.part.channels;
  a.dense.dx = grads[1].mutable_data_ptr(), a.dense.dx_pitch = a.dense.channels;
  a.y = slice_of(grad);
  call.gradients(grads, 2);
  isa().partial_transition->backward(a);
  return grads;
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("partial_transition(Tensor? part, Tensor dense, Tensor[] params, Tensor[] running, int[] frozen, float[] eps, int fusion, "
        "bool post, bool pool, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("partial_transition_backward(Tensor grad_y, Tensor? part, Tensor dense, Tensor[] params, Tensor[] running, Tensor raw_t, "
        "Tensor raw_u, Tensor stats, int[] frozen, float[] eps, int fusion, bool post, bool pool) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("partial_transition", TORCH_BOX(&csp::partial_transition));
  m.impl("partial_transition_backward", TORCH_BOX(&csp::partial_transition_backward));
}
