// Launcher of the dense layer in one kernel: how images are cut, how many blocks, what of the workspace.
#include "dense_layer.h"
#include "device/dense_layer.cuh"
#include "tiles.h"

namespace csp::cuda {
namespace {

// Rows a warp, groups of columns, columns / 8 of a group.
using AllDenseTiles = Tiles<DenseTile<4, 1, 4>, DenseTile<2, 1, 4>, DenseTile<4, 1, 3>, DenseTile<2, 1, 3>, DenseTile<4, 1, 2>,
                                 DenseTile<2, 1, 2>, DenseTile<4, 2, 3>, DenseTile<2, 2, 3>, DenseTile<4, 2, 4>, DenseTile<2, 2, 4>>;

int divide_up(int64_t a, int64_t b) { return int(ceil_div(a, b)); }
int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

struct DensePlan {
  int tile = -1, blocks = 0;
  Cut cut{};
  int64_t products = 0, cost = 0;  // of the block with most to do
};

// Most of a cell and those around it along a side that has `count` cells of `size` each.
int with_halo(int size, int count, int64_t side) { return least(size + (count > 2 ? 2 : count - 1), side); }

// Cells of at most rows x columns, as even as they come; `down` x `across` of them a tile.
template <class C> Cut cut_into(const Images& images, int rows, int columns, bool stacked, bool paired) {
  Cut cut{};
  cut.image_height = int(images.h), cut.image_width = int(images.w);
  cut.down = divide_up(images.h, rows), cut.height = divide_up(images.h, cut.down);
  cut.across = divide_up(images.w, columns), cut.width = divide_up(images.w, cut.across);
  cut.down = divide_up(images.h, cut.height), cut.across = divide_up(images.w, cut.width);
  cut.quota = with_halo(cut.height, cut.down, images.h) * with_halo(cut.width, cut.across, images.w);
  cut.tile_down = stacked && cut.down == 1 ? (C::ROWS + 1) / (cut.height + 1) : 1;
  cut.tile_across = paired && cut.width <= STRIP ? 2 : 1;
  cut.cells = int(images.n * cut.down * cut.across);
  cut.tiles = divide_up(cut.cells, cut.tile_down * cut.tile_across);
  return cut;
}

// Of a tile: steps, products m16n8k16 a warp in each, bytes that come from L2 in each; of the 1x1, of the 3x3.
struct Work {
  int64_t steps[2], products[2], bytes[2];

  int64_t all() const { return steps[0] * products[0] + steps[1] * products[1]; }
  // As if in products: a step takes as long as they do or the bytes, estimated for an H100 whose multiprocessors all read.
  int64_t cost() const {
    int64_t sum = 100;
    for (int i = 0; i < 2; i++) {
      const int64_t a = products[i] + 12, b = bytes[i] / 290;
      sum += steps[i] * (a > b ? a : b);
    }
    return sum;
  }
};
template <class C> Work work_of(const DenseLayer& layer, const Cut& cut) {
  const int b = int(layer.bottleneck), listed = cut.tile_down * cut.tile_across * cut.quota;
  const int more = cut.tile_down * (cut.height + 1) - 1 - C::UNITS * (C::R - 1), rows = C::UNITS * (C::R - 1) + (more > 0 ? more : 0);
  return {{C::steps(int(layer.entering)), C::steps(b)},
          {divide_up(divide_up(listed, 16), C::lanes(b)) * 16, C::K16 * 9 * C::J * rows / C::UNITS},
          {C::spans(b) * C::SPAN_BYTES + listed * C::PIXEL_BYTES, 2 * C::SLAB_BYTES}};
}

template <class C> bool takes(int64_t growth) {
  const int groups = growth > 32 ? 2 : 1, j = growth == 48 ? 3 : growth == 24 ? 3 : growth <= 16 ? 2 : 4;
  return C::GROUPS == groups && C::J == j;
}

template <class C> void consider(DensePlan& plan, int tile, const DenseLayer& layer, const Device& device, const Cut& cut) {
  const int b = int(layer.bottleneck), listed = cut.tile_down * cut.tile_across * cut.quota;
  if (listed > C::capacity(b) || DenseShared<C>(cut, int(layer.entering), b).bytes > device.shared_bytes) return;
  const int blocks = least(cut.tiles, device.multiprocessors);
  const Work work = work_of<C>(layer, cut);
  const int64_t rounds = divide_up(cut.tiles, blocks), cost = rounds * work.cost();
  if (plan.tile < 0 || cost < plan.cost) plan = {tile, blocks, cut, rounds * work.all(), cost};
}

// Cells as high as can be and lower, wide and narrow; one or several a tile.
template <class C> void consider_cuts(DensePlan& plan, int tile, const DenseLayer& layer, const Device& device) {
  Cut cut{};
  for (int rows = C::ROWS; rows > 0; rows = cut.height - 1)
    for (int columns = C::WIDTH; columns >= STRIP; columns -= STRIP / 2) {
      cut = cut_into<C>(layer.images, rows, columns, false, false);
      consider<C>(plan, tile, layer, device, cut);
      for (int several = 1; several < 4; several++) {
        const Cut more = cut_into<C>(layer.images, rows, columns, several & 1, several & 2);
        if (more.tiles < cut.tiles) consider<C>(plan, tile, layer, device, more);
      }
    }
}

// The cut and the tile of least cost.
DensePlan new_dense_layer_plan(const DenseLayer& layer, const Device& device) {
  DensePlan plan;
  int index = 0;
  each_tile(AllDenseTiles{}, [&](auto tile) {
    if (takes<decltype(tile)>(layer.growth)) consider_cuts<decltype(tile)>(plan, index, layer, device);
    index++;
  });
  return plan;
}

DensePlan plan_dense_layer(const DenseLayer& layer, const Device& device) {
  Key key = key_of({layer.type, layer.images, layer.bottleneck, layer.growth}, device);
  key.back() = layer.entering;
  return remembered(key, [&] { return new_dense_layer_plan(layer, device); });
}

int64_t first_weight_bytes(const DenseLayer& layer) {
  using C = DenseTile<4, 1, 4>;  // the same for all
  return int64_t(C::steps(int(layer.entering))) * C::spans(int(layer.bottleneck)) * C::SPAN_BYTES;
}
template <class C> int64_t second_weight_bytes(const DenseLayer& layer) {
  return int64_t(C::steps(int(layer.bottleneck))) * 2 * C::SLAB_BYTES;
}

template <class C> cudaError_t pack_dense_layer(const DenseLayer& layer, const Device& device, DensePackArguments args) {
  args.entering = int(layer.entering), args.bottleneck = int(layer.bottleneck), args.growth = int(layer.growth);
  args.spans = C::spans(args.bottleneck), args.columns = C::COLUMNS, args.span = 8 * C::J;
  args.elements1 = first_weight_bytes(layer) / 2, args.elements2 = second_weight_bytes<C>(layer) / 2;
  const dim3 blocks(unsigned((args.elements1 + args.elements2 + 255) / 256));
  return with_type(layer.type, [&](auto element) {
    return launch(pack_dense_layer_kernel<decltype(element)>, blocks, 256, 0, device.stream, args);
  });
}

// What a device of some compute capability has.
struct Machine {
  int multiprocessors;
  int64_t shared_bytes;
  double bytes_ns, products_ns;  // of memory; m16n8k16 of all, as mma.sync does them
};
Machine machine_of(int capability) {
  if (capability == 80 || capability == 87) return {108, 163 * 1024, 2040, 73};
  if (capability < 90 || capability >= 110) return {84, 99 * 1024, 1000, 40};
  return {132, 227 * 1024, 3350, 151};
}

// Time of the pair over that of the one. Pair: for each kernel its products or its bytes, whichever takes longer. The one: products as its
// tiles do them (halo, padding and the last round included) or bytes, and a tenth more, for shared memory is as busy as the tensor cores.
// For 64 images of 56x56, b = 128, g = 32 and K = 64, 128, 256, 512, 1024: 1.21, 1.17, 1.12, 1.07, 1.03 on an H100; 1.06, 1.01, 0.95 and
// less on an A100. The pair is taken to fill the device, so small maps with few tiles are left to it. Nothing of this is measured.
double estimated_gain(const DenseLayer& layer, const Machine& machine) {
  const Device device{machine.multiprocessors, machine.shared_bytes, nullptr};
  const double pixels = double(layer.images.n) * double(layer.images.h) * double(layer.images.w);
  const double k = double(layer.entering), b = double(layer.bottleneck), g = double(layer.growth);
  const auto longer = [&](double products, double bytes) {
    const double a = products / machine.products_ns, m = bytes / machine.bytes_ns;
    return a > m ? a : m;
  };
  const double pair = longer(pixels * k * b / 2048, 2 * pixels * (k + b)) + longer(9 * pixels * b * g / 2048, 2 * pixels * (b + g));
  const double products = double(plan_dense_layer(layer, device).products) * 8 * machine.multiprocessors;
  return pair / (1.1 * longer(products, 2 * pixels * (k + g)));
}

}  // namespace

const char* unsupported(const DenseLayer& layer, const Device& device) {
  const Images& i = layer.images;
  if (layer.type != Type::Half && layer.type != Type::BFloat16) return "16-bit types only";
  if (layer.entering % 8 || layer.bottleneck % 8 || layer.growth % 8) return "channels must be multiples of 8";
  if (layer.entering < 8 || layer.entering > 1 << 16 || layer.bottleneck < 8 || layer.bottleneck > 256) return "too many channels";
  if (layer.growth < 8 || layer.growth > 64) return "too many channels";
  if (i.n < 1 || i.h < 1 || i.w < 1 || i.n * (i.h + 8) * (i.w + 8) >= int64_t(1) << 30) return "2^30 pixels or more";
  return plan_dense_layer(layer, device).tile < 0 ? "too little shared memory" : nullptr;
}

int64_t workspace_bytes(const DenseLayer& layer, const Device& device) {
  int64_t bytes = first_weight_bytes(layer);
  with_tile(AllDenseTiles{}, plan_dense_layer(layer, device).tile, [&](auto tile) {
    bytes += second_weight_bytes<decltype(tile)>(layer);
    return cudaSuccess;
  });
  return bytes;
}

bool wins(const DenseLayer& layer, int compute_capability) {
  const Machine machine = machine_of(compute_capability);
  if (compute_capability < 80 || unsupported(layer, {machine.multiprocessors, machine.shared_bytes, nullptr})) return false;
  return (compute_capability >= 90 || layer.entering <= 256) && estimated_gain(layer, machine) > 1;
}

cudaError_t dense_layer_forward(const DenseLayer& layer, const Device& device, const View& features, const Norm& norm1,
                                const Weight& weight1, const Norm& norm2, const Weight& weight2, const Dropout& dropout,
                                const Output& out, void* workspace) {
  const DensePlan plan = plan_dense_layer(layer, device);
  uint16_t* packed1 = static_cast<uint16_t*>(workspace);
  uint16_t* packed2 = packed1 + first_weight_bytes(layer) / 2;
  return with_tile(AllDenseTiles{}, plan.tile, [&](auto tile) {
    using C = decltype(tile);
    const int k = int(layer.entering), b = int(layer.bottleneck), g = int(layer.growth);
    DensePackArguments pack{};
    pack.weight1 = weight1, pack.weight2 = weight2, pack.out1 = packed1, pack.out2 = packed2;
    const cudaError_t packing = pack_dense_layer<C>(layer, device, pack);
    if (packing != cudaSuccess) return packing;
    const DenseLayerArguments args{plan.cut, static_cast<const uint16_t*>(features.data), packed1, packed2,
                                   static_cast<uint16_t*>(out.data), int(features.pitch), int(out.pitch), k, b, g, norm1, norm2, dropout};
    return with_type(layer.type, [&](auto element) {
      return launch(dense_layer_kernel<decltype(element), C>, dim3(unsigned(plan.blocks)), C::THREADS,
                    size_t(DenseShared<C>(plan.cut, k, b).bytes), device.stream, args);
    });
  });
}

}  // namespace csp::cuda
