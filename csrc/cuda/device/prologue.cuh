// What is applied to eight channels on their way to the tensor cores, once an element, and rounded once.
#pragma once
#include "../dense_block.h"

namespace csp::cuda {

struct Eight {
  float a[8], b[8];
};
// Two coefficients of each channel in shared memory. Chunks of four channels lie so that neighbouring threads' meet in no bank:
// [2][even or odd chunk][channels / 8][4].
struct CoefficientTable {
  uint32_t base;
  int channels;

  DEVICE uint32_t place(int which, int channel) const {
    return base + uint32_t((which * 2 + (channel >> 2 & 1)) * (channels / 2) + (channel >> 3) * 4 + (channel & 3)) * 4;
  }
  DEVICE Eight read(int channel) const {
    Eight e;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint4 a = load_shared16(place(0, channel + 4 * half)), b = load_shared16(place(1, channel + 4 * half));
      memcpy(e.a + 4 * half, &a, 16), memcpy(e.b + 4 * half, &b, 16);
    }
    return e;
  }
  // scale and shift - mean * scale: one multiply-add an element. What cancels is far below the rounding of 16-bit elements.
  template <bool MINUS> DEVICE void fill(int threads, int real, const float* mean, const float* scale, const float* shift) const {
    for (int i = int(threadIdx.x); i < channels; i += threads) {
      bool on = i < real;
      float s = on ? scale[i] : 0, t = on ? fmaf(-mean[i], s, shift[i]) : 0;
      store_shared4(place(0, i), MINUS ? -s : s);
      store_shared4(place(1, i), MINUS ? -t : t);
    }
  }
};

// relu(x * a + b)
template <class T> DEVICE uint4 activate(uint4 x, const Eight& e) {
  uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 v = unpack<T>(words[i]);
    words[i] = pack_relu<T>(fmaf(v.x, e.a[2 * i], e.b[2 * i]), fmaf(v.y, e.a[2 * i + 1], e.b[2 * i + 1]));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The mask of csrc/cpu/tile/conv3x3.h: a hash of seed, layer, pixel and channel.
struct DropoutMask {
  bool active;
  uint32_t key, threshold;
  float scale;

  DEVICE explicit DropoutMask(const Dropout& d) : active(d.seed != nullptr), key(0), threshold(d.threshold), scale(d.scale) {
    if (!active) return;
    uint64_t seed = uint64_t(*d.seed);
    key = uint32_t(seed ^ seed >> 32) * 0x9e3779b9u + d.layer * 0x85ebca6bu;
  }
  DEVICE float apply(float x, int pixel, int channel) const {
    uint64_t index = uint64_t(uint32_t(pixel)) * 4096 + uint32_t(channel);
    uint32_t h = uint32_t(index) ^ uint32_t(index >> 32) * 0x27d4eb2fu ^ key;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    h ^= h >> 16;
    return h >= threshold ? x * scale : 0.f;
  }
};

// dropout(g + f * a + b), a and b being the negated slope and offset. NaN in f is seen where a is 0, too: a select costs spills here.
template <class T> DEVICE uint4 correct(uint4 gradient, uint4 feature, const Eight& e, const DropoutMask& mask, int pixel, int channel) {
  uint32_t g[4] = {gradient.x, gradient.y, gradient.z, gradient.w}, f[4] = {feature.x, feature.y, feature.z, feature.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 u = unpack<T>(g[i]), v = unpack<T>(f[i]);
    float low = fmaf(v.x, e.a[2 * i], u.x + e.b[2 * i]), high = fmaf(v.y, e.a[2 * i + 1], u.y + e.b[2 * i + 1]);
    if (mask.active) low = mask.apply(low, pixel, channel + 2 * i), high = mask.apply(high, pixel, channel + 2 * i + 1);
    g[i] = pack<T>(low, high);
  }
  return make_uint4(g[0], g[1], g[2], g[3]);
}

// Prologues of a staged halo: fetch raw chunks into registers, later turn them into values. LOADS: chunks of a thread.
template <class T, int LOADS> struct Activation {
  const uint16_t* z;
  int pitch;
  CoefficientTable table;
  uint4 raw[LOADS];
  Eight e;

  DEVICE void fetch(int i, bool on, int pixel, int channel) { load16(on, raw[i], z + (long long)pixel * pitch + channel); }
  DEVICE void coefficients(int channel) { e = table.read(channel); }
  DEVICE uint4 value(int i, int, int) const { return activate<T>(raw[i], e); }
};

template <class T, int LOADS> struct SliceGradient {
  const uint16_t *features, *gradient;
  int features_pitch, gradient_pitch;
  CoefficientTable table;
  DropoutMask mask;
  uint4 g[LOADS], f[LOADS];
  Eight e;

  DEVICE void fetch(int i, bool on, int pixel, int channel) {
    load16(on, g[i], gradient + (long long)pixel * gradient_pitch + channel);
    load16(on, f[i], features + (long long)pixel * features_pitch + channel);
  }
  DEVICE void coefficients(int channel) { e = table.read(channel); }
  DEVICE uint4 value(int i, int pixel, int channel) const { return correct<T>(g[i], f[i], e, mask, pixel, channel); }
};

}  // namespace csp::cuda
