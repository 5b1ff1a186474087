// A dense layer's 1x1 and 3x3 in one kernel. A block's tile is one cell, or several where images are small: a rectangle of outputs and
// the pixels around it that lie inside the image. Step by step, 32 channels each:
//
//   1x1: z [pixels of the tile, b] stays in registers; its inputs are normalised while they are staged, as a list without gaps
//   once: h = relu(norm2(z)) to shared memory, where the 3x3 indexes it, and zeros outside the image
//   3x3: as in conv3x3.cuh
//
// While a step is multiplied, the next one's inputs and weights come to the other of two stages, over the ends of phases and tiles too.
#pragma once
#include "conv3x3.cuh"

namespace csp::cuda {

// How images are cut into cells, and tiles made of them. Cells lie one below another only where each is as high as its image: then a row
// of zeros is enough between them. Cells side by side are at most a strip wide, each with a halo of its own.
struct Cut {
  int image_height, image_width;
  int height, width, down, across;    // a cell's outputs, cells of an image
  int cells, tiles;                   // of all images
  int tile_down, tile_across, quota;  // cells of a tile; most pixels of a cell with those around it
};

struct DenseLayerArguments {
  Cut cut;
  const uint16_t *features, *weights1, *weights2;  // weights: packed
  uint16_t* out;
  int features_pitch, out_pitch, entering, bottleneck, growth;
  Norm norm1, norm2;
  Dropout dropout;
};

template <int R_, int GROUPS_, int J_> struct DenseTile {
  // 3x3, as Conv3x3Tile: 16 outputs across by ROWS; HALVES of 32 channels a step, or GROUPS of columns. A plane: 32 channels of h.
  static constexpr int R = R_, UNITS = 4, ACROSS = 1, GROUPS = GROUPS_, HALVES = 2 / GROUPS, J = J_, COLUMNS = 8 * J * GROUPS;
  static constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = R * UNITS, WIDTH = 16, PITCH = WIDTH + 4, K16 = 2 / HALVES;
  static constexpr int DEPTH = 32, CHUNKS = 4, PIXEL_BYTES = 2 * DEPTH, ROW_BYTES = PITCH * PIXEL_BYTES, STRIP_BYTES = STRIP * PIXEL_BYTES;
  static constexpr int PLANE_BYTES = (ROWS + 2) * ROW_BYTES, EXCHANGE_BYTES = HALVES == 2 ? UNITS * R * J * 512 : 0;
  static constexpr int TAP_BYTES = 16 * COLUMNS * 2, SLAB_BYTES = 9 * TAP_BYTES;
  using Lower = DenseTile<(R > 1 ? R - 1 : 1), GROUPS, J>;  // for units that have a row less
  // 1x1: a warp multiplies up to M times 16 pixels, every LANES-th of the tile, by SPAN columns
  static constexpr int M = 4, SPAN = 64, PIXELS = 256, LOADS = PIXELS * CHUNKS / THREADS, SPAN_BYTES = DEPTH * SPAN * 2;
  static_assert(PIXELS == THREADS, "a thread locates a pixel");

  HOST_DEVICE static constexpr int steps(int channels) { return (channels + DEPTH - 1) / DEPTH; }
  HOST_DEVICE static constexpr int spans(int bottleneck) { return (bottleneck + SPAN - 1) / SPAN; }
  HOST_DEVICE static constexpr int lanes(int bottleneck) { return WARPS / (spans(bottleneck) > 2 ? 4 : spans(bottleneck)); }  // of warps
  HOST_DEVICE static constexpr int capacity(int bottleneck) {
    return lanes(bottleneck) * M * 16 < PIXELS ? lanes(bottleneck) * M * 16 : PIXELS;
  }
};

// Of a tile: where each pixel of its list comes from and goes to in h, where each output goes. -1: nowhere.
template <class C> struct TileTable {
  static constexpr int SLOT = 3 * C::PIXELS * 4 + 16, BYTES = 2 * SLOT;
  uint32_t base;
  const Cut& cut;

  struct Cell {
    bool exists;
    int image, y, x;
  };
  DEVICE int cells() const { return cut.tile_down * cut.tile_across; }
  DEVICE Cell cell(int tile, int i) const {  // i beyond the tile's: any
    const unsigned id = unsigned(tile * cells() + i), row = id / unsigned(cut.across), image = row / unsigned(cut.down);
    const unsigned y = row - image * unsigned(cut.down), x = id - row * unsigned(cut.across);
    return {tile < cut.tiles && int(id) < cut.cells, int(image), int(y) * cut.height, int(x) * cut.width};
  }
  DEVICE int pixel(const Cell& c, int y, int x) const { return (c.image * cut.image_height + y) * cut.image_width + x; }
  // Of the cell i of a tile, the pixel in a row and a column of its halo.
  DEVICE int place(int i, int row, int column) const {
    const int down = cut.tile_across == 2 ? i >> 1 : i, across = cut.tile_across == 2 ? i & 1 : 0;
    return ((down * (cut.height + 1) + row) * C::ROW_BYTES + (across * HALO + column) * C::PIXEL_BYTES) |
           int(swizzle(C::CHUNKS, column) << 4);
  }
  DEVICE uint32_t entry(int slot, int which, int i) const { return base + uint32_t((slot & 1) * SLOT + (which * C::PIXELS + i) * 4); }
  DEVICE int source(int slot, int i) const { return load_shared4<int>(entry(slot, 0, i)); }
  DEVICE int place_of(int slot, int i) const { return load_shared4<int>(entry(slot, 1, i)); }
  DEVICE int target(int slot, int i) const { return load_shared4<int>(entry(slot, 2, i)); }
  DEVICE int listed(int slot) const { return load_shared4<int>(entry(slot, 3, 0)); }  // pixels up to the last

  DEVICE void write(int tile, int slot) const {
    write_list(tile, slot, threadIdx.x);
    write_target(tile, slot, threadIdx.x);
  }
  DEVICE void write_list(int tile, int slot, unsigned p) const {
    const unsigned i = p / unsigned(cut.quota), rest = p - i * unsigned(cut.quota);
    const Cell c = cell(tile, int(i));
    const int top = c.y > 0 ? c.y - 1 : 0, left = c.x > 0 ? c.x - 1 : 0;
    int bottom = c.y + cut.height + 1, right = c.x + cut.width + 1;
    bottom = bottom < cut.image_height ? bottom : cut.image_height, right = right < cut.image_width ? right : cut.image_width;
    const unsigned wide = unsigned(right - left), row = rest / wide;
    const int y = top + int(row), x = left + int(rest - row * wide);
    const bool on = int(i) < cells() && c.exists && y < bottom;
    store_shared4(entry(slot, 0, int(p)), on ? pixel(c, y, x) : -1);
    store_shared4(entry(slot, 1, int(p)), on ? place(int(i), y - c.y + 1, x - c.x + 1) : -1);
    if (p == 0) store_shared4(entry(slot, 3, 0), cells() > 1 ? cells() * cut.quota : (bottom - top) * int(wide));
  }
  DEVICE void write_target(int tile, int slot, unsigned q) const {
    const unsigned row = q / C::WIDTH, column = q % C::WIDTH, pitch = unsigned(cut.height) + 1, down = row / pitch;
    const bool two = cut.tile_across == 2;
    const int y = int(row - down * pitch), x = int(two ? column % STRIP : column);
    const Cell c = cell(tile, two ? int(down * 2 + column / STRIP) : int(down));
    const bool on = c.exists && int(down) < cut.tile_down && y < cut.height && x < cut.width && c.y + y < cut.image_height &&
                    c.x + x < cut.image_width;
    store_shared4(entry(slot, 2, int(q)), on ? pixel(c, c.y + y, c.x + x) : -1);
  }
  // Zeros where h has no pixel of an image.
  DEVICE void clear(uint32_t h, int planes, int tile) const {
#pragma unroll 1
    for (int from = 0; from < (C::ROWS + 2) * C::PITCH; from += C::THREADS) {
      const int i = from + int(threadIdx.x), row = i / C::PITCH, column = i % C::PITCH;
      const int across = cut.tile_across == 2 ? column / HALO : 0, down = cut.tile_down > 1 ? row / (cut.height + 1) : 0;
      const Cell c = cell(tile, down * cut.tile_across + across);
      const int dy = row - down * (cut.height + 1) - 1, dx = column - across * HALO - 1;
      const bool inside = c.exists && down < cut.tile_down && unsigned(c.y + dy) < unsigned(cut.image_height) &&
                          unsigned(c.x + dx) < unsigned(cut.image_width);
      const bool on = row < C::ROWS + 2 && !inside;
      uint32_t to = h + uint32_t(i * C::PIXEL_BYTES) + (swizzle(C::CHUNKS, i) << 4);
#pragma unroll 1
      for (int plane = 0; plane < planes; plane++, to += C::PLANE_BYTES)
#pragma unroll
        for (int chunk = 0; chunk < C::CHUNKS; chunk++) store_shared16(on, to ^ uint32_t(chunk << 4), make_uint4(0, 0, 0, 0));
    }
  }
};

// Shared memory: two stages (pixels, then weights; or weights of the 3x3), h, tables, coefficients.
template <class C> struct DenseShared {
  int list_bytes, stage_bytes, h_at, table_at, norm1_at, norm2_at, bytes;

  HOST_DEVICE constexpr DenseShared(const Cut& cut, int entering, int bottleneck)
      : list_bytes((cut.tile_down * cut.tile_across * cut.quota + 15) / 16 * 16 * C::PIXEL_BYTES), stage_bytes(0), h_at(0), table_at(0),
        norm1_at(0), norm2_at(0), bytes(0) {
    const int first = list_bytes + C::spans(bottleneck) * C::SPAN_BYTES, second = 2 * C::SLAB_BYTES;
    const int h = C::steps(bottleneck) * C::PLANE_BYTES;
    stage_bytes = first > second ? first : second;
    h_at = 2 * stage_bytes, table_at = h_at + (h > C::EXCHANGE_BYTES ? h : C::EXCHANGE_BYTES);
    norm1_at = table_at + TileTable<C>::BYTES, norm2_at = norm1_at + 8 * C::DEPTH * C::steps(entering);
    bytes = norm2_at + 8 * C::DEPTH * C::steps(bottleneck);
  }
};

// This thread's share of a tile's list: one chunk of each of LOADS pixels.
template <class T, class C> struct ListStage {
  static constexpr int STEP = C::THREADS / C::CHUNKS;
  Activation<T, C::LOADS> prologue;
  int channels, pixels, chunk, first;
  int pixel[C::LOADS];
  uint32_t place;

  DEVICE ListStage(const DenseLayerArguments& args, const CoefficientTable& table, int pixels)
      : channels(args.entering), pixels(pixels), chunk(int(threadIdx.x) % C::CHUNKS), first(int(threadIdx.x) / C::CHUNKS) {
    prologue.z = args.features, prologue.pitch = args.features_pitch, prologue.table = table;
    place = uint32_t(first * C::PIXEL_BYTES) + ((uint32_t(chunk) ^ swizzle(C::CHUNKS, first)) << 4);
  }
  DEVICE int channel(int step) const { return step * C::DEPTH + chunk * 8; }
  DEVICE void locate(const TileTable<C>& table, int slot) {
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) pixel[i] = table.source(slot, i * STEP + first);
  }
  DEVICE void fetch(int step) {
    const bool real = channel(step) < channels;
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) prologue.fetch(i, real && pixel[i] >= 0, pixel[i], channel(step));
  }
  // Rows of the list that are no pixels are anything: what becomes of them is not stored in h.
  DEVICE void store(uint32_t stage, int step) {
    const bool real = channel(step) < channels;
    prologue.coefficients(channel(step));
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) {
      const uint4 value = prologue.value(i, pixel[i], channel(step));
      const bool exists = i * STEP + first < pixels;
      store_shared16(exists, stage + place + i * STEP * C::PIXEL_BYTES, real ? value : make_uint4(0, 0, 0, 0));
    }
  }
};

// The 1x1 of a tile: z in registers.
template <class T, class C> struct Bottleneck {
  float z[C::M][8][4];
  int lane, lanes, mine, row, span;  // lanes of warps share the pixels, spans the columns
  bool active;
  int tiles;      // of 16 pixels, that this warp has
  uint32_t a, b;  // offsets of this lane's fragments in the list, in the weights

  DEVICE explicit Bottleneck(int bottleneck) : lane(int(threadIdx.x) & 31), lanes(C::lanes(bottleneck)), tiles(0) {
    const int warp = int(threadIdx.x) >> 5, p = lane & 15, chunk = lane >> 4;
    mine = warp % lanes, span = warp / lanes, active = span < C::spans(bottleneck);
    a = uint32_t((mine * 16 + p) * C::PIXEL_BYTES) + ((uint32_t(chunk) ^ swizzle(C::CHUNKS, p)) << 4);
    b = uint32_t(span * C::SPAN_BYTES + p * C::SPAN * 2) + ((uint32_t(chunk) ^ swizzle(C::SPAN / 8, p)) << 4);
    row = mine * 16 + (lane >> 2);
  }
  DEVICE void start(int listed) {
    tiles = active ? ((listed + 15) / 16 - mine + lanes - 1) / lanes : 0;
#pragma unroll
    for (int i = 0; i < C::M; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) z[i][j][e] = 0;
  }
  DEVICE static uint32_t pair(uint32_t address, int p) { return address ^ uint32_t(p * 32); }
  DEVICE void load_weights(uint32_t (&w)[8][2], uint32_t weights, int k) const {
    load_columns<8>(w, weights + b + uint32_t(k * 16 * C::SPAN * 2), pair);
  }
  DEVICE void multiply(int i, const uint32_t (&w)[8][2], uint32_t list, int k) {
    uint32_t x[4];
    ldmatrix(x, list + uint32_t(i * lanes * 16 * C::PIXEL_BYTES) + (a ^ uint32_t(k * 32)));
#pragma unroll
    for (int j = 0; j < 8; j++) mma<T>(z[i][j], x, w[j][0], w[j][1]);
  }
  // The first products wait for as few loads as can be.
  DEVICE void multiply(uint32_t list, uint32_t weights) {
    if (tiles <= 0) return;
    uint32_t w[2][8][2];
    load_weights(w[0], weights, 0);
    multiply(0, w[0], list, 0);
    load_weights(w[1], weights, 1);
    multiply(0, w[1], list, 1);
#pragma unroll
    for (int i = 1; i < C::M; i++)
      if (i < tiles) multiply(i, w[0], list, 0), multiply(i, w[1], list, 1);
  }
  // h, eight neighbouring channels a thread and plane; rounded as the pair of kernels rounds, twice.
  DEVICE void store(uint32_t h, int planes, const CoefficientTable& norm, const TileTable<C>& table, int slot) const {
    const int t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int plane = span * 2 + half;
      if (plane >= planes) return;
      const Eight e = norm.read(plane * C::DEPTH + 8 * t);
#pragma unroll
      for (int i = 0; i < C::M; i++)
        if (i < tiles)
#pragma unroll
          for (int low = 0; low < 2; low++) {
            const int to = table.place_of(slot, row + i * lanes * 16 + 8 * low);
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) words[j] = pack<T>(z[i][4 * half + j][2 * low], z[i][4 * half + j][2 * low + 1]);
            const uint4 value = activate<T>(make_uint4(words[0], words[1], words[2], words[3]), e);
            store_shared16(to >= 0, h + plane * C::PLANE_BYTES + (uint32_t(to) ^ uint32_t(t << 4)), value);
          }
    }
  }
};

// Which rows of a tile a unit of warps multiplies: as even as they come.
struct UnitRows {
  int first, count;

  DEVICE UnitRows(const Cut& cut, int unit, int units) {
    const int rows = cut.tile_down * (cut.height + 1) - 1, each = rows / units, more = rows % units;
    first = unit * each + (unit < more ? unit : more), count = each + (unit < more);
  }
};

// The slice of a tile: adds what the halves of the channels have, and writes.
template <class T, class C> struct DenseEpilogue {
  static constexpr int J = C::J, MIDDLE = C::HALVES == 2 ? C::R / 2 : C::R;  // rows of the first half
  const DenseLayerArguments& args;
  const Place<C>& place;
  const UnitRows& rows;
  const TileTable<C>& table;
  DropoutMask mask;

  DEVICE DenseEpilogue(const DenseLayerArguments& args, const Place<C>& place, const UnitRows& rows, const TileTable<C>& table)
      : args(args), place(place), rows(rows), table(table), mask(args.dropout) {}

  template <int FROM, int TO> DEVICE void write(const float (&acc)[C::R][J][4], int slot) const {
    const int channel = place.group * 8 * J + (place.lane & 3) * 2 * J;
#pragma unroll
    for (int r = FROM; r < TO; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int at = (rows.first + r) * C::WIDTH + h * STRIP + (place.lane >> 2);
        const int pixel = r < rows.count ? table.target(slot, at) : -1;
        uint32_t words[J];
#pragma unroll
        for (int j = 0; j < J; j++) {
          float low = acc[r][j][2 * h], high = acc[r][j][2 * h + 1];
          if (mask.active) low = mask.apply(low, pixel, channel + 2 * j), high = mask.apply(high, pixel, channel + 2 * j + 1);
          words[j] = pack<T>(low, high);
        }
        store_words(pixel >= 0 && channel < args.growth, args.out + (long long)pixel * args.out_pitch + channel, words);
      }
  }
  DEVICE void finish(float (&acc)[C::R][J][4], uint32_t free, int slot) const {
    if constexpr (C::HALVES == 1) write<0, C::R>(acc, slot);
    else {
      const uint32_t exchange = free + place.unit * C::R * J * 512 + place.lane * 16;
      if (place.half == 0) give<MIDDLE, C::R>(acc, exchange);
      else give<0, MIDDLE>(acc, exchange);
      barrier();
      if (place.half == 0) take<0, MIDDLE>(acc, exchange), write<0, MIDDLE>(acc, slot);
      else take<MIDDLE, C::R>(acc, exchange), write<MIDDLE, C::R>(acc, slot);
    }
    barrier();  // h, where the exchange was, and the other slot of the table are free
  }
};

// So many bytes; BYTES: at most.
template <class C, int BYTES> DEVICE void copy_line(uint32_t to, const uint16_t* from, int bytes) {
  const int first = opaque(int(threadIdx.x)) * 16;
  from += first / 2, to += first;
#pragma unroll
  for (int i = 0; i < BYTES; i += C::THREADS * 16) copy16(first + i < bytes, to + i, from + i / 2);
}

// A plane of h by nine taps, the rows of acc.
template <class T, class C, class Rows>
DEVICE void multiply_plane(float (&acc)[Rows::R][C::J][4], uint32_t halo, uint32_t weights, const Fragments<C>& fragments) {
#pragma unroll
  for (int dx = 0; dx < 3; dx++)
#pragma unroll
    for (int k = 0; k < C::K16; k++)
      multiply<T, Rows>(acc, halo + fragments.a_of(dx, k), weights + k * C::SLAB_BYTES + dx * C::TAP_BYTES + fragments.b);
}

template <class T, class C> __global__ void __launch_bounds__(C::THREADS, 1) dense_layer_kernel(const DenseLayerArguments args) {
  const DenseShared<C> layout(args.cut, args.entering, args.bottleneck);
  const uint32_t shared = shared_base(), h = shared + layout.h_at;
  const CoefficientTable norm1{shared + layout.norm1_at, C::steps(args.entering) * C::DEPTH};
  const CoefficientTable norm2{shared + layout.norm2_at, C::steps(args.bottleneck) * C::DEPTH};
  norm1.fill<false>(C::THREADS, args.entering, args.norm1.mean, args.norm1.scale, args.norm1.shift);
  norm2.fill<false>(C::THREADS, args.bottleneck, args.norm2.mean, args.norm2.scale, args.norm2.shift);
  const TileTable<C> table{shared + layout.table_at, args.cut};
  const int steps = C::steps(args.entering), planes = C::steps(args.bottleneck), stride = int(gridDim.x);
  const int weight_bytes = C::spans(args.bottleneck) * C::SPAN_BYTES;
  const auto copy_1x1 = [&](uint32_t stage, int step) {
    copy_line<C, 4 * C::SPAN_BYTES>(stage + layout.list_bytes, args.weights1 + (long long)step * (weight_bytes / 2), weight_bytes);
  };
  const auto copy_3x3 = [&](uint32_t stage, int plane) {
    copy_line<C, 2 * C::SLAB_BYTES>(stage, args.weights2 + (long long)plane * C::SLAB_BYTES, 2 * C::SLAB_BYTES);
  };
  const Place<C> place;
  Fragments<C> fragments(place);
  const UnitRows rows(args.cut, place.unit, C::UNITS);
  const DenseEpilogue<T, C> epilogue(args, place, rows, table);
#pragma unroll
  for (int dx = 0; dx < 3; dx++) {
    fragments.a[dx] += uint32_t((rows.first - place.row()) * C::ROW_BYTES);
    if (args.cut.tile_across == 2 && (place.lane >> 3 & 1)) fragments.a[dx] += (HALO - STRIP) * C::PIXEL_BYTES;  // each its halo
  }
  ListStage<T, C> list(args, norm1, layout.list_bytes / C::PIXEL_BYTES);
  Bottleneck<T, C> bottleneck(args.bottleneck);
  uint32_t stage = shared, other = shared + layout.stage_bytes;
  const auto turn = [&] {
    wait_copies<0>();
    barrier();
    const uint32_t swap = stage;
    stage = other, other = swap;
  };
  const int early = int(threadIdx.x) < C::THREADS / 2;  // a warp of each scheduler's two stages first and multiplies then
  int tile = int(blockIdx.x), slot = 0;
  table.write(tile, 0);
  barrier();
  list.locate(table, 0);
  list.fetch(0);
  copy_1x1(other, 0);
  commit_copies();
  list.store(other, 0);
  list.fetch(1);
  turn();
#pragma unroll 1
  for (; tile < args.cut.tiles; tile += stride, slot++) {
    bottleneck.start(table.listed(slot));
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const bool last = step == steps - 1;
      if (!last) copy_1x1(other, step + 1);
      else copy_3x3(other, 0);
      commit_copies();
#pragma unroll 1
      for (int part = 0; part < 2; part++)
        if (part == early) bottleneck.multiply(stage, stage + layout.list_bytes);
        else {
          if (!last) list.store(other, step + 1), list.fetch(step + 2);
          if (step == 0) table.clear(h, planes, tile), table.write(tile + stride, slot + 1);
        }
      if (last) bottleneck.store(h, planes, norm2, table, slot);
      turn();
    }
    float acc[C::R][C::J][4];
#pragma unroll
    for (int r = 0; r < C::R; r++)
#pragma unroll
      for (int j = 0; j < C::J; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[r][j][e] = 0;
#pragma unroll 1
    for (int plane = 0; plane < planes; plane++) {
      const bool last = plane == planes - 1;
      if (plane == 0) list.locate(table, slot + 1), list.fetch(0);
      if (!last) copy_3x3(other, plane + 1);
      else if (tile + stride < args.cut.tiles) copy_1x1(other, 0);
      commit_copies();
      const uint32_t halo = h + plane * C::PLANE_BYTES, weights = stage + place.half * C::K16 * C::SLAB_BYTES;
      if (rows.count == C::R) multiply_plane<T, C, C>(acc, halo, weights, fragments);
      else multiply_plane<T, C, typename C::Lower>(reinterpret_cast<float(&)[C::R - 1][C::J][4]>(acc), halo, weights, fragments);
      if (last) list.store(other, 0), list.fetch(1);
      turn();
    }
    epilogue.finish(acc, h, slot);
  }
}

// Weights as the steps take them, swizzled, zero where there are none. Inside `span` columns a thread's results are neighbours, as in
// pack_weights_kernel.
//   1x1 [steps][spans of 64][32][64],  3x3 [steps][2][9][16][columns]
struct DensePackArguments {
  Weight weight1, weight2;
  uint16_t *out1, *out2;
  int entering, bottleneck, growth, spans, columns, span;
  int64_t elements1, elements2;
};

template <class T> DEVICE uint16_t weight_element(const Weight& weight, bool on, int64_t at) {
  if (!on) return 0;
  if (weight.float32) return uint16_t(pack<T>(static_cast<const float*>(weight.data)[at], 0));
  return static_cast<const uint16_t*>(weight.data)[at];
}
DEVICE int column_channel(int position, int span) {
  const int within = position % span;
  return position - within + span / 4 * (within % 8 / 2) + within / 8 * 2 + (within & 1);
}
DEVICE int swizzled(int position, int columns, int row) {
  return int(unsigned(position / 8) ^ swizzle(columns / 8, row)) * 8 + position % 8;
}

template <class T> __global__ void __launch_bounds__(256) pack_dense_layer_kernel(const DensePackArguments args) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x, second = i - args.elements1;
  if (second < 0) {
    const int position = int(i % 64), k = int(i / 64 % 32), step = int(i / 2048 / args.spans);
    const int row = step * 32 + k, column = int(i / 2048 % args.spans) * 64 + column_channel(position, 32);
    args.out1[i - position + swizzled(position, 64, k)] =
        weight_element<T>(args.weight1, row < args.entering && column < args.bottleneck,
                          row * args.weight1.input_stride + column * args.weight1.output_stride);
  } else if (second < args.elements2) {
    const int n = args.columns, position = int(second % n), k = int(second / n % 16), tap = int(second / n / 16 % 9);
    const int row = int(second / n / 144) * 16 + k, column = column_channel(position, args.span);
    args.out2[second - position + swizzled(position, n, k)] =
        weight_element<T>(args.weight2, row < args.bottleneck && column < args.growth,
                          row * args.weight2.input_stride + column * args.weight2.output_stride + tap * args.weight2.tap_stride);
  }
}

}  // namespace csp::cuda
