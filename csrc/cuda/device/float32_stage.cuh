// How float32 pixels come into shared memory: copied as they are, then turned into what is multiplied, in place, each thread what it
// copied itself. Nothing waits in registers, and no barrier stands between copying and turning.
#pragma once
#include "prologue.cuh"
#include "tile.cuh"

namespace csp::cuda::float32 {

// Three coefficients of each of four channels. The norm is not folded: float32 would show what cancels.
struct Quad {
  float mean[4], scale[4], shift[4];
  DEVICE float affine(float x, int i) const { return fmaf(x - mean[i], scale[i], shift[i]); }
};
// [3][channels] in shared memory, zero where there are none.
struct QuadTable {
  uint32_t base;
  int channels;

  HOST_DEVICE static constexpr int bytes(int channels) { return channels * 12; }
  DEVICE void fill(int threads, int real, const float* mean, const float* scale, const float* shift) const {
    for (int i = int(threadIdx.x); i < 3 * channels; i += threads) {
      const int which = i / channels, channel = i % channels;
      const float* from = which == 0 ? mean : which == 1 ? scale : shift;
      store_shared4(base + uint32_t(i * 4), channel < real ? from[channel] : 0.f);
    }
  }
  DEVICE Quad read(int channel) const {
    Quad q;
    const uint32_t at = base + uint32_t(channel * 4);
    uint4 mean = load_shared16(at), scale = load_shared16(at + channels * 4), shift = load_shared16(at + channels * 8);
    memcpy(q.mean, &mean, 16), memcpy(q.scale, &scale, 16), memcpy(q.shift, &shift, 16);
    return q;
  }
};

// Strips with BORDER pixels around them, CHUNKS times four channels of each. SWIZZLED: eight columns' chunks c meet in no bank.
template <int STRIPS_, int ROWS_, int BORDER_, int CHUNKS_, int PIXEL_BYTES_, bool SWIZZLED_, int THREADS_> struct Patch {
  static constexpr int STRIPS = STRIPS_, ROWS = ROWS_, BORDER = BORDER_, CHUNKS = CHUNKS_, PIXEL_BYTES = PIXEL_BYTES_;
  static constexpr int ACROSS = STRIP + 2 * BORDER, DOWN = ROWS + 2 * BORDER, PIXELS = STRIPS * DOWN * ACROSS;
  static constexpr int ROW_BYTES = ACROSS * PIXEL_BYTES, STRIP_BYTES = DOWN * ROW_BYTES;
  static constexpr int SPARE = PIXELS * PIXEL_BYTES, BYTES = SPARE + 16;  // SPARE: for threads that have nothing to turn
  static constexpr int STEP = THREADS_ / CHUNKS, LOADS = (PIXELS + STEP - 1) / STEP;  // every STEP-th pixel a thread
  static constexpr bool SWIZZLED = SWIZZLED_, EVEN = STEP * CHUNKS == THREADS_;  // EVEN: no thread has nothing
  DEVICE static constexpr bool whole(int i) { return EVEN && (i + 1) * STEP <= PIXELS; }  // every thread has an i-th pixel

  DEVICE static uint32_t place(int pixel, int chunk) {
    const uint32_t at = SWIZZLED ? uint32_t(chunk) ^ swizzle(CHUNKS, pixel % ACROSS) : uint32_t(chunk);
    return uint32_t(pixel * PIXEL_BYTES) + (at << 4);
  }
};

// This thread's share of a patch.
template <class P> struct Share {
  int chunk, first;
  int pixel[P::LOADS];        // -1: outside the image
  uint32_t places[P::LOADS];  // in the patch

  DEVICE Share() : chunk(int(threadIdx.x) % P::CHUNKS), first(int(threadIdx.x) / P::CHUNKS) {
#pragma unroll
    for (int i = 0; i < P::LOADS; i++) {
      const uint32_t at = P::place(i * P::STEP + first, chunk);
      places[i] = uint32_t(opaque(exists(i) ? int(at) : P::SPARE));
    }
  }
  DEVICE uint32_t place(int i) const {  // in fewer registers where it can be
    return !P::SWIZZLED && P::whole(i) ? places[0] + uint32_t(i * P::STEP * P::PIXEL_BYTES) : places[i];
  }
  DEVICE bool exists(int i) const { return (P::EVEN || first < P::STEP) && i * P::STEP + first < P::PIXELS; }

  template <class Strips> DEVICE void locate(const Strips& strips, int slot, const Map& map) {
    const int f = opaque(first);
#pragma unroll
    for (int i = 0; i < P::LOADS; i++) {
      unsigned q = unsigned(i * P::STEP + f);
      if (q >= P::PIXELS) q = P::PIXELS - 1;
      const unsigned strip = q / (P::DOWN * P::ACROSS), row = q / P::ACROSS % P::DOWN, column = q % P::ACROSS;
      const Strip s = strips.read(slot, int(strip));
      const int dy = int(row) - P::BORDER, dx = int(column) - P::BORDER;
      const bool inside = unsigned(s.y + dy) < unsigned(map.height) && unsigned(s.x + dx) < unsigned(map.width);
      pixel[i] = inside && exists(i) ? s.pixel + dy * map.width + dx : -1;
    }
  }
  // Channels from a multiple of four on, of which the first `real` of all exist.
  template <class Source> DEVICE void copy(const Source& source, uint32_t patch, int channel, int real) const {
    channel += chunk * 4;
#pragma unroll
    for (int i = 0; i < P::LOADS; i++) source.copy(pixel[i] >= 0 && channel < real, patch, place(i), pixel[i], channel);
  }
  template <class Source> DEVICE void turn(const Source& source, uint32_t patch, int channel, int real) const {
    channel += chunk * 4;
    const Quad quad = source.table.read(channel - source.first);
#pragma unroll
    for (int i = 0; i < P::LOADS; i++) {
      float x[4];
      source.values(x, patch, place(i), quad, pixel[i], channel);
      uint4 bits;
      memcpy(&bits, x, 16);
      const bool nonzero = pixel[i] >= 0 && channel < real;
      if (P::whole(i)) store_shared16_or_zero(nonzero, patch + place(i), bits);
      else store_shared16(exists(i), patch + place(i), nonzero ? bits : make_uint4(0, 0, 0, 0));
    }
  }
};

// Sources of a patch. first: the channel that the table begins with. Round: of what is multiplied.
template <class Round> struct Activation {
  const float* z;
  int pitch, first;
  QuadTable table;

  DEVICE void copy(bool on, uint32_t patch, uint32_t place, int pixel, int channel) const {
    copy16(on, patch + place, z + (long long)pixel * pitch + channel);
  }
  DEVICE void values(float (&x)[4], uint32_t patch, uint32_t place, const Quad& quad, int, int) const {
    uint4 raw = load_shared16(patch + place);
    memcpy(x, &raw, 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float n = quad.affine(x[i], i);
      x[i] = Round::round(n < 0 ? 0 : n);  // keeps NaN
    }
  }
};

// dropout(g - ((f - mean) * slope + offset)); features in a patch of their own.
template <class Round> struct SliceGradient {
  const float *features, *gradient;
  int features_pitch, gradient_pitch, first;
  QuadTable table;
  DropoutMask mask;
  uint32_t features_patch;

  DEVICE void copy(bool on, uint32_t patch, uint32_t place, int pixel, int channel) const {
    copy16(on, patch + place, gradient + (long long)pixel * gradient_pitch + channel);
    copy16(on, features_patch + place, features + (long long)pixel * features_pitch + channel);
  }
  DEVICE void values(float (&x)[4], uint32_t patch, uint32_t place, const Quad& quad, int pixel, int channel) const {
    uint4 raw = load_shared16(patch + place), other = load_shared16(features_patch + place);
    float f[4];
    memcpy(x, &raw, 16), memcpy(f, &other, 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float dy = x[i] - (quad.scale[i] == 0 ? quad.shift[i] : quad.affine(f[i], i));  // NaN in f is not seen then
      if (mask.active) dy = mask.apply(dy, pixel, channel + i);
      x[i] = Round::round(dy);
    }
  }
};

// N floats in a row from shared memory; the address a multiple of their size, up to 16 bytes.
template <int N> DEVICE void load_floats(float (&to)[N], uint32_t address) {
  constexpr int WORDS = N % 4 == 0 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < N; i += WORDS) {
    if constexpr (WORDS == 4) {
      uint4 v = load_shared16(address + i * 4);
      memcpy(to + i, &v, 16);
    } else {
      uint32_t v[2];
      load_shared_words(v, address + i * 4);
      memcpy(to + i, v, 8);
    }
  }
}

}  // namespace csp::cuda::float32
