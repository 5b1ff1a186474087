// Post-activation dense layers' arguments at the operators' door, checked.
#pragma once
#include "tensors.h"

namespace csp {

struct PostDenseBlockCall {
  PostDenseBlock block{};
  std::vector<PostLayer> layers;
  std::vector<BatchNorm> slice_norms;  // once the layers are complete
  int64_t statistics_size = 0;

  static int64_t convs(int branches) { return branches == 1 ? 2 : 5; }  // of a layer, 3 tensors each

  // params: conv weight, norm weight, norm bias of each convolution, as run: branch 1, branch 2.
  PostDenseBlockCall(const char* op, const Tensor& like, const Shape& s, Slice x, const std::vector<Tensor>& params, const std::vector<Tensor>& running,
                     const int64_t* frozen, const double* eps, bool two_way, int64_t winograd) {
    PostDenseBlock& a = block;
    a.branches = two_way ? 2 : 1;
    size_t each = size_t(3 * convs(a.branches));
    STD_TORCH_CHECK(!params.empty() && params.size() % each == 0, op, ": params must hold ", each, " tensors a layer, got ", params.size());
    STD_TORCH_CHECK(winograd == 2 || winograd == 4, op, ": winograd must be 2 or 4, got ", winograd);
    a.parallel = parallel(), a.storage = storage_of(op, like), a.winograd = int(winograd);
    a.N = s.N, a.H = s.H, a.W = s.W, a.x = x;
    a.growth = params[3].size(0), a.num_layers = int64_t(params.size() / each);
    layers.resize(params.size() / each);
    size_t at = 0, norm = 0, r = 0;
    auto fill = [&](ConvNorm& c, int64_t out, int64_t in, int64_t taps) {
      c.channels_last = taps == 9 && is_channels_last(params[at]);
      c.weight = parameter(op, like, params[at], out * in * taps, "conv.weight", c.channels_last);
      c.norm.gamma = parameter(op, like, params[at + 1], out, "norm.weight"), c.norm.beta = parameter(op, like, params[at + 2], out, "norm.bias");
      c.norm.eps = eps[norm];
      if (frozen[norm++]) {
        STD_TORCH_CHECK(r + 2 <= running.size(), op, ": running lacks statistics of a frozen norm");
        c.norm.running_mean = parameter(op, like, running[r], out, "running_mean");
        c.norm.running_var = parameter(op, like, running[r + 1], out, "running_var"), r += 2;
      }
      at += 3, statistics_size += out;
    };
    int64_t g = a.growth;
    for (size_t l = 0; l < layers.size(); l++) {
      int64_t b = layers[l].bottleneck = params[at].size(0);
      a.bottleneck = b > a.bottleneck ? b : a.bottleneck;
      int64_t K = x.channels + int64_t(l) * a.branches * g;
      fill(layers[l].reduce[0], b, K, 1), fill(layers[l].first[0], g, b, 9);
      if (two_way) fill(layers[l].reduce[1], b, K, 1), fill(layers[l].first[1], g, b, 9), fill(layers[l].second, g, g, 9);
    }
    STD_TORCH_CHECK(r == running.size(), op, ": running holds more statistics than there are frozen norms");
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
