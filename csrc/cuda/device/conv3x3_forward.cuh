// Forward: out = dropout(conv3x3(relu(norm(z)))) and its statistics. Small maps: the channels may be split over blockIdx.z, then the
// sums of each split go to memory, and add_splits does the rest.
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
  float* sums;      // [splits][pixels][outputs], or null: not split
  int split_channels, pixels;
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

// Moments of threads (each WIDTH channels, the same for lanes 4 apart), of lanes, of warps: a block's partials, where `to` points.
template <int COLUMNS, int WARPS, int WIDTH>
DEVICE void write_moments(Moments<WIDTH> m, uint32_t shared, float* to, int outputs, int real) {
  constexpr int STRIDE = 4 * (2 * COLUMNS + 1);
  const int lane = int(threadIdx.x) & 31, channel = int(threadIdx.x);
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) m.merge(m.shuffled(lanes));
  const uint32_t own = shared + (threadIdx.x >> 5) * STRIDE;
  if (lane < 4) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      store_shared4(own + (lane * WIDTH + i) * 4, m.mean[i]);
      store_shared4(own + (COLUMNS + lane * WIDTH + i) * 4, m.m2[i]);
    }
    if (lane == 0) store_shared4(own + 8 * COLUMNS, m.count);
  }
  barrier();
  if (channel >= real) return;
  Moments<1> all{};
  for (int warp = 0; warp < WARPS; warp++) {
    const uint32_t from = shared + warp * STRIDE;
    const float mean = load_shared4<float>(from + channel * 4), m2 = load_shared4<float>(from + (COLUMNS + channel) * 4);
    all.merge({load_shared4<float>(from + 8 * COLUMNS), {mean}, {m2}});
  }
  to[channel] = all.mean[0], to[outputs + channel] = all.m2[0], to[2 * outputs + channel] = all.count;
}

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

  // A pixel's sums of this split as they are.
  DEVICE void write_sums(const float (&acc)[J][4], int h, bool on, int pixel) const {
    constexpr int WORDS = J % 2 ? 2 : 4;
    float* to = args.sums + ((long long)blockIdx.z * args.pixels + pixel) * args.outputs + first_channel;
#pragma unroll
    for (int i = 0; i < WIDTH; i += WORDS) {
      uint32_t words[WORDS];
#pragma unroll
      for (int k = 0; k < WORDS; k++) memcpy(words + k, &acc[(i + k) / 2][2 * h + (i + k) % 2], 4);
      store_words(on, to + i, words);
    }
  }
  template <int FROM, int TO> DEVICE void write(const float (&acc)[C::R][J][4], const Results<C>& results) {
#pragma unroll
    for (int r = FROM; r < TO; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool on = r < results.rows[h];
        const int pixel = results.pixel[h] + r * args.map.width;
        if (C::SPLITS && args.sums) {
          write_sums(acc[r], h, on, pixel);
          continue;
        }
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
    if constexpr (C::HALVES > 2) return gather(acc, free, slot);
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

  // More than two parts: the first adds the others' sums to its own, in their order.
  DEVICE void gather(float (&acc)[C::R][J][4], uint32_t free, int slot) {
    constexpr int BYTES = C::R * J * 512;
    const uint32_t first = free + place.unit * (C::HALVES - 1) * BYTES + place.lane * 16;
    if (place.half) give<0, C::R>(acc, first + (place.half - 1) * BYTES);
    barrier();
    Results<C> results;
    results.locate(place, strips, slot, args.map);
    if (!place.half) {
#pragma unroll
      for (int part = 0; part < C::HALVES - 1; part++) take<0, C::R>(acc, first + part * BYTES);
      write<0, C::R>(acc, results);
    }
    barrier();  // the exchange is over before the next halo is stored there
  }

  DEVICE void close(uint32_t shared) {
    if (!args.partials) return;
    float* to = args.partials + (long long)blockIdx.x * 3 * args.outputs + blockIdx.y * C::COLUMNS;
    write_moments<C::COLUMNS, C::WARPS>(running.moments(), shared, to, args.outputs, C::COLUMNS);
  }
};

// Grid: tiles by turns, blocks of columns, splits of the channels.
template <class T, class C> __global__ void __launch_bounds__(C::THREADS, 1) conv3x3_forward_kernel(const ForwardArguments args) {
  const uint32_t shared = shared_base();
  const int first = C::SPLITS ? int(blockIdx.z) * args.split_channels : 0;
  const int rest = args.channels - first, channels = C::SPLITS && args.split_channels < rest ? args.split_channels : rest;
  const CoefficientTable table{shared + C::TABLE_AT, C::steps(channels) * C::DEPTH};
  table.fill<false>(C::THREADS, channels, args.norm.mean + first, args.norm.scale + first, args.norm.shift + first);
  Activation<T, C::LOADS> prologue;
  prologue.z = args.z + first, prologue.pitch = args.z_pitch, prologue.table = table;
  ForwardEpilogue<T, C> epilogue(args, shared);
  const long long slab = (long long)blockIdx.y * C::slabs(args.channels) + first / 16;
  convolve<T, C>(args.map, channels, args.weights + slab * (C::SLAB_BYTES / 2), shared, prologue, epilogue);
  epilogue.close(shared);
}

struct SplitArguments {
  const float* sums;  // [splits][pixels][outputs]
  int splits, pixels, outputs;
  uint16_t* out;
  int out_pitch;
  Dropout dropout;
  float* partials;  // as forward's
};

// A block: 64 pixels at a time by 32 channels, eight a thread.
struct SplitSum {
  static constexpr int THREADS = 256, WARPS = 8, COLUMNS = 32, PIXELS = 64, MOST = 8;
  static constexpr int SHARED_BYTES = WARPS * 4 * (2 * COLUMNS + 1);
};

// sum [8] = all splits in their order.
DEVICE void add_in_order(float (&sum)[8], const SplitArguments& args, bool on, int pixel, int channel) {
  const long long stride = (long long)args.pixels * args.outputs;
  const float* from = args.sums + (long long)pixel * args.outputs + channel;
  uint4 raw[SplitSum::MOST][2];
#pragma unroll
  for (int s = 0; s < SplitSum::MOST; s++)
#pragma unroll
    for (int half = 0; half < 2; half++) load16(on && s < args.splits, raw[s][half], from + s * stride + half * 4);
#pragma unroll
  for (int s = 0; s < SplitSum::MOST; s++) {
    if (s >= args.splits) continue;
    float f[8];
    memcpy(f, raw[s], 32);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += f[i];
  }
}

// What forward's epilogue does, of sums that were split. Grid: pixels by turns, blocks of columns.
template <class T> __global__ void __launch_bounds__(SplitSum::THREADS) add_splits_kernel(const SplitArguments args) {
  const int column = int(blockIdx.y) * SplitSum::COLUMNS, channel = column + (int(threadIdx.x) & 3) * 8;
  const int real = args.outputs - column < SplitSum::COLUMNS ? args.outputs - column : SplitSum::COLUMNS;
  const DropoutMask mask(args.dropout);
  RunningMoments<T, 4> running;
  bool started = false;
  for (int first = int(blockIdx.x) * SplitSum::PIXELS; first < args.pixels; first += int(gridDim.x) * SplitSum::PIXELS) {
    const int pixel = first + (int(threadIdx.x) >> 2);
    const bool on = pixel < args.pixels && channel < args.outputs;
    float sum[8] = {};
    add_in_order(sum, args, on, pixel, channel);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (mask.active) {
        sum[2 * j] = mask.apply(sum[2 * j], pixel, channel + 2 * j);
        sum[2 * j + 1] = mask.apply(sum[2 * j + 1], pixel, channel + 2 * j + 1);
      }
      words[j] = pack<T>(sum[2 * j], sum[2 * j + 1]);
    }
    store_words(on, args.out + (long long)pixel * args.out_pitch + channel, words);
    if (on && !started) running.start(words), started = true;
    running.add(on, words);
  }
  if (!args.partials) return;
  float* to = args.partials + (long long)blockIdx.x * 3 * args.outputs + column;
  write_moments<SplitSum::COLUMNS, SplitSum::WARPS>(running.moments(), shared_base(), to, args.outputs, real);
}

}  // namespace csp::cuda
