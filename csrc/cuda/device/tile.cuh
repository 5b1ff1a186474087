// How images are cut: strips 8 pixels wide and some rows high, in any image and any place; a block's tile is a few of them in a row.
// Strips need not touch, so small and ragged images waste little.
#pragma once
#include "ptx.cuh"

namespace csp::cuda {

inline constexpr int STRIP = 8;         // pixels across
inline constexpr int HALO = STRIP + 2;  // with one neighbour on either side

struct Map {
  int height, width, across, down;  // of an image: pixels, strips
  int strips, tiles;
};

// First pixel (of all images) and its place in the image; y far outside where there is no strip.
struct Strip {
  int pixel, y, x;
};
inline constexpr int OUTSIDE = -(1 << 29);

// Strips of a tile in shared memory, 16 bytes each; SLOTS tiles by turns.
template <int STRIPS, int ROWS, int SLOTS> struct StripTable {
  static constexpr int BYTES = SLOTS * STRIPS * 16;
  uint32_t base;

  DEVICE uint32_t place(int slot, int strip) const { return base + uint32_t((slot % SLOTS * STRIPS + strip) * 16); }
  DEVICE void write(const Map& map, int tile, int slot) const {
    int i = int(threadIdx.x), id = tile * STRIPS + i, row = id / map.across;
    bool exists = tile < map.tiles && id < map.strips;
    int x = id % map.across * STRIP, y = row % map.down * ROWS, image = row / map.down;
    int pixel = exists ? (image * map.height + y) * map.width + x : 0;
    store_shared16(i < STRIPS, place(slot, i), make_uint4(uint32_t(pixel), uint32_t(exists ? y : OUTSIDE), uint32_t(x), 0));
  }
  DEVICE Strip read(int slot, int strip) const {
    uint4 v = load_shared16(place(slot, strip));
    return {int(v.x), int(v.y), int(v.z)};
  }
};

// Rows of `chunks` times 16 bytes lie one after another; chunk c of row r is stored at c ^ swizzle(r), so that eight rows' chunks c
// meet in no bank.
DEVICE uint32_t swizzle(int chunks, int row) {
  return uint32_t(chunks % 8 == 0 ? row & 7 : chunks % 4 == 0 ? row >> 1 & 3 : chunks % 2 == 0 ? row >> 2 & 1 : 0);
}

// Fragments b of 16 rows by J times 8 columns; pair(address, p): where columns 16 p are.
template <int J> DEVICE void load_columns(uint32_t (&b)[J][2], uint32_t address, uint32_t (*pair)(uint32_t, int)) {
#pragma unroll
  for (int j = 0; j + 1 < J; j += 2) {
    uint32_t four[4];
    ldmatrix_transposed(four, pair(address, j / 2));
    b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
  }
  if constexpr (J % 2) ldmatrix_transposed(b[J - 1], pair(address, J / 2));
}

}  // namespace csp::cuda
