// Post-activation dense layers' arguments at the operators' door, checked.
#pragma once
#include "tensors.h"

namespace csp {

struct PostDenseBlockCall {
  PostDenseBlock block{};
  std::vector<PostLayer> layers;
  std::vector<BatchNorm> slice_norms;  // once the layers are complete
  int64_t statistics_size = 0;

  static size_t params(bool two_way) { return two_way ? 15 : 6; }  // of a layer, 3 a convolution

  // p: conv weight, norm weight, norm bias of each convolution, as run: branch 1, branch 2. x: what enters, of the image s.
  PostDenseBlockCall(const Shape& s, Slice x, Parameters& p, bool two_way, int64_t winograd) : layers(p.layers) {
    PostDenseBlock& a = block;
    check_winograd(p.op, winograd);
    a.branches = two_way ? 2 : 1;
    a.parallel = parallel(), a.storage = storage_of(s.dtype), a.winograd = int(winograd);
    a.N = s.N, a.H = s.H, a.W = s.W, a.x = x;
    const int64_t g = a.growth = p.rows(3, "conv.weight", ANY, 3);
    a.num_layers = int64_t(p.layers);
    auto fill = [&](ConvNorm& c, int64_t out, int64_t in, int64_t taps) {
      c.channels_last = false;
      c.weight = taps == 3 ? p.next("conv.weight", out, in, c.channels_last) : p.next("conv.weight", {out, in, 1, 1});
      c.norm.gamma = p.next("norm.weight", {out}), c.norm.beta = p.next("norm.bias", {out});
      p.next_norm(out, c.norm.eps, c.norm.running_mean, c.norm.running_var);
      statistics_size += out;
    };
    for (size_t l = 0; l < layers.size(); l++) {
      const int64_t K = x.channels + int64_t(l) * a.branches * g;
      const int64_t b = layers[l].bottleneck = p.rows(0, "conv.weight", K, 1);
      a.bottleneck = b > a.bottleneck ? b : a.bottleneck;
      fill(layers[l].reduce[0], b, K, 1), fill(layers[l].first[0], g, b, 3);
      if (two_way) fill(layers[l].reduce[1], b, K, 1), fill(layers[l].first[1], g, b, 3), fill(layers[l].second, g, g, 3);
    }
    a.layers = layers.data();
  }
  template <class F> void each(F f) {  // f(convolution, its output channels), in the order of params
    int64_t g = block.growth;
    for (PostLayer& l : layers) {
      int64_t b = l.bottleneck;
      f(l.reduce[0], b), f(l.first[0], g);
      if (block.branches == 2) f(l.reduce[1], b), f(l.first[1], g), f(l.second, g);
    }
  }
  void statistics(double* mean, double* var) {
    each([&](ConvNorm& c, int64_t channels) { c.norm.mean = mean, c.norm.var = var, mean += channels, var += channels; });
  }
  void gradients(std::vector<Tensor>& grads, size_t at) {
    each([&](ConvNorm& c, int64_t) {
      c.dweight = grads[at].mutable_data_ptr(), c.norm.dgamma = grads[at + 1].mutable_data_ptr(), c.norm.dbeta = grads[at + 2].mutable_data_ptr(), at += 3;
    });
  }
  const BatchNorm* norms() {  // of the slices
    slice_norms.clear();
    for (int64_t i = 0; i < block.slices(); i++) slice_norms.push_back(block.norm(i));
    return slice_norms.data();
  }
};

}  // namespace csp
