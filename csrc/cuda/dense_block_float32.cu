// Launchers of the float32 3x3 kernels: which tile, how many blocks, what of the workspace.
#include "dense_block_float32.h"
#include "device/float32_dgrad.cuh"
#include "device/float32_forward.cuh"
#include "device/float32_wgrad.cuh"
#include "device/reduce.cuh"
#include "tiles.h"

namespace csp::cuda::float32 {
namespace {

// 256 pixels by 8 J columns; fewer of either where there are few pixels.
using ForwardTiles = Tiles<Tile<4, 2, 2, 1, 4>, Tile<2, 2, 2, 1, 4>, Tile<4, 2, 2, 1, 3>, Tile<4, 2, 2, 1, 2>, Tile<2, 4, 1, 1, 2>,
                              Tile<4, 2, 2, 1, 1>, Tile<2, 4, 1, 1, 1>>;
// 256 pixels by 64 or 32 columns, 64 by 32.
using DgradTiles = Tiles<Tile<4, 2, 2, 2, 4>, Tile<4, 2, 2, 1, 4>, Tile<1, 4, 1, 1, 4>>;
using WgradTiles = Tiles<WgradTile<2, 2>, WgradTile<1, 3>, WgradTile<1, 2>, WgradTile<1, 1>>;

template <class F> cudaError_t multiplied(csp::cuda::Type type, F f) {
  return type == csp::cuda::Type::TensorFloat32 ? f(Tf32{}) : f(Ieee{});
}

struct Plan {
  int tile = -1;
  int columns = 1, blocks = 0;  // blocks of columns, blocks that share the tiles of pixels
  int64_t weight_bytes = 0, partial_bytes = 0;
};

// Blocks at a time on the device: two of up to 128 threads a multiprocessor where shared memory allows, 1 KiB of which each block costs
// beside its own. Registers allow no more threads.
template <class C> int64_t places(const Device& device, int64_t shared_bytes) {
  const bool two = C::THREADS <= 128 && (device.shared_bytes + 1024) / (shared_bytes + 1024) >= 2;
  return device.multiprocessors * (two ? 2 : 1);
}
template <class C> int blocks_for(const Layer& layer, int64_t places, int64_t columns) {
  const int64_t share = places / columns, tiles = map_of<C>(layer.images).tiles;
  return int(share < 1 ? 1 : share < tiles ? share : tiles);
}
template <class C> int64_t rounds_of(const Layer& layer, int64_t places, int64_t columns) {
  return ceil_div(map_of<C>(layer.images).tiles, blocks_for<C>(layer, places, columns)) * ceil_div(columns, places);
}

// Of the tiles of forward (entering: bottleneck) or dgrad (entering: growth).
template <class List> Plan plan_product(List tiles, const Layer& layer, const Device& device, bool forward) {
  const int entering = int(forward ? layer.bottleneck : layer.growth), leaving = int(forward ? layer.growth : layer.bottleneck);
  Plan plan;
  plan.tile = cheapest(tiles, [&](auto tile) -> int64_t {  // a scheduler's multiply-adds or the loads that feed them, staging
    using C = decltype(tile);
    const int64_t shared = C::shared_bytes(entering, !forward), columns = ceil_div(leaving, C::COLUMNS), at = places<C>(device, shared);
    if (shared > device.shared_bytes) return -1;
    const int64_t products = 3 * C::R * C::J, loads = 6 * C::J + 2 * C::R + 4;
    const int64_t staging = C::Halo::LOADS * (forward ? 1 : 2) + 2, warps = C::WARPS * (at / device.multiprocessors);
    return rounds_of<C>(layer, at, columns) * ceil_div(warps, 8) * ((products > loads ? products : loads) + staging);
  }).tile;
  with_tile(tiles, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    plan.columns = int(ceil_div(leaving, C::COLUMNS));
    plan.blocks = blocks_for<C>(layer, places<C>(device, C::shared_bytes(entering, !forward)), plan.columns);
    plan.weight_bytes = whole_lines(int64_t(plan.columns) * C::steps(entering) * C::SLAB_BYTES);
    plan.partial_bytes = int64_t(plan.blocks) * (forward ? 3 : 2) * leaving * 4;
    return cudaSuccess;
  });
  return plan;
}
Plan plan_forward(const Layer& layer, const Device& device) {
  return remembered(key_of(layer, device), [&] { return plan_product(ForwardTiles{}, layer, device, true); });
}
Plan plan_dgrad(const Layer& layer, const Device& device) {
  return remembered(key_of(layer, device), [&] { return plan_product(DgradTiles{}, layer, device, false); });
}

Plan new_wgrad_plan(const Layer& layer, const Device& device) {
  Plan plan;
  plan.tile = cheapest(WgradTiles{}, [&](auto tile) -> int64_t {  // products, h once more for each block of columns
    using C = decltype(tile);
    return C::SHARED_BYTES > device.shared_bytes ? -1 : ceil_div(layer.growth, C::COLUMNS) * (C::COLUMNS + 8);
  }).tile;
  with_tile(WgradTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    plan.columns = int(ceil_div(layer.growth, C::COLUMNS));
    const int64_t parts = plan.columns * ceil_div(layer.bottleneck, C::CHANNELS);
    plan.blocks = blocks_for<C>(layer, places<C>(device, C::SHARED_BYTES), parts);
    plan.partial_bytes = int64_t(plan.blocks) * 9 * layer.bottleneck * layer.growth * 4;
    return cudaSuccess;
  });
  return plan;
}

Plan plan_wgrad(const Layer& layer, const Device& device) {
  return remembered(key_of(layer, device), [&] { return new_wgrad_plan(layer, device); });
}

const float* floats_of(const View& view) { return static_cast<const float*>(view.data); }

template <class C>
cudaError_t pack_for(const Layer& layer, const Weight& weight, float* to, int columns, bool reversed, cudaStream_t stream) {
  const int b = int(layer.bottleneck), g = int(layer.growth), rows = reversed ? g : b;
  const int64_t out = weight.output_stride, in = weight.input_stride, n = int64_t(columns) * C::steps(rows) * 9 * C::TAP;
  const PackArguments args{weight,          to,   rows,      reversed ? b : g, reversed ? out : in, reversed ? in : out,
                           C::steps(rows), C::J, C::GROUPS, columns,          reversed};
  return multiplied(layer.type, [&](auto type) {
    return launch(pack_float32_kernel<decltype(type)>, dim3(unsigned(ceil_div(n, 256))), 256, 0, stream, args);
  });
}

}  // namespace

const char* unsupported(const Layer& layer, const Device& device) {
  const Images& i = layer.images;
  if (layer.bottleneck % 4 || layer.growth % 4) return "bottleneck and growth must be multiples of 4";
  if (layer.growth > 4096 || layer.bottleneck > 1 << 16) return "too many channels";
  if (i.n < 1 || i.h < 1 || i.w < 1) return "no pixels";
  if (i.n * (i.h + 8) * (i.w + 8) >= int64_t(1) << 30) return "2^30 pixels or more";
  const bool fits =
      plan_forward(layer, device).tile >= 0 && plan_dgrad(layer, device).tile >= 0 && plan_wgrad(layer, device).tile >= 0;
  return fits ? nullptr : "too little shared memory";
}

const char* unsupported(const View& view) {
  if (view.pitch % 4 || view.pitch >= int64_t(1) << 31) return "pixels must be a multiple of 4 channels apart";
  return uintptr_t(view.data) % 16 ? "not 16-byte aligned" : nullptr;
}

const char* unsupported(const Weight& weight) { return weight.float32 ? nullptr : "the weight must be float32"; }

int64_t workspace_bytes(const Layer& layer, const Device& device, Pass pass) {
  const Plan plan = pass == Pass::Forward ? plan_forward(layer, device)
                        : pass == Pass::Dgrad ? plan_dgrad(layer, device)
                                              : plan_wgrad(layer, device);
  return plan.weight_bytes + plan.partial_bytes;
}

cudaError_t conv3x3_forward(const Layer& layer, const Device& device, const View& z, const Norm& norm, const Weight& weight,
                            const Dropout& dropout, const Output& out, const Statistics& statistics, void* workspace) {
  const Plan plan = plan_forward(layer, device);
  float *packed = static_cast<float*>(workspace), *partials = packed + plan.weight_bytes / 4;
  const int b = int(layer.bottleneck), g = int(layer.growth);
  cudaError_t error = with_tile(ForwardTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    cudaError_t packing = pack_for<C>(layer, weight, packed, plan.columns, false, device.stream);
    if (packing != cudaSuccess) return packing;
    const ForwardArguments args{map_of<C>(layer.images), floats_of(z), packed, static_cast<float*>(out.data), int(z.pitch),
                                int(out.pitch), b, g, norm, dropout, statistics.data ? partials : nullptr};
    return multiplied(layer.type, [&](auto type) {
      return launch(forward_float32_kernel<decltype(type), C>, dim3(unsigned(plan.blocks), unsigned(plan.columns)), C::THREADS,
                    size_t(C::shared_bytes(b, false)), device.stream, args);
    });
  });
  if (error != cudaSuccess || !statistics.data) return error;
  return merge_statistics({partials, plan.blocks, g, statistics}, device.stream);
}

cudaError_t conv3x3_dgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const Weight& weight, const View& z, const Norm& norm,
                          const Output& out, float* sums, void* workspace) {
  const Plan plan = plan_dgrad(layer, device);
  float *packed = static_cast<float*>(workspace), *partials = packed + plan.weight_bytes / 4;
  const int b = int(layer.bottleneck), g = int(layer.growth);
  cudaError_t error = with_tile(DgradTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    cudaError_t packing = pack_for<C>(layer, weight, packed, plan.columns, true, device.stream);
    if (packing != cudaSuccess) return packing;
    const DgradArguments args{map_of<C>(layer.images), floats_of(features), floats_of(gradient), packed, floats_of(z),
                              static_cast<float*>(out.data), int(features.pitch), int(gradient.pitch), int(z.pitch),
                              int(out.pitch), b, g, correction, dropout, norm, partials};
    return multiplied(layer.type, [&](auto type) {
      return launch(dgrad_float32_kernel<decltype(type), C>, dim3(unsigned(plan.blocks), unsigned(plan.columns)), C::THREADS,
                    size_t(C::shared_bytes(g, true)), device.stream, args);
    });
  });
  if (error != cudaSuccess) return error;
  return sum_slabs({partials, plan.blocks, 2 * b, sums, 2, b, 0, b, 1}, device.stream);
}

cudaError_t conv3x3_wgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const View& z, const Norm& norm,
                          const WeightGradient& dweight, void* workspace) {
  const Plan plan = plan_wgrad(layer, device);
  float* slabs = static_cast<float*>(workspace);
  const int b = int(layer.bottleneck), g = int(layer.growth);
  cudaError_t error = with_tile(WgradTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    const WgradArguments args{map_of<C>(layer.images), floats_of(features), floats_of(gradient), floats_of(z), int(features.pitch),
                              int(gradient.pitch), int(z.pitch), b, g, correction, dropout, norm, slabs};
    const dim3 grid(unsigned(plan.blocks), unsigned(ceil_div(b, C::CHANNELS)), unsigned(plan.columns));
    return multiplied(layer.type, [&](auto type) {
      return launch(wgrad_float32_kernel<decltype(type), C>, grid, C::THREADS, size_t(C::SHARED_BYTES), device.stream, args);
    });
  });
  if (error != cudaSuccess) return error;
  return sum_slabs(
      {slabs, plan.blocks, 9 * b * g, dweight.data, b, g, dweight.tap_stride, dweight.input_stride, dweight.output_stride},
      device.stream);
}

}  // namespace csp::cuda::float32
