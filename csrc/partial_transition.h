// A partial transition's arguments at the operators' door, checked.
#pragma once
#include "tensors.h"

namespace csp {

enum class Fusion : int { Csp, First, Last };  // transition-concat-transition, concat-transition, transition-concat

struct TransitionCall {
  PartialTransition transition{};
  TransitionConv t{}, u{};
  int64_t statistics_size = 0;
  bool has_t, has_u;

  // params: norm weight, norm bias, conv weight of T (unless first), then of U (unless last).
  TransitionCall(const char* op, const Tensor& like, Slice part, Slice dense, const Shape& s, const Tensor* params, size_t count,
                 const std::vector<Tensor>& running, size_t r, const int64_t* frozen, const double* eps, int64_t fusion, bool post, bool pool, Slice grown = {}) {
    STD_TORCH_CHECK(fusion >= 0 && fusion <= 2, op, ": unknown fusion ", fusion);
    Fusion f = Fusion(fusion);
    STD_TORCH_CHECK(count == (f == Fusion::Csp ? 6u : 3u), op, ": params must hold 3 tensors a transition, got ", count);
    PartialTransition& a = transition;
    a.parallel = parallel(), a.storage = storage_of(op, like);
    a.N = s.N, a.H = s.H, a.W = s.W, a.post = post, a.pool = pool, a.part = part, a.dense = dense, a.grown = grown;
    int64_t features = dense.channels + grown.channels;
    auto fill = [&](TransitionConv& c, const Tensor* p, int64_t in, size_t index) {
      c.out = p[2].size(0);
      int64_t n = post ? c.out : in;
      c.weight = parameter(op, like, p[2], c.out * in, "conv.weight");
      c.norm.gamma = parameter(op, like, p[0], n, "norm.weight"), c.norm.beta = parameter(op, like, p[1], n, "norm.bias");
      c.norm.eps = eps[index];
      if (!frozen || frozen[index]) {
        STD_TORCH_CHECK(r + 2 <= running.size(), op, ": running lacks statistics of a frozen norm");
        c.norm.running_mean = parameter(op, like, running[r], n, "running_mean");
        c.norm.running_var = parameter(op, like, running[r + 1], n, "running_var"), r += 2;
      }
      statistics_size += n;
    };
    has_t = f != Fusion::First, has_u = f != Fusion::Last;
    if (has_t) fill(t, params, features, 0);
    if (has_u) fill(u, params + (has_t ? 3 : 0), part.channels + (has_t ? t.out : features), has_t ? 1 : 0);
    STD_TORCH_CHECK(r == running.size(), op, ": running holds more statistics than there are frozen norms");
  }
  void link() { transition.t = has_t ? &t : nullptr, transition.u = has_u ? &u : nullptr; }  // once it no longer moves
  int64_t channels() const { return has_u ? u.out : transition.part.channels + t.out; }  // of the output
  int64_t height() const { return transition.pool ? transition.H / 2 : transition.H; }
  int64_t width() const { return transition.pool ? transition.W / 2 : transition.W; }
  void statistics(double* mean, double* var) {
    int64_t n = 0;
    if (has_t) t.norm.mean = mean, t.norm.var = var, n = transition.post ? t.out : transition.dense.channels;
    u.norm.mean = mean + n, u.norm.var = var + n;
  }
  // What backward needs of the convolutions' raw outputs.
  int64_t raw_t_size() const { return has_t && (has_u || transition.post) ? transition.pixels() * padded_channels(t.out) : 0; }
  int64_t raw_u_size() const { return has_u && transition.post ? transition.pooled() * padded_channels(u.out) : 0; }
  void raw(void* raw_t, void* raw_u) { t.raw = raw_t_size() ? raw_t : nullptr, u.raw = raw_u_size() ? raw_u : nullptr; }
  void gradients(std::vector<Tensor>& grads, size_t at) {
    for (TransitionConv* c : {has_t ? &t : nullptr, has_u ? &u : nullptr}) {
      if (!c) continue;
      c->norm.dgamma = grads[at].mutable_data_ptr(), c->norm.dbeta = grads[at + 1].mutable_data_ptr(), c->dweight = grads[at + 2].mutable_data_ptr();
      at += 3;
    }
  }
};

inline void* pointer_or_null(const Tensor& t) { return t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr; }

}  // namespace csp
