// Forward: out = dropout(conv3x3(relu(norm(z)))) and its statistics.
#pragma once
#include "conv3x3.cuh"

namespace csp::cuda {

struct ForwardArguments {
  Map map;
  const uint16_t *z, *weights;  // weights: packed, a block of columns after another
  uint16_t* out;
  int z_pitch, out_pitch, channels, outputs;
  Norm norm;
  Dropout dropout;
  float* partials;  // [blocks][3][outputs]: mean, M2, count; null: not wanted
};

// Count, mean and sum of squared deviations, of `N` channels with one count.
template <int N> struct Moments {
  float count, mean[N], m2[N];

  // Chan's formula.
  DEVICE void merge(const Moments& other) {
    float sum = count + other.count, inverse = sum > 0 ? 1 / sum : 0, share = other.count * inverse, cross = count * share;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float d = other.mean[i] - mean[i];
      mean[i] += d * share;
      m2[i] += other.m2[i] + d * d * cross;
    }
    count = sum;
  }
  DEVICE Moments shuffled(int lanes) const {
    Moments m;
    m.count = shuffle_xor(count, lanes);
#pragma unroll
    for (int i = 0; i < N; i++) m.mean[i] = shuffle_xor(mean[i], lanes), m.m2[i] = shuffle_xor(m2[i], lanes);
    return m;
  }
};

// Sums of one thread's values over the whole kernel, relative to the first value.
template <class T, int J> struct RunningMoments {
  uint32_t shift[J];
  float sum[2 * J], squares[2 * J];
  int count;

  DEVICE RunningMoments() : shift{}, sum{}, squares{}, count(0) {}
  DEVICE void start(const uint32_t (&words)[J]) {
#pragma unroll
    for (int j = 0; j < J; j++) shift[j] = words[j];
  }
  DEVICE void add(bool on, const uint32_t (&words)[J]) {
    count += on;
#pragma unroll
    for (int j = 0; j < J; j++) {
      float2 x = unpack<T>(on ? words[j] : shift[j]), first = unpack<T>(shift[j]);
      float low = x.x - first.x, high = x.y - first.y;
      sum[2 * j] += low, sum[2 * j + 1] += high;
      squares[2 * j] = fmaf(low, low, squares[2 * j]), squares[2 * j + 1] = fmaf(high, high, squares[2 * j + 1]);
    }
  }
  DEVICE Moments<2 * J> moments() const {
    Moments<2 * J> m;
    m.count = float(count);
    const float inverse = count ? 1 / m.count : 0;
#pragma unroll
    for (int i = 0; i < 2 * J; i++) {
      float2 first = unpack<T>(shift[i / 2]);
      m.mean[i] = count ? (i & 1 ? first.y : first.x) + sum[i] * inverse : 0;
      m.m2[i] = count ? squares[i] - sum[i] * sum[i] * inverse : 0;
    }
    return m;
  }
};

template <class T, class C> struct ForwardEpilogue {
  static constexpr bool PREFETCHES = false;
  static constexpr int J = C::J, WIDTH = 2 * J, MIDDLE = (C::R + 1) / 2;  // channels a thread; rows of the first half of the channels
  const ForwardArguments& args;
  Place<C> place;
  const typename C::Strips strips;
  int first_channel;
  DropoutMask mask;
  RunningMoments<T, J> running;
  bool started = false;

  DEVICE ForwardEpilogue(const ForwardArguments& args, uint32_t shared)
      : args(args), strips{shared + C::STRIPS_AT}, mask(args.dropout) {
    first_channel = int(blockIdx.y) * C::COLUMNS + (place.lane & 3) * WIDTH;
  }
  DEVICE void prefetch(bool, const typename C::Strips&, int) {}

  // Each half of the channels hands the other the rows that the other finishes.
  template <int FROM, int TO> DEVICE void give(const float (&acc)[C::R][J][4], uint32_t exchange) const {
#pragma unroll
    for (int r = FROM; r < TO; r++)
#pragma unroll
      for (int j = 0; j < J; j++) {
        uint4 v;
        memcpy(&v, acc[r][j], 16);
        store_shared16(true, exchange + (r * J + j) * 512, v);
      }
  }
  template <int FROM, int TO> DEVICE void take(float (&acc)[C::R][J][4], uint32_t exchange) const {
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
  template <int FROM, int TO> DEVICE void write(const float (&acc)[C::R][J][4], const Results<C>& results) {
#pragma unroll
    for (int r = FROM; r < TO; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool on = r < results.rows[h];
        const int pixel = results.pixel[h] + r * args.map.width;
        uint32_t words[J];
#pragma unroll
        for (int j = 0; j < J; j++) {
          float low = acc[r][j][2 * h], high = acc[r][j][2 * h + 1];
          if (mask.active) {
            low = mask.apply(low, pixel, first_channel + 2 * j);
            high = mask.apply(high, pixel, first_channel + 2 * j + 1);
          }
          words[j] = pack<T>(low, high);
        }
        store_words(on, args.out + (long long)pixel * args.out_pitch + first_channel, words);
        if (args.partials) {
          if (r == FROM && h == 0 && !started) running.start(words), started = true;
          running.add(on, words);
        }
      }
  }
  DEVICE void finish(float (&acc)[C::R][J][4], uint32_t free, int slot) {
    const uint32_t exchange = free + place.unit * C::R * J * 512 + place.lane * 16;
    if (place.half == 0) give<MIDDLE, C::R>(acc, exchange);
    else give<0, MIDDLE>(acc, exchange);
    barrier();
    Results<C> results;
    results.locate(place, strips, slot, args.map);
    if (place.half == 0) take<0, MIDDLE>(acc, exchange), write<0, MIDDLE>(acc, results);
    else take<MIDDLE, C::R>(acc, exchange), write<MIDDLE, C::R>(acc, results);
    barrier();  // the exchange is over before the next halo is stored there
  }

  // Moments of threads, of the warp's eight lanes with the same channels, of warps.
  DEVICE void close(uint32_t shared) {
    if (!args.partials) return;
    Moments<WIDTH> m = running.moments();
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) m.merge(m.shuffled(lanes));
    constexpr int STRIDE = 4 * (2 * C::COLUMNS + 1);
    const uint32_t own = shared + place.warp * STRIDE;
    if (place.lane < 4) {
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        store_shared4(own + (place.lane * WIDTH + i) * 4, m.mean[i]);
        store_shared4(own + (C::COLUMNS + place.lane * WIDTH + i) * 4, m.m2[i]);
      }
      if (place.lane == 0) store_shared4(own + 8 * C::COLUMNS, m.count);
    }
    barrier();
    const int channel = int(threadIdx.x);
    if (channel >= C::COLUMNS) return;
    Moments<1> all{};
    for (int warp = 0; warp < C::WARPS; warp++) {
      const uint32_t from = shared + warp * STRIDE;
      const float mean = load_shared4<float>(from + channel * 4), m2 = load_shared4<float>(from + (C::COLUMNS + channel) * 4);
      all.merge({load_shared4<float>(from + 8 * C::COLUMNS), {mean}, {m2}});
    }
    float* to = args.partials + (long long)blockIdx.x * 3 * args.outputs + blockIdx.y * C::COLUMNS + channel;
    to[0] = all.mean[0], to[args.outputs] = all.m2[0], to[2 * args.outputs] = all.count;
  }
};

// Grid: tiles by turns, blocks of columns.
template <class T, class C> __global__ void __launch_bounds__(C::THREADS, 1) conv3x3_forward_kernel(const ForwardArguments args) {
  const uint32_t shared = shared_base();
  const CoefficientTable table{shared + C::TABLE_AT, C::steps(args.channels) * C::DEPTH};
  table.fill<false>(C::THREADS, args.channels, args.norm.mean, args.norm.scale, args.norm.shift);
  Activation<T, C::LOADS> prologue;
  prologue.z = args.z, prologue.pitch = args.z_pitch, prologue.table = table;
  ForwardEpilogue<T, C> epilogue(args, shared);
  const int slabs = C::slabs(args.channels);
  const uint16_t* weights = args.weights + (long long)blockIdx.y * slabs * (C::SLAB_BYTES / 2);
  convolve<T, C>(args.map, args.channels, weights, shared, prologue, epilogue);
  epilogue.close(shared);
}

}  // namespace csp::cuda
