// The partial transition's operators on CPU tensors.
#include "partial_transition.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

namespace csp {
namespace {

constexpr const char* OP = "partial_transition";

Slice slice_of(const std::optional<Tensor>& t, const Tensor& like, const Shape& size) {
  if (!t) return {};
  Shape s(OP, *t);
  s.same(OP, size);
  STD_TORCH_CHECK(t->scalar_type() == like.scalar_type() && t->is_cpu(), OP, ": part and dense of different dtype or device");
  return {t->const_data_ptr(), s.pitch, s.C, nullptr, 0};
}

TransitionCall call_of(const std::optional<Tensor>& part, const Tensor& dense, const std::vector<Tensor>& params, const std::vector<Tensor>& running,
                       const std::vector<int64_t>& frozen, const std::vector<double>& eps, int64_t fusion, bool post, bool pool) {
  Shape s(OP, dense);
  STD_TORCH_CHECK(frozen.size() * 3 == params.size() && eps.size() == frozen.size(), OP, ": a flag and an eps for each norm");
  return TransitionCall(OP, dense, slice_of(part, dense, s), slice_of(dense, dense, s), s, params.data(), params.size(), running, 0,
                        frozen.data(), eps.data(), fusion, post, pool);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> partial_transition(std::optional<Tensor> part, const Tensor& dense, std::vector<Tensor> params,
                                                              std::vector<Tensor> running, std::vector<int64_t> frozen, std::vector<double> eps,
                                                              int64_t fusion, bool post, bool pool, bool keep) {
  TransitionCall call = call_of(part, dense, params, running, frozen, eps, fusion, post, pool);
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
  TransitionCall call = call_of(part, dense, params, running, frozen, eps, fusion, post, pool);
  call.link();
  PartialTransition& a = call.transition;
  Shape grad(OP, grad_y);
  STD_TORCH_CHECK(grad.N == a.N && grad.C == call.channels() && grad.H == call.height() && grad.W == call.width() && grad_y.scalar_type() == dense.scalar_type(),
                  OP, "_backward: grad_y must have the shape and dtype of y");
  STD_TORCH_CHECK(raw_t.numel() == call.raw_t_size() && raw_u.numel() == call.raw_u_size(), OP, "_backward: raw outputs of the wrong size");
  bool empty = grad_y.numel() == 0;
  auto fresh = [&](const Tensor& like, int64_t C) { return channels_last(like, a.N, C, a.H, a.W); };
  std::vector<Tensor> grads{part ? fresh(*part, a.part.channels) : buffer(dense, {0}), fresh(dense, a.dense.channels)};
  append_gradients(grads, params, empty);
  if (empty) return grads;
  a.part.dx = pointer_or_null(grads[0]), a.part.dx_pitch = a.part.channels;
  a.dense.dx = grads[1].mutable_data_ptr(), a.dense.dx_pitch = a.dense.channels;
  a.y = {grad_y.const_data_ptr(), grad.pitch, grad.C, nullptr, 0};
  double* mean = const_cast<double*>(static_cast<const double*>(stats.const_data_ptr()));
  call.statistics(mean, mean + call.statistics_size);
  call.raw(pointer_or_null(raw_t), pointer_or_null(raw_u));
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
