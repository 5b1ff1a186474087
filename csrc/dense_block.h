// A dense block's arguments at the operators' door, checked.
#pragma once
#include <optional>
#include "tensors.h"

namespace csp {

// The arguments that forward, backward and inference share, checked.
struct DenseBlockCall {
  DenseBlock block{};
  std::vector<DenseLayer> layers;

  DenseBlockCall(const char* op, const Tensor& x, int64_t in_channels, const std::vector<Tensor>& params, const std::vector<Tensor>& running,
       const std::vector<int64_t>* frozen, const std::vector<double>& eps, int64_t winograd) {
    Shape s(op, x);
    STD_TORCH_CHECK(!params.empty() && params.size() % 6 == 0, op, ": params must hold 6 tensors a layer, got ", params.size());
    size_t L = params.size() / 6;
    STD_TORCH_CHECK(eps.size() == 2 * L, op, ": eps must hold 2 numbers a layer");
    STD_TORCH_CHECK(!frozen || frozen->size() == 2 * L, op, ": frozen must hold 2 flags a layer");
    STD_TORCH_CHECK(winograd == 2 || winograd == 4, op, ": winograd must be 2 or 4, got ", winograd);
    block.storage = storage_of(op, x);
    block.N = s.N, block.H = s.H, block.W = s.W, block.in_channels = in_channels, block.x_pitch = s.pitch;
    block.bottleneck = params[2].size(0), block.growth = params[5].size(0), block.num_layers = int64_t(L);
    STD_TORCH_CHECK(block.growth <= 4096, op, ": growth rate above 4096");
    block.winograd = int(winograd);
    block.parallel = parallel();
    layers.resize(L);
    auto pointer = [&](const Tensor& t, int64_t numel, const char* name) { return parameter(op, x, t, numel, name); };
    size_t r = 0;
    for (size_t l = 0; l < L; l++) {
      DenseLayer& p = layers[l];
      int64_t K = block.prefix(int64_t(l)), b = block.bottleneck, g = block.growth;
      p.gamma1 = pointer(params[6 * l], K, "norm1.weight"), p.beta1 = pointer(params[6 * l + 1], K, "norm1.bias");
      p.w1 = pointer(params[6 * l + 2], b * K, "conv1.weight");
      p.gamma2 = pointer(params[6 * l + 3], b, "norm2.weight"), p.beta2 = pointer(params[6 * l + 4], b, "norm2.bias");
      p.w2_channels_last = is_channels_last(params[6 * l + 5]);
      p.w2 = parameter(op, x, params[6 * l + 5], 9 * g * b, "conv2.weight", p.w2_channels_last);
      p.eps1 = eps[2 * l], p.eps2 = eps[2 * l + 1];
      auto take = [&](int64_t n, const void*& mean, const void*& var) {
        STD_TORCH_CHECK(r + 2 <= running.size(), op, ": running lacks statistics of a frozen norm");
        mean = pointer(running[r], n, "running_mean"), var = pointer(running[r + 1], n, "running_var"), r += 2;
      };
      if (!frozen || (*frozen)[2 * l]) take(K, p.mean1, p.var1);
      if (!frozen || (*frozen)[2 * l + 1]) take(b, p.mean2, p.var2);
    }
    STD_TORCH_CHECK(r == running.size(), op, ": running holds more statistics than there are frozen norms");
    block.layers = layers.data();
  }
  bool empty() const { return block.pixels() == 0; }
  void gradients(std::vector<Tensor>& grads, size_t at) {
    for (DenseLayer& p : layers)
      for (void** slot : {&p.dgamma1, &p.dbeta1, &p.dw1, &p.dgamma2, &p.dbeta2, &p.dw2}) *slot = grads[at++].mutable_data_ptr();
  }
  void dropout(double rate, const std::optional<Tensor>& seed) {
    STD_TORCH_CHECK(rate >= 0 && rate <= 1, "dense_block: drop_rate must be in [0, 1], got ", rate);
    STD_TORCH_CHECK(rate == 0 || seed.has_value(), "dense_block: drop_rate > 0 needs a seed");
    block.drop_rate = rate;
    if (rate > 0) block.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
};

}  // namespace csp
