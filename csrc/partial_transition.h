// A partial transition's arguments at the operators' door, checked.
#pragma once
#include "tensors.h"

namespace csp {

enum class Fusion : int { Csp, First, Last };  // transition-concat-transition, concat-transition, transition-concat

inline void check_fusion(const char* op, int64_t fusion) { check_range({op, "fusion"}, fusion, 0, 2); }
inline size_t transition_params(int64_t fusion) { return Fusion(fusion) == Fusion::Csp ? 6 : 3; }

struct TransitionCall {
  PartialTransition transition{};
  TransitionConv t{}, u{};
  int64_t statistics_size = 0;
  const bool has_t, has_u;

  // The last parameters of p: norm weight, norm bias, conv weight of T (unless first), then of U (unless last).
  TransitionCall(Slice part, Slice dense, const Shape& s, Parameters& p, int64_t fusion, bool post, bool pool, Slice grown = {})
      : has_t(Fusion(fusion) != Fusion::First), has_u(Fusion(fusion) != Fusion::Last) {
    PartialTransition& a = transition;
    a.parallel = parallel(), a.storage = storage_of(s.dtype);
    a.N = s.N, a.H = s.H, a.W = s.W, a.post = post, a.pool = pool, a.part = part, a.dense = dense, a.grown = grown;
    const int64_t features = dense.channels + grown.channels;
    auto fill = [&](TransitionConv& c, int64_t in) {
      c.out = p.rows(2, "conv.weight", in, 1);
      const int64_t n = post ? c.out : in;
      c.norm.gamma = p.next("norm.weight", {n}), c.norm.beta = p.next("norm.bias", {n});
      c.weight = p.next("conv.weight", {c.out, in, 1, 1});
      p.next_norm(n, c.norm.eps, c.norm.running_mean, c.norm.running_var);
      statistics_size += n;
    };
    if (has_t) fill(t, features);
    if (has_u) fill(u, part.channels + (has_t ? t.out : features));
    p.end();
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

inline void* pointer_or_null(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

}  // namespace csp
