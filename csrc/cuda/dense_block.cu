// Launchers of the 3x3 kernels: which tile, how many blocks, what of the workspace.
#include "dense_block.h"
#include "device/conv3x3_dgrad.cuh"
#include "device/conv3x3_forward.cuh"
#include "device/conv3x3_wgrad.cuh"
#include "device/reduce.cuh"
#include "tiles.h"

namespace csp::cuda {
namespace {

// Columns J times 8, rows R a warp: fewer rows where there are few pixels. 256 pixels at most.
template <int J, int R> using ForwardTile = Conv3x3Tile<R, 2, 2, 1, 2, J, 32>;
// For small maps: 128 / PARTS pixels, their channels by 16 PARTS a step, so that there are more tiles and fewer steps.
template <int J, int PARTS> using DeepTile = Conv3x3Tile<1, 8 / PARTS, 1, 1, PARTS, J, 16 * PARTS>;
using ForwardTiles = Tiles<ForwardTile<4, 4>, ForwardTile<4, 2>, ForwardTile<4, 1>, ForwardTile<3, 4>, ForwardTile<3, 2>,
                           ForwardTile<3, 1>, ForwardTile<2, 4>, ForwardTile<2, 2>, ForwardTile<2, 1>, ForwardTile<1, 4>,
                           ForwardTile<1, 2>, ForwardTile<1, 1>, DeepTile<4, 4>, DeepTile<2, 4>, DeepTile<1, 4>, DeepTile<4, 8>,
                           DeepTile<2, 8>, DeepTile<1, 8>>;
// 128 pixels by GROUPS times 32 columns; 16 channels a step where 32 would multiply zeros. Fewer ROWS for small maps.
template <int GROUPS, int R, int DEPTH, int ROWS = 8> using DgradTile = Conv3x3Tile<R, ROWS / R, 1, GROUPS, 1, 4, DEPTH>;
using DgradTiles = Tiles<DgradTile<4, 4, 32>, DgradTile<3, 4, 32>, DgradTile<2, 2, 32>, DgradTile<1, 1, 32>, DgradTile<4, 4, 16>,
                         DgradTile<3, 4, 16>, DgradTile<2, 2, 16>, DgradTile<1, 1, 16>, DgradTile<1, 1, 32, 4>,
                         DgradTile<1, 1, 32, 2>>;
using WgradTiles = Tiles<WgradTile<4>, WgradTile<3>, WgradTile<2>, WgradTile<1>>;

template <class F, class... C> int64_t cost_of(Tiles<C...>, int index, F cost) {
  int64_t found = -1;
  with_tile(Tiles<C...>{}, index, [&](auto tile) {
    found = cost(tile);
    return cudaSuccess;
  });
  return found;
}

// One launch: tile, and the grid of its blocks, one a multiprocessor.
struct Plan {
  int tile = -1;
  int columns = 1, blocks = 0;  // blocks of columns, blocks that share the tiles of pixels
  int splits = 1, split_channels = 0, sum_blocks = 0;  // of forward's channels; blocks that add the splits
  int64_t weight_bytes = 0, partial_bytes = 0, sum_bytes = 0;
};

template <class C> int blocks_of(const Layer& layer, const Device& device, int64_t columns) {
  int64_t share = device.multiprocessors / columns, tiles = map_of<C>(layer.images).tiles;
  return int(share < 1 ? 1 : share < tiles ? share : tiles);
}
// Rounds of all blocks over the tiles.
template <class C> int64_t rounds(const Layer& layer, const Device& device, int64_t columns) {
  return ceil_div(map_of<C>(layer.images).tiles, blocks_of<C>(layer, device, columns)) *
         ceil_div(columns, device.multiprocessors);
}

// Blocks of pixels that add splits.
int sum_blocks(int64_t pixels, int64_t outputs, const Device& device) {
  const int64_t share = device.multiprocessors / ceil_div(outputs, SplitSum::COLUMNS), all = ceil_div(pixels, SplitSum::PIXELS);
  return int(share < 1 ? 1 : share < all ? share : all);
}

// Small maps. Where the usual choice has all tiles in one round, latencies, weights and launches count beside products. The costs below
// are nanoseconds on an H100 (1.7 GHz), estimated and not measured; one more kernel costs Device::launch_ns.
constexpr int64_t PRODUCT_NS = 62;  // of each of 8 warps: 16 rows, 16 channels, 8 columns, nine taps; 1.5 clocks an m16n8k16. Or as long
constexpr int64_t STEP_NS = 500;    // a step at least: chunks come from L2 or memory, are stored, a barrier, a chain of products
constexpr int64_t BYTES_A_NS = 41;  // of L2, a multiprocessor's share when all read: 5.5 TB/s in all

int64_t step_ns(int64_t products) { return products * PRODUCT_NS > STEP_NS ? products * PRODUCT_NS : STEP_NS; }

// Weights into shared memory, steps, and for splits: sums written and read, another kernel.
template <class C> int64_t forward_ns(const Layer& layer, const Device& device, int splits) {
  const int b = int(layer.bottleneck), g = int(layer.growth), steps = int(ceil_div(C::steps(b), splits));
  if (g % C::COLUMNS || C::shared_bytes(steps * C::DEPTH) > device.shared_bytes) return -1;
  if (splits > 1 && (!C::SPLITS || ceil_div(C::steps(b), steps) != splits)) return -1;  // some would be empty
  const int64_t sums = 8 * splits * layer.images.n * layer.images.h * layer.images.w * g;
  const int64_t second = splits > 1 ? device.launch_ns + sums / (BYTES_A_NS * device.multiprocessors) : 0;
  return C::slabs(steps * C::DEPTH) * C::SLAB_BYTES / BYTES_A_NS + second +
         rounds<C>(layer, device, g / C::COLUMNS * splits) * steps * step_ns(C::R * C::J + (C::LOADS + 1) / 2 + 2);
}
template <class C> int64_t dgrad_ns(const Layer& layer, const Device& device) {
  const int g = int(layer.growth), products = C::DEPTH / 16 * C::GROUPS * C::ROWS / 2, staging = C::LOADS * C::THREADS / 128;
  if (C::shared_bytes(g) > device.shared_bytes) return -1;
  return C::slabs(g) * C::SLAB_BYTES / BYTES_A_NS +
         rounds<C>(layer, device, ceil_div(layer.bottleneck, C::COLUMNS)) * C::steps(g) * step_ns(products + staging + 1);
}
template <class C> int64_t wgrad_ns(const Layer& layer, const Device& device) {  // and a slab of sums
  if (layer.growth % C::COLUMNS || C::SHARED_BYTES > device.shared_bytes) return -1;
  const int64_t blocks = layer.growth / C::COLUMNS * ceil_div(layer.bottleneck, C::CHANNELS);
  return rounds<C>(layer, device, blocks) * step_ns(4 * C::J + C::LOADS) + 36 * C::CHANNELS * C::COLUMNS / BYTES_A_NS;
}

// The usual choices, by costs of their own.
Choice usual_forward(const Layer& layer, const Device& device) {
  return cheapest(ForwardTiles{}, [&](auto tile) -> int64_t {  // products, staged rows, a constant
    using C = decltype(tile);
    if (C::HALVES > 2 || layer.growth % C::COLUMNS || C::shared_bytes(int(layer.bottleneck)) > device.shared_bytes) return -1;
    return rounds<C>(layer, device, layer.growth / C::COLUMNS) * (C::R * C::J + C::R + 2);
  });
}
Choice usual_dgrad(const Layer& layer, const Device& device) {
  return cheapest(DgradTiles{}, [&](auto tile) -> int64_t {  // products and staging of each slab, a barrier a step
    using C = decltype(tile);
    const int g = int(layer.growth), cost = 4 * C::slabs(g) * (C::GROUPS + 1) + C::steps(g);
    if (C::ROWS < 8 || C::shared_bytes(g) > device.shared_bytes) return -1;
    return rounds<C>(layer, device, ceil_div(layer.bottleneck, C::COLUMNS)) * cost;
  });
}
Choice usual_wgrad(const Layer& layer, const Device& device) {
  return cheapest(WgradTiles{}, [&](auto tile) -> int64_t {  // the widest
    using C = decltype(tile);
    return layer.growth % C::COLUMNS || C::SHARED_BYTES > device.shared_bytes ? -1 : layer.growth / C::COLUMNS;
  });
}
// The usual choice, unless `ns` finds a better one for what is one round; ns(tile, splits).
template <class List, class Rounds, class F> Choice choose(List list, Choice usual, Rounds rounds_of, int most_splits, F ns) {
  if (usual.tile < 0 || cost_of(list, usual.tile, rounds_of) > 1) return usual;
  usual.cost = cost_of(list, usual.tile, [&](auto tile) { return ns(tile, 1); });
  for (int splits = 1; splits <= most_splits; splits++)
    usual.take(cheapest(list, [&](auto tile) { return ns(tile, splits); }, splits));
  return usual;
}

Choice choose_forward(const Layer& layer, const Device& device) {
  auto rounds_of = [&](auto tile) { return rounds<decltype(tile)>(layer, device, layer.growth / decltype(tile)::COLUMNS); };
  return choose(ForwardTiles{}, usual_forward(layer, device), rounds_of, SplitSum::MOST,
                [&](auto tile, int splits) { return forward_ns<decltype(tile)>(layer, device, splits); });
}
Choice choose_dgrad(const Layer& layer, const Device& device) {
  auto rounds_of = [&](auto tile) { return rounds<decltype(tile)>(layer, device, ceil_div(layer.bottleneck, decltype(tile)::COLUMNS)); };
  return choose(DgradTiles{}, usual_dgrad(layer, device), rounds_of, 1,
                [&](auto tile, int) { return dgrad_ns<decltype(tile)>(layer, device); });
}
Choice choose_wgrad(const Layer& layer, const Device& device) {
  auto rounds_of = [&](auto tile) {
    using C = decltype(tile);
    return rounds<C>(layer, device, layer.growth / C::COLUMNS * ceil_div(layer.bottleneck, C::CHANNELS));
  };
  return choose(WgradTiles{}, usual_wgrad(layer, device), rounds_of, 1,
                [&](auto tile, int) { return wgrad_ns<decltype(tile)>(layer, device); });
}

Plan new_forward_plan(const Layer& layer, const Device& device) {
  Plan plan;
  const Choice choice = choose_forward(layer, device);
  plan.tile = choice.tile, plan.splits = choice.splits;
  with_tile(ForwardTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    const int64_t pixels = layer.images.n * layer.images.h * layer.images.w, steps = C::steps(int(layer.bottleneck));
    plan.columns = int(layer.growth / C::COLUMNS), plan.blocks = blocks_of<C>(layer, device, plan.columns * plan.splits);
    plan.split_channels = int(ceil_div(steps, plan.splits)) * C::DEPTH;
    plan.weight_bytes = whole_lines(int64_t(plan.columns) * C::slabs(int(layer.bottleneck)) * C::SLAB_BYTES);
    if (plan.splits > 1) {
      plan.sum_blocks = sum_blocks(pixels, layer.growth, device);
      plan.sum_bytes = whole_lines(plan.splits * pixels * layer.growth * 4);
    }
    plan.partial_bytes = int64_t(plan.splits > 1 ? plan.sum_blocks : plan.blocks) * 3 * layer.growth * 4;
    return cudaSuccess;
  });
  return plan;
}

Plan new_dgrad_plan(const Layer& layer, const Device& device) {
  Plan plan;
  plan.tile = choose_dgrad(layer, device).tile;
  with_tile(DgradTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    plan.columns = int(ceil_div(layer.bottleneck, C::COLUMNS)), plan.blocks = blocks_of<C>(layer, device, plan.columns);
    plan.weight_bytes = whole_lines(int64_t(plan.columns) * C::slabs(int(layer.growth)) * C::SLAB_BYTES);
    plan.partial_bytes = int64_t(plan.blocks) * 2 * layer.bottleneck * 4;
    return cudaSuccess;
  });
  return plan;
}

Plan new_wgrad_plan(const Layer& layer, const Device& device) {
  Plan plan;
  plan.tile = choose_wgrad(layer, device).tile;
  with_tile(WgradTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    plan.columns = int(layer.growth / C::COLUMNS);
    plan.blocks = blocks_of<C>(layer, device, plan.columns * ceil_div(layer.bottleneck, C::CHANNELS));
    plan.partial_bytes = int64_t(plan.blocks) * 9 * layer.bottleneck * layer.growth * 4;
    return cudaSuccess;
  });
  return plan;
}

Plan plan_forward(const Layer& layer, const Device& device) {
  return remembered(key_of(layer, device), [&] { return new_forward_plan(layer, device); });
}
Plan plan_dgrad(const Layer& layer, const Device& device) {
  return remembered(key_of(layer, device), [&] { return new_dgrad_plan(layer, device); });
}
Plan plan_wgrad(const Layer& layer, const Device& device) {
  return remembered(key_of(layer, device), [&] { return new_wgrad_plan(layer, device); });
}

const uint16_t* elements(const View& view) { return static_cast<const uint16_t*>(view.data); }

cudaError_t pack_weights(Type type, PackArguments args, cudaStream_t stream) {
  const int64_t n = int64_t(args.block_columns) * args.blocks * args.slabs * 144;
  return with_type(type, [&](auto element) {
    return launch(pack_weights_kernel<decltype(element)>, dim3(unsigned(ceil_div(n, 256))), 256, 0, stream, args);
  });
}
cudaError_t add_splits(Type type, const SplitArguments& args, int blocks, cudaStream_t stream) {
  const dim3 grid(unsigned(blocks), unsigned(ceil_div(args.outputs, SplitSum::COLUMNS)));
  return with_type(type, [&](auto element) {
    return launch(add_splits_kernel<decltype(element)>, grid, SplitSum::THREADS, size_t(SplitSum::SHARED_BYTES), stream, args);
  });
}

}  // namespace

const char* unsupported(const Layer& layer, const Device& device) {
  const Images& i = layer.images;
  if (layer.bottleneck % 8 || layer.growth % 8) return "bottleneck and growth must be multiples of 8";
  if (layer.growth > 4096 || layer.bottleneck > 1 << 16) return "too many channels";
  if (i.n < 1 || i.h < 1 || i.w < 1) return "no pixels";
  if (i.n * (i.h + 8) * (i.w + 8) >= int64_t(1) << 30) return "2^30 pixels or more";
  const bool fits = plan_forward(layer, device).tile >= 0 && plan_dgrad(layer, device).tile >= 0 && plan_wgrad(layer, device).tile >= 0;
  return fits ? nullptr : "too little shared memory";
}

const char* unsupported(const View& view) {
  if (view.pitch % 8 || view.pitch >= int64_t(1) << 31) return "pixels must be a multiple of 8 channels apart";
  return uintptr_t(view.data) % 16 ? "not 16-byte aligned" : nullptr;
}

int64_t workspace_bytes(const Layer& layer, const Device& device, Pass pass) {
  const Plan plan = pass == Pass::Forward ? plan_forward(layer, device)
                    : pass == Pass::Dgrad ? plan_dgrad(layer, device)
                                          : plan_wgrad(layer, device);
  return plan.weight_bytes + plan.sum_bytes + plan.partial_bytes;
}

cudaError_t conv3x3_forward(const Layer& layer, const Device& device, const View& z, const Norm& norm, const Weight& weight,
                            const Dropout& dropout, const Output& out, const Statistics& statistics, void* workspace) {
  const Plan plan = plan_forward(layer, device);
  uint16_t* packed = static_cast<uint16_t*>(workspace);
  float* sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.weight_bytes);
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.weight_bytes + plan.sum_bytes);
  const bool split = plan.splits > 1;
  const int64_t pixels = layer.images.n * layer.images.h * layer.images.w;
  const int b = int(layer.bottleneck), g = int(layer.growth);
  cudaError_t error = with_tile(ForwardTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    const PackArguments pack{weight,      packed,     b,          g,            weight.input_stride, weight.output_stride,
                             C::slabs(b), C::COLUMNS, C::COLUMNS, plan.columns, false};
    cudaError_t packing = pack_weights(layer.type, pack, device.stream);
    if (packing != cudaSuccess) return packing;
    const ForwardArguments args{map_of<C>(layer.images), elements(z), packed, static_cast<uint16_t*>(out.data), int(z.pitch),
                                int(out.pitch), b, g, norm, dropout, statistics.data && !split ? partials : nullptr, split ? sums : nullptr,
                                plan.split_channels, int(pixels)};
    const dim3 grid(unsigned(plan.blocks), unsigned(plan.columns), unsigned(plan.splits));
    const size_t shared = size_t(C::shared_bytes(plan.split_channels));  // unsplit: b, rounded up
    return with_type(layer.type, [&](auto element) {
      return launch(conv3x3_forward_kernel<decltype(element), C>, grid, C::THREADS, shared, device.stream, args);
    });
  });
  if (error == cudaSuccess && split)
    error = add_splits(layer.type, {sums, plan.splits, int(pixels), g, static_cast<uint16_t*>(out.data), int(out.pitch), dropout,
                                    statistics.data ? partials : nullptr}, plan.sum_blocks, device.stream);
  if (error != cudaSuccess || !statistics.data) return error;
  return merge_statistics({partials, split ? plan.sum_blocks : plan.blocks, g, statistics}, device.stream);
}

cudaError_t conv3x3_dgrad(const Layer& layer, const Device& device, const View& features, const View& gradient,
                          const Correction& correction, const Dropout& dropout, const Weight& weight, const View& z, const Norm& norm,
                          const Output& out, float* sums, void* workspace) {
  const Plan plan = plan_dgrad(layer, device);
  uint16_t* packed = static_cast<uint16_t*>(workspace);
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.weight_bytes);
  const int b = int(layer.bottleneck), g = int(layer.growth);
  cudaError_t error = with_tile(DgradTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    const PackArguments pack{weight,      packed,     g,  b,            weight.output_stride, weight.input_stride,
                             C::slabs(g), C::COLUMNS, 32, plan.columns, true};
    cudaError_t packing = pack_weights(layer.type, pack, device.stream);
    if (packing != cudaSuccess) return packing;
    const DgradArguments args{map_of<C>(layer.images), elements(features), elements(gradient), packed, elements(z),
                              static_cast<uint16_t*>(out.data), int(features.pitch), int(gradient.pitch), int(z.pitch),
                              int(out.pitch), b, g, correction, dropout, norm, partials};
    return with_type(layer.type, [&](auto element) {
      return launch(conv3x3_dgrad_kernel<decltype(element), C>, dim3(unsigned(plan.blocks), unsigned(plan.columns)), C::THREADS,
                    size_t(C::shared_bytes(g)), device.stream, args);
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
    const WgradArguments args{map_of<C>(layer.images), elements(features), elements(gradient), elements(z), int(features.pitch),
                              int(gradient.pitch), int(z.pitch), b, g, correction, dropout, norm, slabs};
    const dim3 grid(unsigned(plan.blocks), unsigned(ceil_div(b, C::CHANNELS)), unsigned(plan.columns));
    return with_type(layer.type, [&](auto element) {
      return launch(conv3x3_wgrad_kernel<decltype(element), C>, grid, C::THREADS, size_t(C::SHARED_BYTES), device.stream, args);
    });
  });
  if (error != cudaSuccess) return error;
  return sum_slabs({slabs, plan.blocks, 9 * b * g, dweight.data, b, g, dweight.tap_stride, dweight.input_stride, dweight.output_stride},
                   device.stream);
}

}  // namespace csp::cuda
