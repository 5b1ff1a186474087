// The main loop of the float32 forward and dgrad. As in conv3x3.cuh a warp has R rows of a pair of strips by 8 J columns, and a thread's
// results lie as mma.sync leaves them, whichever product made them; columns are permuted inside a warp so that they are neighbours.
// Weights are read by slabs of eight channels together with the halo: any number of channels fits, and two blocks a multiprocessor.
#pragma once
#include "conv3x3.cuh"
#include "float32_stage.cuh"

namespace csp::cuda::float32 {

template <int R_, int DOWN_, int ACROSS_, int GROUPS_, int J_> struct Tile {
  // warps: DOWN x ACROSS units of pixels, times GROUPS of columns
  static constexpr int R = R_, DOWN = DOWN_, ACROSS = ACROSS_, GROUPS = GROUPS_, HALVES = 1, J = J_, DEPTH = 8;
  static constexpr int UNITS = DOWN * ACROSS, WARPS = UNITS * GROUPS, THREADS = 32 * WARPS, COLUMNS = 8 * J * GROUPS;
  static constexpr int STRIPS = 2 * ACROSS, ROWS = R * DOWN;
  static constexpr int WIDTH = 2 * J;  // channels that a thread owns, one after another
  using Halo = Patch<STRIPS, ROWS, 1, DEPTH / 4, DEPTH * 4, true, THREADS>;
  using Strips = StripTable<STRIPS, ROWS, 4>;
  static constexpr int TAP = DEPTH * COLUMNS, TAP_BYTES = TAP * 4, SLAB_BYTES = 9 * TAP_BYTES;

  // Shared memory: two halos, two slabs of weights [9][TAP], strips, coefficients; dgrad's: the features of a slice, z's coefficients.
  static constexpr int SLABS_AT = 2 * Halo::BYTES, STRIPS_AT = SLABS_AT + 2 * SLAB_BYTES, TABLE_AT = STRIPS_AT + Strips::BYTES;
  HOST_DEVICE static constexpr int steps(int channels) { return (channels + DEPTH - 1) / DEPTH; }
  HOST_DEVICE static constexpr int features_at(int channels) { return TABLE_AT + QuadTable::bytes(steps(channels) * DEPTH); }
  HOST_DEVICE static constexpr int norm_at(int channels) { return features_at(channels) + Halo::BYTES; }
  HOST_DEVICE static constexpr int shared_bytes(int channels, bool dgrad) {
    return dgrad ? norm_at(channels) + QuadTable::bytes(COLUMNS) : features_at(channels);
  }
};

// Weights of a warp at a tap: 8 channels by 8 J columns, in the order in which its threads read them. Column n of block j holds channel
// WIDTH (n / 2) + 2 j + n % 2.
struct Place8 {
  int k, column;
};
// [k][columns], as they are.
HOST_DEVICE inline Place8 fma_place(int i, int columns) { return {i / columns, i % columns}; }
// [group][pairs of j][lane][2 j][k, k + 4], and the same for a last j of its own.
HOST_DEVICE inline Place8 tensor_place(int i, int j) {
  const int group = i / (64 * j), rest = i % (64 * j), paired = j / 2 * 128;
  const bool in_pair = rest < paired;
  const int within = in_pair ? rest % 128 : rest - paired, per_lane = in_pair ? 4 : 2, lane = within / per_lane, word = within % per_lane;
  const int block = in_pair ? rest / 128 * 2 + word / 2 : j - 1, n = lane / 4;
  return {lane % 4 + word % 2 * 4, group * 8 * j + 2 * j * (n / 2) + 2 * block + n % 2};
}

// acc += a slab's product, in full float32.
template <class C> struct FmaProduct {
  uint32_t a, b;
  int column;

  DEVICE explicit FmaProduct(const Place<C>& place) : column(place.lane >> 2) {
    a = uint32_t(place.strip(0) * C::Halo::STRIP_BYTES + place.row() * C::Halo::ROW_BYTES + column * C::Halo::PIXEL_BYTES);
    b = uint32_t((place.group * 8 * C::J + (place.lane & 3) * C::WIDTH) * 4);
  }
  // One column of taps, four channels: each row of the halo serves three rows of results.
  DEVICE void multiply(float (&acc)[C::R][C::J][4], uint32_t halo, uint32_t slab) const {
#pragma unroll 1
    for (int i = 0; i < 6; i++) {
      const int dx = i >> 1, chunk = i & 1;
      const uint32_t from = halo + a + uint32_t(dx * C::Halo::PIXEL_BYTES) + ((uint32_t(chunk) ^ swizzle(2, column + dx)) << 4);
      float x[C::R + 2][2][4];
#pragma unroll
      for (int row = 0; row < C::R + 2; row++)
#pragma unroll
        for (int h = 0; h < 2; h++) load_floats(x[row][h], from + uint32_t(row * C::Halo::ROW_BYTES + h * C::Halo::STRIP_BYTES));
      const uint32_t weights = slab + b + uint32_t(dx * C::TAP_BYTES + chunk * 4 * C::COLUMNS * 4);
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
          float w[C::WIDTH];
          load_floats(w, weights + uint32_t(dy * 3 * C::TAP_BYTES + k * C::COLUMNS * 4));
#pragma unroll
          for (int r = 0; r < C::R; r++)
#pragma unroll
            for (int j = 0; j < C::J; j++)
#pragma unroll
              for (int e = 0; e < 4; e++) acc[r][j][e] = fmaf(x[r + dy][e >> 1][k], w[2 * j + (e & 1)], acc[r][j][e]);
        }
    }
  }
};

// The same on tensor cores, of inputs that were rounded to TF32.
template <class C> struct TensorProduct {
  int column;
  uint32_t a, chunk, b, b_last;

  DEVICE explicit TensorProduct(const Place<C>& place) {
    const int lane = place.lane;
    column = lane & 7, chunk = uint32_t(lane >> 4);
    a = uint32_t(place.strip(lane >> 3 & 1) * C::Halo::STRIP_BYTES + place.row() * C::Halo::ROW_BYTES + column * C::Halo::PIXEL_BYTES);
    b = uint32_t(place.group * 64 * C::J * 4 + lane * 16);
    b_last = uint32_t(place.group * 64 * C::J * 4 + C::J / 2 * 512 + lane * 8);
  }
  DEVICE void load_weights(uint32_t (&w)[C::J][2], uint32_t tap) const {
#pragma unroll
    for (int j = 0; j + 1 < C::J; j += 2) {
      uint4 v = load_shared16(tap + b + uint32_t(j / 2 * 512));
      w[j][0] = v.x, w[j][1] = v.y, w[j + 1][0] = v.z, w[j + 1][1] = v.w;
    }
    if constexpr (C::J % 2) load_shared_words(w[C::J - 1], tap + b_last);
  }
  DEVICE void multiply(float (&acc)[C::R][C::J][4], uint32_t halo, uint32_t slab) const {
#pragma unroll 1
    for (int dx = 0; dx < 3; dx++) {
      const uint32_t from = halo + a + uint32_t(dx * C::Halo::PIXEL_BYTES) + ((chunk ^ swizzle(2, column + dx)) << 4);
      uint32_t w[3][C::J][2];
#pragma unroll
      for (int dy = 0; dy < 3; dy++) load_weights(w[dy], slab + uint32_t((dy * 3 + dx) * C::TAP_BYTES));
#pragma unroll
      for (int row = 0; row < C::R + 2; row++) {
        uint32_t x[4];
        ldmatrix(x, from + uint32_t(row * C::Halo::ROW_BYTES));
#pragma unroll
        for (int dy = 0; dy < 3; dy++)
          if (row - dy >= 0 && row - dy < C::R)
#pragma unroll
            for (int j = 0; j < C::J; j++) mma_tf32(acc[row - dy][j], x, w[dy][j][0], w[dy][j][1]);
      }
    }
  }
};

// How a type multiplies.
struct Ieee {
  static constexpr bool TENSOR = false;
  DEVICE static float round(float x) { return x; }
  template <class C> using Product = FmaProduct<C>;
};
struct Tf32 {
  static constexpr bool TENSOR = true;
  DEVICE static float round(float x) { return to_tf32(x); }
  template <class C> using Product = TensorProduct<C>;
};

struct PackArguments {
  Weight weight;
  float* out;         // [blocks of columns][steps][9][8][columns of a block]
  int rows, columns;  // of the product; what they are of the weight say the strides
  int64_t row_stride, column_stride;
  int steps, j, groups, blocks;
  bool reversed;  // taps
};

template <class Type> __global__ void __launch_bounds__(256) pack_float32_kernel(const PackArguments args) {
  const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
  const int wide = 8 * args.j * args.groups, per_tap = 8 * wide;
  if (i >= (long long)args.blocks * args.steps * 9 * per_tap) return;
  const int within = int(i % per_tap), tap = int(i / per_tap % 9), step = int(i / per_tap / 9 % args.steps);
  const int block = int(i / per_tap / 9 / args.steps);
  const Place8 place = Type::TENSOR ? tensor_place(within, args.j) : fma_place(within, wide);
  const int row = step * 8 + place.k, column = block * wide + place.column;
  float value = 0;
  if (row < args.rows && column < args.columns)
    value = static_cast<const float*>(args.weight.data)[row * args.row_stride + column * args.column_stride +
                                                        (args.reversed ? 8 - tap : tap) * args.weight.tap_stride];
  args.out[i] = Type::round(value);
}

template <class C> DEVICE void copy_slab(uint32_t to, const float* from) {
  for (int i = int(threadIdx.x); i < C::SLAB_BYTES / 16; i += C::THREADS) copy16(true, to + uint32_t(i * 16), from + i * 4);
}

// Epilogue: finish(acc, strips, slot). While a step is multiplied the next one is copied.
template <class Type, class C, class Source, class Epilogue>
DEVICE void convolve_float32(const Map& map, int channels, const float* weights, uint32_t shared, const Source& source,
                             Epilogue& epilogue) {
  const typename Type::template Product<C> product{Place<C>{}};
  const typename C::Strips strips{shared + C::STRIPS_AT};
  const int steps = C::steps(channels), stride = int(gridDim.x);
  uint32_t halo = shared, other = shared + C::Halo::BYTES, slab = shared + C::SLABS_AT, other_slab = slab + C::SLAB_BYTES;
  Share<typename C::Halo> share;
  float acc[C::R][C::J][4];
  int tile = int(blockIdx.x), slot = 0;
  auto copy = [&](int step, uint32_t to_halo, uint32_t to_slab) {
    share.copy(source, to_halo, step * C::DEPTH, channels);
    copy_slab<C>(to_slab, weights + (long long)step * (C::SLAB_BYTES / 4));
    commit_copies();
  };
  strips.write(map, tile, 0);
  strips.write(map, tile + stride, 1);
  barrier();
  share.locate(strips, 0, map);
  copy(0, halo, slab);
  wait_copies<0>();
  share.turn(source, halo, 0, channels);
  barrier();
#pragma unroll 1
  for (; tile < map.tiles; tile += stride, slot++) {
#pragma unroll
    for (int r = 0; r < C::R; r++)
#pragma unroll
      for (int j = 0; j < C::J; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[r][j][e] = 0;
    strips.write(map, tile + 2 * stride, slot + 2);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const bool last = step == steps - 1;
      const int next = last ? 0 : step + 1;
      if (last) share.locate(strips, slot + 1, map);
      copy(next, other, other_slab);
      product.multiply(acc, halo, slab);
      wait_copies<0>();
      share.turn(source, other, next * C::DEPTH, channels);
      barrier();
      uint32_t swap = halo;
      halo = other, other = swap, swap = slab, slab = other_slab, other_slab = swap;
    }
    epilogue.finish(acc, strips, slot);
  }
}

// A thread's channels are stored by pieces of four or two: what is beyond the last channel begins with a piece.
template <class C> DEVICE void store_channels(bool on, float* to, const float (&x)[C::WIDTH], int channel, int channels) {
  constexpr int PIECE = C::WIDTH % 4 == 0 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < C::WIDTH; i += PIECE) {
    uint32_t words[PIECE];
    memcpy(words, x + i, 4 * PIECE);
    store_words(on && channel + i < channels, to + i, words);
  }
}

}  // namespace csp::cuda::float32
