// Dgrad in float32: dh = conv3x3^T(dY, weight), masked by the activation: dn; out = dn * scale, and the sums of dn and dn * (z - mean).
#pragma once
#include "float32_conv3x3.cuh"

namespace csp::cuda::float32 {

struct DgradArguments {
  Map map;
  const float *features, *gradient, *weights, *z;  // weights: packed, taps in reverse, a block of columns after another
  float* out;
  int features_pitch, gradient_pitch, z_pitch, out_pitch, channels, outputs;  // outputs: of the slice, which is what enters here
  Correction correction;
  Dropout dropout;
  Norm norm;
  float* partials;  // [blocks][2][channels]
};

template <class C> struct DgradEpilogue {
  static constexpr int WIDTH = C::WIDTH;
  static_assert(C::J == 4, "a thread loads its eight channels of z by 16 bytes");
  const DgradArguments& args;
  Place<C> place;
  int channel;  // the first of eight
  QuadTable table;  // of the block's columns
  float sum[WIDTH], sum_z[WIDTH];

  DEVICE DgradEpilogue(const DgradArguments& args, uint32_t table_at) : args(args), table{table_at, C::COLUMNS}, sum{}, sum_z{} {
    const Norm& n = args.norm;
    const int first = int(blockIdx.y) * C::COLUMNS;
    table.fill(C::THREADS, args.channels - first, n.mean + first, n.scale + first, n.shift + first);
    channel = first + column();
  }
  DEVICE int column() const { return place.group * 8 * C::J + (place.lane & 3) * WIDTH; }
  // The masked gradient, added to the sums. The mask is forward's, bit for bit.
  DEVICE float element(bool on, float gradient, float z, const Quad& norm, int half, int i) {
    const bool keep = on && !(norm.affine(z, i) <= 0);  // NaN passes its gradient
    const float dn = keep ? gradient : 0, centred = on ? z - norm.mean[i] : 0;
    sum[4 * half + i] += dn;
    sum_z[4 * half + i] = fmaf(dn, centred, sum_z[4 * half + i]);
    return dn * norm.scale[i];
  }
  DEVICE void finish(float (&acc)[C::R][C::J][4], const typename C::Strips& strips, int slot) {
    Results<C> results;
    results.locate(place, strips, slot, args.map);
#pragma unroll 1
    for (int h = 0; h < 2; h++) {  // one strip's results after the other's, in the same registers
      const int rows = h ? results.rows[1] : results.rows[0];
      const long long pixel = h ? results.pixel[1] : results.pixel[0];
      uint4 z[C::R][2];
#pragma unroll
      for (int r = 0; r < C::R; r++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          load16(r < rows && channel + 4 * half < args.channels, z[r][half],
                 args.z + (pixel + r * args.map.width) * args.z_pitch + channel + 4 * half);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Quad norm = table.read(column() + 4 * half);
#pragma unroll
        for (int r = 0; r < C::R; r++) {
          float v[4];
          memcpy(v, &z[r][half], 16);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& x = acc[r][2 * half + i / 2][i % 2];
            x = element(r < rows, x, v[i], norm, half, i);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < C::R; r++) {
        float x[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) x[i] = acc[r][i / 2][i % 2], acc[r][i / 2][i % 2] = acc[r][i / 2][2 + i % 2];
        store_channels<C>(r < rows, args.out + (pixel + r * args.map.width) * args.out_pitch + channel, x, channel, args.channels);
      }
    }
  }

  // Sums of the warp's eight lanes with the same channels, then of units.
  DEVICE void close(uint32_t shared) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2)
#pragma unroll
      for (int i = 0; i < WIDTH; i++) sum[i] += shuffle_xor(sum[i], lanes), sum_z[i] += shuffle_xor(sum_z[i], lanes);
    constexpr int GROUP = 8 * C::J;
    const uint32_t own = shared + uint32_t(place.warp * 2 * GROUP * 4);
    if (place.lane < 4)
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        store_shared4(own + uint32_t((place.lane * WIDTH + i) * 4), sum[i]);
        store_shared4(own + uint32_t((GROUP + place.lane * WIDTH + i) * 4), sum_z[i]);
      }
    barrier();
    for (int i = int(threadIdx.x); i < 2 * C::COLUMNS; i += C::THREADS) {
      const int kind = i / C::COLUMNS, column = i % C::COLUMNS, at = int(blockIdx.y) * C::COLUMNS + column;
      float total = 0;
      for (int unit = 0; unit < C::UNITS; unit++)
        total += load_shared4<float>(
            shared + uint32_t((((unit * C::GROUPS + column / GROUP) * 2 + kind) * GROUP + column % GROUP) * 4));
      if (at < args.channels) args.partials[((long long)blockIdx.x * 2 + kind) * args.channels + at] = total;
    }
  }
};

// Grid: tiles by turns, blocks of columns.
template <class Type, class C> __global__ void __launch_bounds__(C::THREADS, 1) dgrad_float32_kernel(const DgradArguments args) {
  const uint32_t shared = shared_base();
  const int steps = C::steps(args.outputs);
  const SliceGradient<Type> source{args.features,
                                   args.gradient,
                                   args.features_pitch,
                                   args.gradient_pitch,
                                   0,
                                   {shared + C::TABLE_AT, steps * C::DEPTH},
                                   DropoutMask(args.dropout),
                                   shared + uint32_t(C::features_at(args.outputs))};
  source.table.fill(C::THREADS, args.outputs, args.correction.mean, args.correction.slope, args.correction.offset);
  DgradEpilogue<C> epilogue(args, shared + uint32_t(C::norm_at(args.outputs)));
  const float* weights = args.weights + (long long)blockIdx.y * steps * (C::SLAB_BYTES / 4);
  convolve_float32<Type, C>(args.map, args.outputs, weights, shared, source, epilogue);
  epilogue.close(shared);
}

}  // namespace csp::cuda::float32
