// A dense block's arguments at the operators' door, checked.
#pragma once
#include <optional>
#include "tensors.h"

namespace csp {

// The arguments that forward, backward and inference share, checked.
struct DenseBlockCall {
  DenseBlock block{};
  std::vector<DenseLayer> layers;

  // s: of the image, of which in_channels enter.
  DenseBlockCall(const Shape& s, int64_t in_channels, Parameters& p, int64_t winograd) : layers(p.layers) {
    check_winograd(p.op, winograd);
    block.storage = storage_of(s.dtype), block.winograd = int(winograd), block.parallel = parallel();
    block.N = s.N, block.H = s.H, block.W = s.W, block.in_channels = in_channels, block.x_pitch = s.pitch;
    const int64_t b = block.bottleneck = p.rows(2, "conv1.weight", in_channels, 1), g = block.growth = p.rows(5, "conv2.weight", b, 3);
    require(g <= 4096, {p.op, "params", 5, "conv2.weight"}, "got a growth rate of ", g, ", expected at most 4096");
    block.num_layers = int64_t(p.layers);
    for (size_t l = 0; l < p.layers; l++) {
      DenseLayer& layer = layers[l];
      const int64_t K = block.prefix(int64_t(l));
      layer.gamma1 = p.next("norm1.weight", {K}), layer.beta1 = p.next("norm1.bias", {K});
      layer.w1 = p.next("conv1.weight", {b, K, 1, 1});
      layer.gamma2 = p.next("norm2.weight", {b}), layer.beta2 = p.next("norm2.bias", {b});
      layer.w2 = p.next("conv2.weight", g, b, layer.w2_channels_last);
      p.next_norm(K, layer.eps1, layer.mean1, layer.var1), p.next_norm(b, layer.eps2, layer.mean2, layer.var2);
    }
    block.layers = layers.data();
  }
  bool empty() const { return block.pixels() == 0; }
  int64_t columns() const { return block.channels() + block.num_layers * block.bottleneck; }  // of the statistics
  void statistics(double* mean) { block.mean = mean, block.var = mean + columns(); }
  void gradients(std::vector<Tensor>& grads, size_t at) {
    for (DenseLayer& p : layers)
      for (void** slot : {&p.dgamma1, &p.dbeta1, &p.dw1, &p.dgamma2, &p.dbeta2, &p.dw2}) *slot = grads[at++].mutable_data_ptr();
  }
  void dropout(const char* op, double rate, const std::optional<Tensor>& seed) {
    require(rate >= 0 && rate < 1, {op, "drop_rate"}, "got ", rate, ", expected 0 <= drop_rate < 1");
    require(rate == 0 || seed.has_value(), {op, "seed"}, "got none, expected int64 [1] for drop_rate ", rate);
    const void* data = seed ? checked({op, "seed"}, *seed, CODES.int64, {1}) : nullptr;
    block.drop_rate = rate;
    if (rate > 0) block.seed = uint64_t(*static_cast<const int64_t*>(data));
  }
};

}  // namespace csp
