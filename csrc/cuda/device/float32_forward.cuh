// Forward in float32: out = dropout(conv3x3(relu(norm(z)))) and its statistics.
#pragma once
#include "conv3x3_forward.cuh"
#include "float32_conv3x3.cuh"

namespace csp::cuda::float32 {

struct ForwardArguments {
  Map map;
  const float *z, *weights;  // weights: packed, a block of columns after another
  float* out;
  int z_pitch, out_pitch, channels, outputs;
  Norm norm;
  Dropout dropout;
  float* partials;  // [blocks][3][outputs]: mean, M2, count; null: not wanted
};

// Sums of one thread's values over the whole kernel, relative to the first value.
template <int N> struct RunningSums {
  float shift[N], sum[N], squares[N];
  int count;

  DEVICE RunningSums() : shift{}, sum{}, squares{}, count(-1) {}
  DEVICE void add(bool on, const float (&x)[N]) {
    const bool first = count < 0;
    count = (first ? 0 : count) + on;
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (first) shift[i] = x[i];
      const float d = on ? x[i] - shift[i] : 0;
      sum[i] += d, squares[i] = fmaf(d, d, squares[i]);
    }
  }
  DEVICE Moments<N> moments() const {
    Moments<N> m;
    m.count = count > 0 ? float(count) : 0;
    const float inverse = count > 0 ? 1 / m.count : 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      m.mean[i] = count > 0 ? fmaf(sum[i], inverse, shift[i]) : 0;
      m.m2[i] = count > 0 ? fmaf(-sum[i] * inverse, sum[i], squares[i]) : 0;
    }
    return m;
  }
};

template <class C> struct ForwardEpilogue {
  static constexpr int WIDTH = C::WIDTH;
  const ForwardArguments& args;
  Place<C> place;
  int channel;  // the first of WIDTH
  DropoutMask mask;
  RunningSums<WIDTH> running;

  DEVICE explicit ForwardEpilogue(const ForwardArguments& args) : args(args), mask(args.dropout) {
    channel = int(blockIdx.y) * C::COLUMNS + place.group * 8 * C::J + (place.lane & 3) * WIDTH;
  }
  DEVICE void finish(const float (&acc)[C::R][C::J][4], const typename C::Strips& strips, int slot) {
    Results<C> results;
    results.locate(place, strips, slot, args.map);
#pragma unroll
    for (int r = 0; r < C::R; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool on = r < results.rows[h];
        const int pixel = results.pixel[h] + r * args.map.width;
        float x[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
          x[i] = acc[r][i / 2][2 * h + i % 2];
          if (mask.active) x[i] = mask.apply(x[i], pixel, channel + i);
        }
        store_channels<C>(on, args.out + (long long)pixel * args.out_pitch + channel, x, channel, args.outputs);
        if (args.partials) running.add(on, x);
      }
  }

  // Moments of threads, of the warp's eight lanes with the same channels, of units.
  DEVICE void close(uint32_t shared) {
    if (!args.partials) return;
    Moments<WIDTH> m = running.moments();
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) m.merge(m.shuffled(lanes));
    constexpr int GROUP = 8 * C::J, STRIDE = 4 * (2 * GROUP + 1);
    const uint32_t own = shared + uint32_t(place.warp * STRIDE);
    if (place.lane < 4) {
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        store_shared4(own + uint32_t((place.lane * WIDTH + i) * 4), m.mean[i]);
        store_shared4(own + uint32_t((GROUP + place.lane * WIDTH + i) * 4), m.m2[i]);
      }
      if (place.lane == 0) store_shared4(own + 8 * GROUP, m.count);
    }
    barrier();
    const int column = int(threadIdx.x), at = int(blockIdx.y) * C::COLUMNS + column;
    if (column >= C::COLUMNS || at >= args.outputs) return;
    Moments<1> all{};
    for (int unit = 0; unit < C::UNITS; unit++) {
      const uint32_t from = shared + uint32_t((unit * C::GROUPS + column / GROUP) * STRIDE), of = from + uint32_t(column % GROUP * 4);
      const float mean = load_shared4<float>(of), m2 = load_shared4<float>(of + GROUP * 4);
      all.merge({load_shared4<float>(from + 8 * GROUP), {mean}, {m2}});
    }
    float* to = args.partials + (long long)blockIdx.x * 3 * args.outputs + at;
    to[0] = all.mean[0], to[args.outputs] = all.m2[0], to[2 * args.outputs] = all.count;
  }
};

// Grid: tiles by turns, blocks of columns.
template <class Type, class C> __global__ void __launch_bounds__(C::THREADS, 1) forward_float32_kernel(const ForwardArguments args) {
  const uint32_t shared = shared_base();
  const int steps = C::steps(args.channels);
  const Activation<Type> source{args.z, args.z_pitch, 0, {shared + C::TABLE_AT, steps * C::DEPTH}};
  source.table.fill(C::THREADS, args.channels, args.norm.mean, args.norm.scale, args.norm.shift);
  ForwardEpilogue<C> epilogue(args);
  const float* weights = args.weights + (long long)blockIdx.y * steps * (C::SLAB_BYTES / 4);
  convolve_float32<Type, C>(args.map, args.channels, weights, shared, source, epilogue);
  epilogue.close(shared);
}

}  // namespace csp::cuda::float32
