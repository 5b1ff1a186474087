// Wgrad in float32: dweight[tap][channel][output] = sum over pixels of h(pixel + tap) dY(pixel), h = relu(norm(z)).
//
// A block keeps the sums of 64 channels by COLUMNS outputs for the whole kernel, a warp those of 16 channels by 8 J outputs and all nine
// taps; tiles are single strips. While one is multiplied the next is copied. A slab of sums a block; sum_slabs adds them in order.
#pragma once
#include "float32_conv3x3.cuh"

namespace csp::cuda::float32 {

template <int GROUPS_, int J_> struct WgradTile {
  static constexpr int GROUPS = GROUPS_, J = J_, COLUMNS = 8 * J * GROUPS, CHANNELS = 64, PARTS = 4, THREADS = 32 * PARTS * GROUPS;
  static constexpr int STRIPS = 1, ROWS = 8;
  // four pixels by eight neighbouring words meet in no bank
  static constexpr int Z_PIXEL = CHANNELS * 4 + 32, Y_PIXEL = COLUMNS * 4 + (COLUMNS % 16 ? 0 : 32);
  using Z = Patch<STRIPS, ROWS, 1, CHANNELS / 4, Z_PIXEL, false, THREADS>;
  using Y = Patch<STRIPS, ROWS, 0, COLUMNS / 4, Y_PIXEL, false, THREADS>;
  using Strips = StripTable<STRIPS, ROWS, 4>;

  // Shared memory: two stages of z and of dY, features, strips, coefficients.
  static constexpr int Y_AT = 2 * Z::BYTES, FEATURES_AT = Y_AT + 2 * Y::BYTES, STRIPS_AT = FEATURES_AT + Y::BYTES;
  static constexpr int Z_TABLE_AT = STRIPS_AT + Strips::BYTES, Y_TABLE_AT = Z_TABLE_AT + QuadTable::bytes(CHANNELS);
  static constexpr int SHARED_BYTES = Y_TABLE_AT + QuadTable::bytes(COLUMNS);
};

struct WgradArguments {
  Map map;
  const float *features, *gradient, *z;
  int features_pitch, gradient_pitch, z_pitch, channels, outputs;
  Correction correction;
  Dropout dropout;
  Norm norm;
  float* slabs;  // [blocks][9][channels][outputs]
};

// acc[tap][j][e]: channel e / 2 of this lane's pair, output 8 j + 2 (lane % 4) + e % 2.
template <class Type, class C> struct WgradProduct {
  int lane, part, group;
  uint32_t a, b;
  float acc[9][C::J][4];

  DEVICE WgradProduct()
      : lane(int(threadIdx.x) & 31), part(int(threadIdx.x) >> 5 & (C::PARTS - 1)), group(int(threadIdx.x) / (32 * C::PARTS)), acc{} {
    a = uint32_t((part * 16 + (lane >> 2) * 2) * 4);
    b = uint32_t(group * 8 * C::J * 4);
    if (Type::TENSOR) a += uint32_t((lane & 3) * C::Z_PIXEL), b += uint32_t((lane & 3) * C::Y_PIXEL + (lane >> 2) * 4);
    else b += uint32_t((lane & 3) * 8);
  }
  DEVICE void multiply(uint32_t z, uint32_t y) {
    if constexpr (Type::TENSOR) multiply_tensor(z + a, y + b);
    else multiply_fma(z + a, y + b);
  }
  // Row by row of dY; a column of h serves three of its pixels.
  DEVICE void multiply_fma(uint32_t z, uint32_t y) {
#pragma unroll 1
    for (int row = 0; row < C::ROWS; row++) {
      float h[3][3][2];  // [dy][column % 3]
#pragma unroll
      for (int column = 0; column < HALO; column++) {
#pragma unroll
        for (int dy = 0; dy < 3; dy++)
          load_floats(h[dy][column % 3], z + uint32_t((row + dy) * C::Z::ROW_BYTES + column * C::Z_PIXEL));
        if (column < 2) continue;
#pragma unroll
        for (int j = 0; j < C::J; j++) {
          float g[2];
          load_floats(g, y + uint32_t(row * C::Y::ROW_BYTES + (column - 2) * C::Y_PIXEL + j * 32));
#pragma unroll
          for (int tap = 0; tap < 9; tap++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              acc[tap][j][e] = fmaf(h[tap / 3][(column - 2 + tap % 3) % 3][e >> 1], g[e & 1], acc[tap][j][e]);
        }
      }
    }
  }
  // Row by row of dY, eight pixels a product; the three rows of h that meet it move up.
  DEVICE void multiply_tensor(uint32_t z, uint32_t y) {
    uint32_t h[3][3][4];  // [dy][dx]
    load_row(h[1], z);
    load_row(h[2], z + C::Z::ROW_BYTES);
#pragma unroll 2
    for (int row = 0; row < C::ROWS; row++) {
#pragma unroll
      for (int dx = 0; dx < 3; dx++)
#pragma unroll
        for (int i = 0; i < 4; i++) h[0][dx][i] = h[1][dx][i], h[1][dx][i] = h[2][dx][i];
      load_row(h[2], z + uint32_t((row + 2) * C::Z::ROW_BYTES));
#pragma unroll
      for (int j = 0; j < C::J; j++) {
        uint32_t low[1], high[1];
        load_shared_words(low, y + uint32_t(row * C::Y::ROW_BYTES + j * 32));
        load_shared_words(high, y + uint32_t(row * C::Y::ROW_BYTES + j * 32 + 4 * C::Y_PIXEL));
#pragma unroll
        for (int tap = 0; tap < 9; tap++) mma_tf32(acc[tap][j], h[tap / 3][tap % 3], low[0], high[0]);
      }
    }
  }
  // Fragments of a row of h, at each dx.
  DEVICE static void load_row(uint32_t (&h)[3][4], uint32_t z) {
#pragma unroll
    for (int dx = 0; dx < 3; dx++) {
      uint32_t low[2], high[2];
      load_shared_words(low, z + uint32_t(dx * C::Z_PIXEL));
      load_shared_words(high, z + uint32_t((dx + 4) * C::Z_PIXEL));
      h[dx][0] = low[0], h[dx][1] = low[1], h[dx][2] = high[0], h[dx][3] = high[1];
    }
  }
  DEVICE void write(const WgradArguments& args) const {
    const int channel = int(blockIdx.y) * C::CHANNELS + part * 16 + (lane >> 2) * 2;
    const int output = int(blockIdx.z) * C::COLUMNS + group * 8 * C::J + (lane & 3) * 2;
#pragma unroll
    for (int tap = 0; tap < 9; tap++)
#pragma unroll
      for (int j = 0; j < C::J; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t words[2];
          memcpy(words, acc[tap][j] + 2 * i, 8);
          float* to = args.slabs + (((long long)blockIdx.x * 9 + tap) * args.channels + channel + i) * args.outputs + output + j * 8;
          store_words(channel + i < args.channels && output + j * 8 < args.outputs, to, words);
        }
  }
};

// Grid: tiles by turns, blocks of channels, blocks of outputs.
template <class Type, class C> __global__ void __launch_bounds__(C::THREADS, 1) wgrad_float32_kernel(const WgradArguments args) {
  const uint32_t shared = shared_base();
  const int first = int(blockIdx.y) * C::CHANNELS, first_output = int(blockIdx.z) * C::COLUMNS, stride = int(gridDim.x);
  const Activation<Type> h{args.z, args.z_pitch, first, {shared + C::Z_TABLE_AT, C::CHANNELS}};
  const SliceGradient<Type> dy{args.features,
                               args.gradient,
                               args.features_pitch,
                               args.gradient_pitch,
                               first_output,
                               {shared + C::Y_TABLE_AT, C::COLUMNS},
                               DropoutMask(args.dropout),
                               shared + C::FEATURES_AT};
  const Norm& n = args.norm;
  const Correction& c = args.correction;
  h.table.fill(C::THREADS, args.channels - first, n.mean + first, n.scale + first, n.shift + first);
  dy.table.fill(C::THREADS, args.outputs - first_output, c.mean + first_output, c.slope + first_output, c.offset + first_output);
  const typename C::Strips strips{shared + C::STRIPS_AT};
  Share<typename C::Z> z_share;
  Share<typename C::Y> y_share;
  uint32_t z = shared, other_z = shared + C::Z::BYTES, y = shared + C::Y_AT, other_y = y + C::Y::BYTES;
  auto copy = [&](int slot, uint32_t to_z, uint32_t to_y) {
    z_share.locate(strips, slot, args.map);
    y_share.locate(strips, slot, args.map);
    z_share.copy(h, to_z, first, args.channels);
    y_share.copy(dy, to_y, first_output, args.outputs);
    commit_copies();
  };
  auto turn = [&](uint32_t in_z, uint32_t in_y) {
    wait_copies<0>();
    z_share.turn(h, in_z, first, args.channels);
    y_share.turn(dy, in_y, first_output, args.outputs);
  };
  int tile = int(blockIdx.x), slot = 0;
  strips.write(args.map, tile, 0);
  strips.write(args.map, tile + stride, 1);
  barrier();
  WgradProduct<Type, C> product;
  copy(0, z, y);
  turn(z, y);
  barrier();
#pragma unroll 1
  for (; tile < args.map.tiles; tile += stride, slot++) {
    strips.write(args.map, tile + 2 * stride, slot + 2);
    copy(slot + 1, other_z, other_y);
    product.multiply(z, y);
    turn(other_z, other_y);
    barrier();
    uint32_t swap = z;
    z = other_z, other_z = swap, swap = y, y = other_y, other_y = swap;
  }
  product.write(args);
}

}  // namespace csp::cuda::float32
