// Wgrad: dweight[tap][channel][output] = sum over pixels of h(pixel + tap) dY(pixel), h = relu(norm(z)).
//
// A block keeps the sums of 64 channels by COLUMNS outputs for the whole kernel, 16 channels of all nine taps a warp; half of the warps
// take the lower half of each tile's rows. Tiles pass through three stages: copied as they are, turned into h and dY in place (each
// thread what it copied itself), multiplied. A slab of sums a block; sum_slabs adds them in order.
#pragma once
#include "prologue.cuh"
#include "tile.cuh"

namespace csp::cuda {

template <int J_> struct WgradTile {
  static constexpr int J = J_, COLUMNS = 8 * J, CHANNELS = 64, THREADS = 256, PARTS = 4;  // PARTS: of 16 channels
  static constexpr int R = 4, STRIPS = 2, ROWS = 2 * R, HALO_ROWS = ROWS + 2;
  static constexpr int Z_CHUNKS = CHANNELS / 8, Z_PIXELS = STRIPS * HALO_ROWS * HALO, Z_STEP = THREADS / Z_CHUNKS;
  static constexpr int Y_CHUNKS = J, Y_PIXELS = STRIPS * ROWS * STRIP, Y_STEP = THREADS / Y_CHUNKS;
  static constexpr int Z_LOADS = (Z_PIXELS + Z_STEP - 1) / Z_STEP, Y_LOADS = (Y_PIXELS + Y_STEP - 1) / Y_STEP, LOADS = Z_LOADS + Y_LOADS;
  static constexpr bool Y_RAGGED = Y_LOADS * Y_STEP != Y_PIXELS || Y_STEP * Y_CHUNKS != THREADS;
  static constexpr int Z_PIXEL = 2 * CHANNELS, Z_ROW = HALO * Z_PIXEL, Z_STRIP = HALO_ROWS * Z_ROW, Z_BYTES = STRIPS * Z_STRIP;
  static constexpr int Y_PIXEL = 2 * COLUMNS, Y_ROW = STRIP * Y_PIXEL, Y_STRIP = ROWS * Y_ROW, Y_BYTES = STRIPS * Y_STRIP;
  static constexpr int STAGE = Z_BYTES + 2 * Y_BYTES;  // z, gradient, features
  using Strips = StripTable<STRIPS, ROWS, 4>;
  static constexpr int STRIPS_AT = 3 * STAGE, PLAN_AT = STRIPS_AT + Strips::BYTES, Z_TABLE_AT = PLAN_AT + LOADS * THREADS * 4;
  static constexpr int Y_TABLE_AT = Z_TABLE_AT + CHANNELS * 8, SHARED_BYTES = Y_TABLE_AT + COLUMNS * 8;
  static_assert(PARTS * 9 * J * 512 <= 3 * STAGE, "the halves of the rows meet where stages were");
};

struct WgradArguments {
  Map map;
  const uint16_t *features, *gradient, *z;
  int features_pitch, gradient_pitch, z_pitch, channels, outputs;
  Correction correction;
  Dropout dropout;
  Norm norm;
  float* slabs;  // [blocks][9][channels][outputs]
};

// A thread's chunks of a stage. What stays the same from tile to tile is in shared memory: registers are full of sums.
template <class T, class C> struct WgradStage {
  // an entry's bits: 0-15 place in the stage, 16-19 row and 20-23 column of the halo, 24 strip, 31 no chunk
  static constexpr uint32_t NONE = 1u << 31;
  const WgradArguments& args;
  typename C::Strips strips;
  uint32_t shared, plan;
  int z_chunk, y_chunk, first_channel, first_output;
  Eight z_coefficients;
  DropoutMask mask;

  DEVICE WgradStage(const WgradArguments& args, uint32_t shared)
      : args(args), strips{shared + C::STRIPS_AT}, shared(shared), plan(shared + C::PLAN_AT + threadIdx.x * 4), mask(args.dropout) {
    z_chunk = int(threadIdx.x) % C::Z_CHUNKS, first_channel = int(blockIdx.y) * C::CHANNELS;
    y_chunk = int(threadIdx.x) % C::Y_CHUNKS, first_output = int(blockIdx.z) * C::COLUMNS;
  }
  DEVICE void fill_tables() const {
    const Norm& n = args.norm;
    const Correction& c = args.correction;
    const int real = args.channels - first_channel;
    z_table().template fill<false>(C::THREADS, real, n.mean + first_channel, n.scale + first_channel, n.shift + first_channel);
    y_table().template fill<true>(C::THREADS, C::COLUMNS, c.mean + first_output, c.slope + first_output, c.offset + first_output);
  }
  DEVICE CoefficientTable z_table() const { return {shared + C::Z_TABLE_AT, C::CHANNELS}; }
  DEVICE CoefficientTable y_table() const { return {shared + C::Y_TABLE_AT, C::COLUMNS}; }
  DEVICE void read_coefficients() { z_coefficients = z_table().read(z_chunk * 8); }

  // Where a thread has no chunk, its entry names the first one of z that is its own.
  DEVICE void make_plan() {
    const int z_first = int(threadIdx.x) / C::Z_CHUNKS, y_first = int(threadIdx.x) / C::Y_CHUNKS;
#pragma unroll 1
    for (int i = 0; i < C::Z_LOADS; i++) {
      const int q = i * C::Z_STEP + z_first;
      set_entry(i, q < C::Z_PIXELS ? z_entry(q) : z_entry(z_first) | NONE);
    }
#pragma unroll 1
    for (int i = 0; i < C::Y_LOADS; i++) {
      const int q = i * C::Y_STEP + y_first;
      set_entry(C::Z_LOADS + i, q < C::Y_PIXELS && y_first < C::Y_STEP ? y_entry(q) : z_entry(z_first) | NONE);
    }
  }
  DEVICE uint32_t z_entry(int q) const {
    const int strip = q / (C::HALO_ROWS * HALO), row = q / HALO % C::HALO_ROWS, column = q % HALO;
    const uint32_t at = uint32_t(q * C::Z_PIXEL) + ((uint32_t(z_chunk) ^ swizzle(C::Z_CHUNKS, column)) << 4);
    return at | uint32_t(row << 16 | column << 20 | strip << 24);
  }
  DEVICE uint32_t y_entry(int q) const {
    const int strip = q / (C::ROWS * STRIP), row = q / STRIP % C::ROWS, column = q % STRIP;
    const uint32_t at = uint32_t(C::Z_BYTES + q * C::Y_PIXEL) + ((uint32_t(y_chunk) ^ swizzle(C::Y_CHUNKS, column)) << 4);
    return at | uint32_t((row + 1) << 16 | (column + 1) << 20 | strip << 24);
  }
  DEVICE void set_entry(int i, uint32_t e) const { store_shared4(plan + i * C::THREADS * 4, e); }
  DEVICE uint32_t entry(int i) const { return load_shared4<uint32_t>(plan + i * C::THREADS * 4); }

  DEVICE bool locate(uint32_t e, const Strip& s0, const Strip& s1, long long& pixel) const {
    const bool second = e >> 24 & 1;
    const int dy = int(e >> 16 & 15) - 1, dx = int(e >> 20 & 15) - 1, y = (second ? s1.y : s0.y) + dy, x = (second ? s1.x : s0.x) + dx;
    pixel = (second ? s1.pixel : s0.pixel) + dy * args.map.width + dx;
    return unsigned(y) < unsigned(args.map.height) && unsigned(x) < unsigned(args.map.width) && !(e & NONE);
  }

  // Starts the copies of a tile; returns a bit for each chunk that is inside the image.
  DEVICE uint32_t fetch(int slot, uint32_t stage) const {
    const Strip s0 = strips.read(slot, 0), s1 = strips.read(slot, 1);
    const int channel = first_channel + z_chunk * 8, output = first_output + y_chunk * 8;
    uint32_t inside = 0;
    long long pixel;
#pragma unroll 1
    for (int i = 0; i < C::Z_LOADS; i++) {
      const uint32_t e = entry(i);
      const bool on = locate(e, s0, s1, pixel) && channel < args.channels;
      copy16(on, stage + (e & 0xffff), args.z + pixel * args.z_pitch + channel);
      inside |= uint32_t(on) << i;
    }
#pragma unroll 1
    for (int i = C::Z_LOADS; i < C::LOADS; i++) {
      const uint32_t e = entry(i), to = stage + (e & 0xffff);
      const bool on = locate(e, s0, s1, pixel);
      copy16(on, to, args.gradient + pixel * args.gradient_pitch + output);
      copy16(on, to + C::Y_BYTES, args.features + pixel * args.features_pitch + output);
      inside |= uint32_t(on) << i;
    }
    commit_copies();
    return inside;
  }

  // Chunk i, copied and waited for, becomes h.
  DEVICE void activate_chunk(int i, uint32_t stage, uint32_t inside) const {
    const uint32_t e = entry(i), at = stage + (e & 0xffff);
    const bool on = inside >> i & 1;
    uint4 value = activate<T>(load_shared16(at), z_coefficients);
    if ((i + 1) * C::Z_STEP <= C::Z_PIXELS) store_shared16_or_zero(on, at, value);
    else store_shared16(!(e & NONE), at, on ? value : make_uint4(0, 0, 0, 0));
  }
  // Chunk i becomes dY.
  DEVICE void correct_chunk(int i, uint32_t stage, uint32_t inside, int slot, const Eight& coefficients) const {
    const uint32_t e = entry(i), at = stage + (e & 0xffff), features_at = C::Y_RAGGED && (e & NONE) ? at : at + C::Y_BYTES;
    const bool on = inside >> i & 1;
    long long pixel = 0;
    if (mask.active) locate(e, strips.read(slot, 0), strips.read(slot, 1), pixel);
    uint4 value = correct<T>(load_shared16(at), load_shared16(features_at), coefficients, mask, int(pixel), first_output + y_chunk * 8);
    if (!C::Y_RAGGED) store_shared16_or_zero(on, at, value);
    else store_shared16(!(e & NONE), at, on ? value : make_uint4(0, 0, 0, 0));
  }
  // Chunks from .. to - 1, known to the compiler.
  DEVICE void turn(int from, int to, uint32_t stage, uint32_t inside, int slot) const {
    Eight coefficients;
    if (to > C::Z_LOADS && to > from) coefficients = y_table().read(y_chunk * 8);
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) {
      if (i < from || i >= to) continue;
      if (i < C::Z_LOADS) activate_chunk(i, stage, inside);
      else correct_chunk(i, stage, inside, slot, coefficients);
    }
  }
};

// A warp's part of the product: 16 channels, all outputs, half of the rows.
template <class T, class C> struct WgradProduct {
  int lane, part, half;
  uint32_t a[3], b;
  float acc[9][C::J][4];

  DEVICE WgradProduct() : lane(int(threadIdx.x) & 31), part(int(threadIdx.x) >> 5 & (C::PARTS - 1)), half(int(threadIdx.x) >> 7), acc{} {
    const int column = lane & 7, chunk = part * 2 + (lane >> 3 & 1);
#pragma unroll
    for (int dx = 0; dx < 3; dx++)
      a[dx] = uint32_t((lane >> 4) * C::Z_STRIP + half * C::R * C::Z_ROW + (column + dx) * C::Z_PIXEL) +
              ((uint32_t(chunk) ^ swizzle(C::Z_CHUNKS, column + dx)) << 4);
    b = uint32_t(C::Z_BYTES + (lane >> 3 & 1) * C::Y_STRIP + half * C::R * C::Y_ROW + column * C::Y_PIXEL) +
        ((uint32_t(C::J > 1 ? lane >> 4 : 0) ^ swizzle(C::Y_CHUNKS, column)) << 4);
  }
  DEVICE static uint32_t pair(uint32_t address, int p) { return C::J == 4 ? address ^ uint32_t(p * 32) : address + uint32_t(p * 32); }

  // Row by row of h; the three rows of dY that meet it roll on. Beside the last R rows, the next tile's chunks are turned.
  DEVICE void multiply(uint32_t stage, const WgradStage<T, C>& chunks, uint32_t raw, uint32_t inside, int slot) {
    constexpr int SHARE = (C::LOADS + C::R - 1) / C::R;
    uint32_t y[3][C::J][2];
#pragma unroll
    for (int row = 0; row < C::R + 2; row++) {
      if (row < C::R) load_columns<C::J>(y[row % 3], stage + b + row * C::Y_ROW, pair);
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        uint32_t h[4];
        ldmatrix_transposed(h, stage + a[dx] + row * C::Z_ROW);
#pragma unroll
        for (int dy = 0; dy < 3; dy++)
          if (row - dy >= 0 && row - dy < C::R)
#pragma unroll
            for (int j = 0; j < C::J; j++) {
              const int at = (row - dy) % 3;
              mma<T>(acc[dy * 3 + dx][j], h, y[at][j][0], y[at][j][1]);
            }
      }
      if (row >= 2) chunks.turn((row - 2) * SHARE, row == C::R + 1 ? C::LOADS : (row - 1) * SHARE, raw, inside, slot);
    }
  }

  // The lower rows' sums join the upper rows'.
  DEVICE void join(uint32_t shared) {
    const uint32_t exchange = shared + uint32_t(part * 9 * C::J * 512 + lane * 16);
    if (half)
#pragma unroll
      for (int i = 0; i < 9 * C::J; i++) {
        uint4 v;
        memcpy(&v, acc[i / C::J][i % C::J], 16);
        store_shared16(true, exchange + i * 512, v);
      }
    barrier();
    if (!half)
#pragma unroll
      for (int i = 0; i < 9 * C::J; i++) {
        uint4 v = load_shared16(exchange + i * 512);
        float f[4];
        memcpy(f, &v, 16);
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i / C::J][i % C::J][e] += f[e];
      }
  }
  DEVICE void write(const WgradArguments& args) const {
    if (half) return;
    const int channel = int(blockIdx.y) * C::CHANNELS + part * 16 + (lane >> 2), output = int(blockIdx.z) * C::COLUMNS + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 9 * C::J; i++)
#pragma unroll
      for (int low = 0; low < 2; low++) {  // channels 8 apart
        const int tap = i / C::J, j = i % C::J, ch = channel + 8 * low;
        float* to = args.slabs + (((long long)blockIdx.x * 9 + tap) * args.channels + ch) * args.outputs + output + j * 8;
        if (ch < args.channels) *reinterpret_cast<float2*>(to) = make_float2(acc[tap][j][2 * low], acc[tap][j][2 * low + 1]);
      }
  }
};

// Grid: tiles by turns, blocks of channels, blocks of outputs.
template <class T, class C> __global__ void __launch_bounds__(C::THREADS, 1) conv3x3_wgrad_kernel(const WgradArguments args) {
  const uint32_t shared = shared_base();
  WgradStage<T, C> stage(args, shared);
  stage.make_plan();
  stage.fill_tables();
  const int stride = int(gridDim.x);
  int tile = int(blockIdx.x), slot = 0;
  for (int i = 0; i < 3; i++) stage.strips.write(args.map, tile + i * stride, i);
  barrier();
  stage.read_coefficients();
  uint32_t ready = shared, raw = shared + C::STAGE, empty = shared + 2 * C::STAGE;
  uint32_t inside = stage.fetch(0, ready), next_inside = stage.fetch(1, raw);
  wait_copies<1>();
  stage.turn(0, C::LOADS, ready, inside, 0);
  inside = next_inside;
  WgradProduct<T, C> product;
  barrier();
#pragma unroll 1
  for (; tile < args.map.tiles; tile += stride, slot++) {
    stage.strips.write(args.map, tile + 3 * stride, slot + 3);
    next_inside = stage.fetch(slot + 2, empty);
    wait_copies<1>();
    product.multiply(ready, stage, raw, inside, slot + 1);
    barrier();
    uint32_t swap = ready;
    ready = raw, raw = empty, empty = swap;
    inside = next_inside;
  }
  wait_copies<0>();
  barrier();
  product.join(shared);
  product.write(args);
}

}  // namespace csp::cuda
