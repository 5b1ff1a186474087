// What the operators of dense layers in the order convolution, batch norm, ReLU hand to the kernels.
#pragma once
#include "call.h"

namespace csp {

struct ConvNorm {        // a convolution and the batch norm that follows it
  const void* weight;
  bool channels_last;    // weight and dweight of a 3x3 lie as [g, 3, 3, b]
  void* dweight;
  BatchNorm norm;
};

// One branch: 1x1 -> 3x3, or two: the second 1x1 -> 3x3 -> 3x3 (PeleeNet). All branches give `growth` channels.
struct PostLayer {
  int64_t bottleneck;    // b
  ConvNorm reduce[2];    // [b, K, 1, 1]
  ConvNorm first[2];     // [g, b, 3, 3]
  ConvNorm second;       // [g, g, 3, 3], of the second branch
};

struct PostDenseBlock {
  Parallel parallel;
  Storage storage;
  int64_t N, H, W, growth, bottleneck, num_layers;  // the widest bottleneck
  int branches, winograd;
  const PostLayer* layers;
  Slice x;               // dx: backward adds to it
  void* features;        // [P, grown()]: raw outputs of the layers, in order of layers and branches
  void* const* z;        // L of [P][z_pitch()]: raw bottlenecks, null: not kept
  void* const* middle;   // L of [P][middle_pitch()]: raw, between the second branch's 3x3s, null: none, or not kept
  void* G;               // backward, [P, grown()]: gamma * rstd * dn of what reads the features; the sums in dgamma, dbeta
  Slice y;               // [P, C]: the activated output and its gradient, where there is one

  int64_t pixels() const { return N * H * W; }
  int64_t slices() const { return num_layers * branches; }
  int64_t grown() const { return slices() * growth; }
  int64_t channels() const { return x.channels + grown(); }
  int64_t z_pitch() const { return branches * padded_channels(bottleneck); }
  int64_t middle_pitch() const { return branches > 1 ? padded_channels(growth) : 0; }
  // The norm of slice i of the features.
  const BatchNorm& norm(int64_t i) const {
    const PostLayer& l = layers[i / branches];
    return i % branches ? l.second.norm : l.first[0].norm;
  }
};

struct PostDenseBlockKernels {
  void (*forward)(const PostDenseBlock&);   // y.dx null: the features alone
  void (*backward)(const PostDenseBlock&);  // y.x null: starts from G
};

}  // namespace csp
