// Sums over blocks in a fixed order, merged statistics, packed weights.
#pragma once
#include "tile.cuh"
#include "../dense_block.h"

namespace csp::cuda {

// A block: ITEMS numbers by ROWS parts of the slabs.
struct Reduction {
  static constexpr int ITEMS = 32, ROWS = 32, THREADS = ITEMS * ROWS;
  int item, row;
  uint32_t shared;

  DEVICE Reduction() : row(int(threadIdx.x) / ITEMS), shared(shared_base()) {
    item = int(blockIdx.x) * ITEMS + int(threadIdx.x) % ITEMS;
  }
  HOST_DEVICE static constexpr int shared_bytes(int values) { return values * THREADS * 8; }
  DEVICE uint32_t place(int value, int r) const { return shared + uint32_t((value * ROWS + r) * ITEMS + int(threadIdx.x) % ITEMS) * 8; }
};

struct SlabArguments {
  const float* slabs;  // [count][items]
  int count, items;
  float* out;
  // item = (tap * rows + row) * columns + column goes to these strides
  int rows, columns;
  int64_t tap_stride, row_stride, column_stride;
};

static __global__ void __launch_bounds__(Reduction::THREADS) sum_slabs_kernel(const SlabArguments args) {
  const Reduction r;
  const bool exists = r.item < args.items;
  double sum = 0;
#pragma unroll 4
  for (int i = r.row; i < args.count; i += Reduction::ROWS) sum += exists ? args.slabs[(long long)i * args.items + r.item] : 0.f;
  store_shared8(r.place(0, r.row), sum);
  barrier();
  if (r.row || !exists) return;
  for (int row = 1; row < Reduction::ROWS; row++) sum += load_shared8(r.place(0, row));
  const int column = r.item % args.columns, row = r.item / args.columns % args.rows, tap = r.item / args.columns / args.rows;
  args.out[tap * args.tap_stride + row * args.row_stride + column * args.column_stride] = float(sum);
}

// partials [blocks][3][channels] (mean, M2, count) -> statistics: mean, biased variance.
struct StatisticsArguments {
  const float* partials;
  int blocks, channels;
  Statistics statistics;
};

struct WideMoments {
  double count, mean, m2;

  DEVICE void merge(const WideMoments& other) {
    if (other.count == 0) return;
    const double sum = count + other.count, share = other.count / sum, d = other.mean - mean;
    mean += d * share;
    m2 += other.m2 + d * d * count * share;
    count = sum;
  }
};

static __global__ void __launch_bounds__(Reduction::THREADS) merge_statistics_kernel(const StatisticsArguments args) {
  const Reduction r;
  const bool exists = r.item < args.channels;
  WideMoments all{};
  for (int i = r.row; exists && i < args.blocks; i += Reduction::ROWS) {
    const float* from = args.partials + (long long)i * 3 * args.channels + r.item;
    all.merge({from[2 * args.channels], from[0], from[args.channels]});
  }
  store_shared8(r.place(0, r.row), all.count), store_shared8(r.place(1, r.row), all.mean), store_shared8(r.place(2, r.row), all.m2);
  barrier();
  if (r.row || !exists) return;
  for (int i = 1; i < Reduction::ROWS; i++)
    all.merge({load_shared8(r.place(0, i)), load_shared8(r.place(1, i)), load_shared8(r.place(2, i))});
  args.statistics.data[r.item] = all.mean;
  const double overflow = all.m2 - all.m2;  // NaN where float32 had no number for squares: an infinite variance would pass unseen
  args.statistics.data[args.statistics.pitch + r.item] = all.m2 / all.count + overflow;
}

// A block for each ITEMS of them.
inline dim3 reduction_grid(int items) { return dim3(unsigned((items + Reduction::ITEMS - 1) / Reduction::ITEMS)); }
inline cudaError_t sum_slabs(const SlabArguments& args, cudaStream_t stream) {
  return launch(sum_slabs_kernel, reduction_grid(args.items), Reduction::THREADS, Reduction::shared_bytes(1), stream, args);
}
inline cudaError_t merge_statistics(const StatisticsArguments& args, cudaStream_t stream) {
  return launch(merge_statistics_kernel, reduction_grid(args.channels), Reduction::THREADS, Reduction::shared_bytes(3), stream, args);
}

// Weights as shared memory holds them: [blocks of columns][slabs][9][16][columns], swizzled, zero where there are none. Inside SPAN
// columns, column 8j + 2t + i holds channel 2 J t + 2j + i, SPAN = 8 J: then a thread's results are neighbours.
struct PackArguments {
  Weight weight;
  uint16_t* out;
  int rows, columns;  // of the product; what they are of the weight say the strides
  int64_t row_stride, column_stride;
  int slabs, block_columns, span, blocks;
  bool reversed;  // taps
};

template <class T> __global__ void __launch_bounds__(256) pack_weights_kernel(const PackArguments args) {
  const long long i = (long long)blockIdx.x * 256 + threadIdx.x, n = args.block_columns;
  if (i >= n * args.blocks * args.slabs * 9 * 16) return;
  const int position = int(i % n), k = int(i / n % 16), tap = int(i / n / 16 % 9), slab = int(i / n / 144 % args.slabs);
  const int block = int(i / n / 144 / args.slabs);
  const int within = position % args.span, j = within / 8, t = within % 8 / 2;
  const int column = block * args.block_columns + position - within + args.span / 4 * t + 2 * j + (within & 1), row = slab * 16 + k;
  uint16_t value = 0;
  if (row < args.rows && column < args.columns) {
    const int64_t at = row * args.row_stride + column * args.column_stride + (args.reversed ? 8 - tap : tap) * args.weight.tap_stride;
    if (args.weight.float32) value = uint16_t(pack<T>(static_cast<const float*>(args.weight.data)[at], 0));
    else value = static_cast<const uint16_t*>(args.weight.data)[at];
  }
  const int to = int(unsigned(position / 8) ^ swizzle(args.block_columns / 8, k)) * 8 + position % 8;
  args.out[i - position + to] = value;
}

}  // namespace csp::cuda
