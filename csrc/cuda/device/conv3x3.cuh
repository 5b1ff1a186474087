// The main loop of forward and dgrad: a 3x3 product over a halo that is normalised (or corrected) while it is staged, so that each of
// its nine readers finds it ready.
//
// A warp multiplies R rows of a pair of strips (16 pixels) by 8 J columns. For one column offset dx and 16 channels it reads R + 2 rows
// of the halo once: row r serves the outputs r, r - 1 and r - 2 with the three weights of that column, which stay in registers.
// Staging is by DEPTH channels: while a step is multiplied, the next one's chunks come from memory and are stored, one barrier a step.
#pragma once
#include "prologue.cuh"
#include "tile.cuh"

namespace csp::cuda {

template <int R_, int DOWN_, int ACROSS_, int GROUPS_, int HALVES_, int J_, int DEPTH_> struct Conv3x3Tile {
  // warps: DOWN x ACROSS units of pixels, times GROUPS of columns, times HALVES (or 4, 8 parts) of the channels; DEPTH channels a step
  static constexpr int R = R_, DOWN = DOWN_, ACROSS = ACROSS_, GROUPS = GROUPS_, HALVES = HALVES_, J = J_;
  static constexpr int UNITS = DOWN * ACROSS, WARPS = UNITS * GROUPS * HALVES, THREADS = 32 * WARPS, COLUMNS = 8 * J * GROUPS;
  static constexpr int STRIPS = 2 * ACROSS, ROWS = R * DOWN, HALO_ROWS = ROWS + 2, PIXELS = STRIPS * HALO_ROWS * HALO;
  static constexpr int DEPTH = DEPTH_, CHUNKS = DEPTH / 8, PIXEL_BYTES = 2 * DEPTH, ROW_BYTES = HALO * PIXEL_BYTES;
  static constexpr int STRIP_BYTES = HALO_ROWS * ROW_BYTES, HALO_BYTES = STRIPS * STRIP_BYTES;
  static constexpr int EXCHANGE_BYTES = (HALVES - 1) * UNITS * R * J * 512;
  static constexpr int BUFFER = HALO_BYTES > EXCHANGE_BYTES ? HALO_BYTES : EXCHANGE_BYTES;
  static constexpr int K16 = DEPTH / 16 / HALVES;  // products of 16 channels a step and warp
  static constexpr int TAP_BYTES = 16 * COLUMNS * 2, SLAB_BYTES = 9 * TAP_BYTES;
  static constexpr int LOADS = (PIXELS * CHUNKS + THREADS - 1) / THREADS;
  static constexpr bool SPLITS = R == 1 && HALVES > 1;  // may have its channels split over blocks: small tiles
  using Strips = StripTable<STRIPS, ROWS, 4>;

  // Shared memory: two halos, strips, coefficients, weights [slab of 16 channels][9][16][COLUMNS].
  static constexpr int STRIPS_AT = 2 * BUFFER, TABLE_AT = STRIPS_AT + Strips::BYTES;
  HOST_DEVICE static constexpr int steps(int channels) { return (channels + DEPTH - 1) / DEPTH; }
  HOST_DEVICE static constexpr int slabs(int channels) { return steps(channels) * DEPTH / 16; }
  HOST_DEVICE static constexpr int weights_at(int channels) { return TABLE_AT + steps(channels) * DEPTH * 8; }
  HOST_DEVICE static constexpr int shared_bytes(int channels) { return weights_at(channels) + slabs(channels) * SLAB_BYTES; }
};

// Which part of a tile this thread's warp computes.
template <class C> struct Place {
  int lane, warp, unit, group, half;

  DEVICE Place() : lane(int(threadIdx.x) & 31), warp(int(threadIdx.x) >> 5) {
    constexpr int PARTS = C::GROUPS * C::HALVES;
    unit = warp / PARTS, group = warp % PARTS / C::HALVES, half = warp % C::HALVES;
  }
  DEVICE int row() const { return unit / C::ACROSS * C::R; }
  DEVICE int strip(int h) const { return unit % C::ACROSS * 2 + h; }
};

// This thread's share of a halo: one chunk of every STEP-th pixel.
template <class C, class Prologue> struct HaloStage {
  static constexpr int STEP = C::THREADS / C::CHUNKS;
  Prologue& prologue;
  int channels, chunk, first;
  int pixel[C::LOADS];       // -1: outside the image
  uint32_t place[C::LOADS];  // in the halo

  DEVICE HaloStage(Prologue& prologue, int channels)
      : prologue(prologue), channels(channels), chunk(int(threadIdx.x) % C::CHUNKS), first(int(threadIdx.x) / C::CHUNKS) {
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) {
      int q = i * STEP + first;
      place[i] = uint32_t(opaque(q * C::PIXEL_BYTES + ((chunk ^ int(swizzle(C::CHUNKS, q % HALO))) << 4)));
    }
  }
  DEVICE static constexpr bool ragged(int i) { return (i + 1) * STEP > C::PIXELS; }
  DEVICE bool exists(int i) const { return !ragged(i) || i * STEP + first < C::PIXELS; }
  DEVICE int channel(int step) const { return step * C::DEPTH + chunk * 8; }

  DEVICE void locate(const typename C::Strips& strips, int slot, const Map& map) {
    const int f = opaque(first);
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) {
      unsigned q = unsigned(i * STEP + f);
      if (ragged(i) && q >= C::PIXELS) q = C::PIXELS - 1;
      unsigned strip = q / (C::HALO_ROWS * HALO), rest = q % (C::HALO_ROWS * HALO), row = rest / HALO, column = rest % HALO;
      Strip s = strips.read(slot, int(strip));
      int dy = int(row) - 1, dx = int(column) - 1;
      bool inside = unsigned(s.y + dy) < unsigned(map.height) && unsigned(s.x + dx) < unsigned(map.width);
      pixel[i] = inside ? s.pixel + dy * map.width + dx : -1;
    }
  }
  DEVICE void fetch(int step) {
    const bool real = channel(step) < channels;
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) prologue.fetch(i, real && pixel[i] >= 0, pixel[i], channel(step));
  }
  template <int FROM, int TO> DEVICE void store(uint32_t halo, int step) const {
    const bool real = channel(step) < channels;
#pragma unroll
    for (int i = FROM; i < TO; i++) {
      uint4 value = prologue.value(i, pixel[i], channel(step));
      bool nonzero = real && pixel[i] >= 0;
      if (!ragged(i)) store_shared16_or_zero(nonzero, halo + place[i], value);
      else store_shared16(exists(i), halo + place[i], nonzero ? value : make_uint4(0, 0, 0, 0));
    }
  }
};

// Offsets of this lane's fragments in a halo and in the weights.
template <class C> struct Fragments {
  uint32_t a[3], b;

  DEVICE explicit Fragments(const Place<C>& place) {
    const int lane = place.lane, column = lane & 7;
    const uint32_t a_chunk = uint32_t(place.half * C::K16 * 2 + (lane >> 4));
#pragma unroll
    for (int dx = 0; dx < 3; dx++)
      a[dx] = uint32_t(place.strip(lane >> 3 & 1) * C::STRIP_BYTES + place.row() * C::ROW_BYTES + (column + dx) * C::PIXEL_BYTES) +
              ((a_chunk ^ swizzle(C::CHUNKS, column + dx)) << 4);
    const int k = lane & 15, chunk = place.group * C::J + (C::J > 1 ? lane >> 4 : 0);
    b = uint32_t(k * C::COLUMNS * 2) + ((uint32_t(chunk) ^ swizzle(C::COLUMNS / 8, k)) << 4);
  }
  DEVICE uint32_t a_of(int dx, int k) const { return a[dx] ^ uint32_t(k * 32); }  // 16 channels on: the chunk after the next
  // Chunks 2 and 3 of a group follow 0 and 1, swizzled or not.
  DEVICE static uint32_t pair(uint32_t address, int p) { return C::COLUMNS % 32 == 0 ? address ^ uint32_t(p * 32) : address + p * 32; }
};

// acc [R][J] += one column of taps, 16 channels.
template <class T, class C> DEVICE void multiply(float (&acc)[C::R][C::J][4], uint32_t halo, uint32_t weights) {
  uint32_t b[3][C::J][2];
#pragma unroll
  for (int dy = 0; dy < 3; dy++) load_columns<C::J>(b[dy], weights + dy * 3 * C::TAP_BYTES, Fragments<C>::pair);
#pragma unroll
  for (int row = 0; row < C::R + 2; row++) {
    uint32_t a[4];
    ldmatrix(a, halo + row * C::ROW_BYTES);
#pragma unroll
    for (int dy = 0; dy < 3; dy++)
      if (row - dy >= 0 && row - dy < C::R)
#pragma unroll
        for (int j = 0; j < C::J; j++) mma<T>(acc[row - dy][j], a, b[dy][j][0], b[dy][j][1]);
  }
}

// The weights' only way into shared memory, once a block.
template <class C> DEVICE void copy_weights(uint32_t to, const uint16_t* from, int slabs) {
  for (int i = int(threadIdx.x); i < slabs * (C::SLAB_BYTES / 16); i += C::THREADS) copy16(true, to + i * 16, from + i * 8);
  commit_copies();
}

// Epilogue: prefetch(on, strips, slot) of what it reads (in every step, off until the last, so that its registers are free before),
// finish(acc, free, slot) with a halo's worth of free shared memory.
template <class T, class C, class Prologue, class Epilogue>
DEVICE void convolve(const Map& map, int channels, const uint16_t* weights, uint32_t shared, Prologue& prologue, Epilogue& epilogue) {
  constexpr int EARLY = Epilogue::PREFETCHES ? C::LOADS : C::LOADS / 2;  // stored before what is prefetched needs registers
  const Place<C> place;
  const Fragments<C> fragments(place);
  const typename C::Strips strips{shared + C::STRIPS_AT};
  const int steps = C::steps(channels), stride = int(gridDim.x);
  const uint32_t weights_at = shared + uint32_t(C::weights_at(channels));
  copy_weights<C>(weights_at, weights, C::slabs(channels));
  HaloStage<C, Prologue> stage(prologue, channels);
  float acc[C::R][C::J][4];
  uint32_t halo = shared, other = shared + C::BUFFER;
  int tile = int(blockIdx.x), slot = 0;
  strips.write(map, tile, 0);
  strips.write(map, tile + stride, 1);
  barrier();
  stage.locate(strips, 0, map);
  stage.fetch(0);
  prologue.coefficients(stage.channel(0));
  stage.template store<0, C::LOADS>(halo, 0);
  wait_copies<0>();
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
      if (last) stage.locate(strips, slot + 1, map);
      stage.fetch(next);
#pragma unroll
      for (int dx = 0; dx < 3; dx++) {
        if (dx == 2) epilogue.prefetch(last, strips, slot);
#pragma unroll
        for (int k = 0; k < C::K16; k++) {
          const uint32_t slab = uint32_t(step * (C::DEPTH / 16) + place.half * C::K16 + k) * C::SLAB_BYTES;
          multiply<T, C>(acc, halo + fragments.a_of(dx, k), weights_at + slab + dx * C::TAP_BYTES + fragments.b);
        }
        if (dx == 1) {
          prologue.coefficients(stage.channel(next));
          stage.template store<0, EARLY>(other, next);
        }
      }
      stage.template store<EARLY, C::LOADS>(other, next);
      barrier();
      uint32_t swap = halo;
      halo = other, other = swap;
    }
    epilogue.finish(acc, other, slot);
  }
}

// What the warps of one unit of pixels have of the sum, by 16 bytes a lane: a row's give goes to another's take.
template <int FROM, int TO, int R, int J> DEVICE void give(const float (&acc)[R][J][4], uint32_t exchange) {
#pragma unroll
  for (int r = FROM; r < TO; r++)
#pragma unroll
    for (int j = 0; j < J; j++) {
      uint4 v;
      memcpy(&v, acc[r][j], 16);
      store_shared16(true, exchange + (r * J + j) * 512, v);
    }
}
template <int FROM, int TO, int R, int J> DEVICE void take(float (&acc)[R][J][4], uint32_t exchange) {
#pragma unroll
  for (int r = FROM; r < TO; r++)
#pragma unroll
    for (int j = 0; j < J; j++) {
      uint4 v = load_shared16(exchange + (r * J + j) * 512);
      float f[4];
      memcpy(f, &v, 16);
#pragma unroll
      for (int e = 0; e < 4; e++) acc[r][j][e] += f[e];
    }
}

// Rows and pixels of this lane's results: lane / 4 across in each of two strips, R rows down.
template <class C> struct Results {
  int rows[2], pixel[2];  // rows inside the image, the first row's pixel

  DEVICE void locate(const Place<C>& place, const typename C::Strips& strips, int slot, const Map& map) {
    const int column = opaque(place.lane) >> 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Strip s = strips.read(slot, place.strip(h));
      rows[h] = s.y >= 0 && s.x + column < map.width ? map.height - s.y - place.row() : 0;
      pixel[h] = s.pixel + place.row() * map.width + column;
    }
  }
};

}  // namespace csp::cuda
