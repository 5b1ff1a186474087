// Dgrad: dh = conv3x3^T(dY, weight), masked by the activation: dn; out = dn * scale, and the sums of dn and dn * (z - mean).
#pragma once
#include "conv3x3.cuh"

namespace csp::cuda {

struct DgradArguments {
  Map map;
  const uint16_t *features, *gradient, *weights, *z;  // weights: packed, taps in reverse, a block of columns after another
  uint16_t* out;
  int features_pitch, gradient_pitch, z_pitch, out_pitch, channels, outputs;  // outputs: of the slice, which is what enters here
  Correction correction;
  Dropout dropout;
  Norm norm;
  float* partials;  // [blocks][2][channels]
};

template <class T, class C> struct DgradEpilogue {
  static constexpr bool PREFETCHES = true;
  static_assert(C::J == 4 && C::HALVES == 1, "a thread owns eight channels, and all of their sum");
  const DgradArguments& args;
  Place<C> place;
  int channel;  // the first of eight
  bool exists;
  float mean[8], scale[8], shift[8], sum[8], sum_z[8];
  Results<C> results;
  uint4 z[C::R][2];

  DEVICE explicit DgradEpilogue(const DgradArguments& args) : args(args), sum{}, sum_z{} {
    channel = int(blockIdx.y) * C::COLUMNS + place.group * 32 + (place.lane & 3) * 8;
    exists = channel < args.channels;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      mean[i] = exists ? args.norm.mean[channel + i] : 0;
      scale[i] = exists ? args.norm.scale[channel + i] : 0;
      shift[i] = exists ? fmaf(-mean[i], scale[i], args.norm.shift[channel + i]) : 0;  // as forward's: the masks agree
    }
  }
  DEVICE int pixel(int r, int h) const { return results.pixel[h] + r * args.map.width; }
  DEVICE void prefetch(bool on, const typename C::Strips& strips, int slot) {
    results.locate(place, strips, slot, args.map);
#pragma unroll
    for (int h = 0; h < 2; h++) results.rows[h] = on && exists ? results.rows[h] : 0;
#pragma unroll
    for (int r = 0; r < C::R; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) load16(r < results.rows[h], z[r][h], args.z + (long long)pixel(r, h) * args.z_pitch + channel);
  }
  // One element: the masked gradient, added to the sums.
  DEVICE float element(bool on, float gradient, float z, int i) {
    const bool keep = on && !(fmaf(z, scale[i], shift[i]) <= 0);  // NaN passes its gradient
    const float dn = keep ? gradient : 0, centred = keep ? z - mean[i] : 0;
    sum[i] += dn;
    sum_z[i] = fmaf(dn, centred, sum_z[i]);
    return dn * scale[i];
  }
  DEVICE void finish(float (&acc)[C::R][4][4], uint32_t, int) {
#pragma unroll
    for (int r = 0; r < C::R; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool on = r < results.rows[h];
        uint32_t raw[4] = {z[r][h].x, z[r][h].y, z[r][h].z, z[r][h].w}, words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 v = unpack<T>(raw[j]);
          const float low = element(on, acc[r][j][2 * h], v.x, 2 * j);
          const float high = element(on, acc[r][j][2 * h + 1], v.y, 2 * j + 1);
          words[j] = pack<T>(low, high);
        }
        store_words(on, args.out + (long long)pixel(r, h) * args.out_pitch + channel, words);
      }
  }

  // Sums of the warp's eight lanes with the same channels, then of units.
  DEVICE void close(uint32_t shared) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2)
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += shuffle_xor(sum[i], lanes), sum_z[i] += shuffle_xor(sum_z[i], lanes);
    barrier();  // the last halo is read
    const uint32_t own = shared + place.warp * 256;
    if (place.lane < 4)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        store_shared4(own + (place.lane * 8 + i) * 4, sum[i]);
        store_shared4(own + 128 + (place.lane * 8 + i) * 4, sum_z[i]);
      }
    barrier();
    for (int i = int(threadIdx.x); i < 2 * C::COLUMNS; i += C::THREADS) {
      const int kind = i / C::COLUMNS, column = i % C::COLUMNS, at = int(blockIdx.y) * C::COLUMNS + column;
      float total = 0;
      for (int unit = 0; unit < C::UNITS; unit++)
        total += load_shared4<float>(shared + ((unit * C::GROUPS + column / 32) * 64 + kind * 32 + column % 32) * 4);
      if (at < args.channels) args.partials[((long long)blockIdx.x * 2 + kind) * args.channels + at] = total;
    }
  }
};

// Grid: tiles by turns, blocks of columns.
template <class T, class C> __global__ void __launch_bounds__(C::THREADS, 1) conv3x3_dgrad_kernel(const DgradArguments args) {
  const uint32_t shared = shared_base();
  const CoefficientTable table{shared + C::TABLE_AT, C::steps(args.outputs) * C::DEPTH};
  table.fill<true>(C::THREADS, args.outputs, args.correction.mean, args.correction.slope, args.correction.offset);
  SliceGradient<T, C::LOADS> prologue{args.features, args.gradient, args.features_pitch, args.gradient_pitch, table,
                                      DropoutMask(args.dropout), {}, {}, {}};
  DgradEpilogue<T, C> epilogue(args);
  const int slabs = C::slabs(args.outputs);
  const uint16_t* weights = args.weights + (long long)blockIdx.y * slabs * (C::SLAB_BYTES / 2);
  convolve<T, C>(args.map, args.outputs, weights, shared, prologue, epilogue);
  epilogue.close(shared);
}

}  // namespace csp::cuda
