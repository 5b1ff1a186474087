// A 1x1 convolution over inputs side by side that are never concatenated: each read in place, normalised and averaged on
// load if asked; forward, and both gradients in one pass over the inputs.
#pragma once
#include "activation.h"
#include "norm.h"
#include "pointwise.h"

namespace csp::CSP_ISA {

// The first pixel of a map behind one of a product's; where they are not the same, its row and column too.
struct Source { int64_t pixel, y, x; };
// Pixels of a map, or of its 2x2 averages, or h x w of them that lie `step` apart (h > 0).
struct Grid {
  int64_t N, H, W;
  bool pool;
  int64_t step = 1, h = 0, w = 0;
  int64_t rows() const { return h ? h : pool ? H / 2 : H; }
  int64_t columns() const { return h ? w : pool ? W / 2 : W; }
  int64_t pixels() const { return N * rows() * columns(); }
  Source source(int64_t p) const {
    if (!pool && !h) return {p, 0, 0};
    const int64_t r = rows(), c = columns(), apart = pool ? 2 : step, row = p / c, y = row % r * apart, x = (p - row * c) * apart;
    return {(row / r * H + y) * W + x, y, x};
  }
};

template <class S> struct Segment {
  using T = typename Types<S>::T;
  const S* x;
  int64_t pitch, channels;
  const Affine<T>* norm;  // null: read as it is; else through it and `act`
  S* g;                   // backward, null: not wanted; the gradient of x, times nothing or norm's scale
  int64_t g_pitch;
  int64_t column;         // its first row of the packed weights
  const S* g_in = nullptr;  // g = this + the gradient; null: it begins here
  int64_t g_in_pitch = 0;
  OnLoad<T> act = {};
  bool silu = false;      // in place of `act`
  bool tap = false;       // of a 3x3: read dy rows and dx columns away, zero beyond the map
  int64_t dy = 0, dx = 0;
  // Of a tap, whose grid has a step: the pixel that is read behind this one; -1: none.
  int64_t at(const Grid& grid, const Source& source) const {
    const int64_t y = source.y + dy, x = source.x + dx;
    return y >= 0 && y < grid.H && x >= 0 && x < grid.W ? source.pixel + dy * grid.W + dx : -1;
  }
};

// How a segment is read, and of which pixels; f(std::integral_constant<Load, ...>, std::integral_constant<Pixel, ...>).
enum class Load { Raw, Floor, Leaky, Silu };
enum class Pixel { One, Average, Tap };
template <class S, class F> CSP_INLINE void with_load(const Segment<S>& s, bool pool, F f) {
  auto with = [&](auto load) __attribute__((always_inline)) {
    if (s.tap) f(load, std::integral_constant<Pixel, Pixel::Tap>{});
    else if (pool) f(load, std::integral_constant<Pixel, Pixel::Average>{});
    else f(load, std::integral_constant<Pixel, Pixel::One>{});
  };
  if (!s.norm) with(std::integral_constant<Load, Load::Raw>{});
  else if (s.silu) with(std::integral_constant<Load, Load::Silu>{});
  else if (s.act.leaky) with(std::integral_constant<Load, Load::Leaky>{});
  else with(std::integral_constant<Load, Load::Floor>{});
}

// Blocks of [MR][LANES], `step` units apart, from channels c0..c1 of one segment; source: first pixel behind each of m rows.
template <class U, Load LOAD, Pixel PIXEL, class S>
CSP_NOINLINE void pack_segment(const Segment<S>& s, const Source* source, const Grid& grid, int m, int64_t c0, int64_t c1, Unit<U>* A, int64_t step) {
  using T = Acc<U>;
  constexpr int MR = TILE_ROWS, L = LANES<T>, LAST = U::DEPTH - 1;
  const Vec<T> number = Vec<T>{} + s.act.number;
  for (int i = 0; i < m; i++) {
    constexpr bool POOL = PIXEL == Pixel::Average;
    const int64_t first = PIXEL == Pixel::Tap ? s.at(grid, source[i]) : source[i].pixel, W = grid.W;
    if (PIXEL == Pixel::Tap && first < 0) {
      for (int64_t c = c0; c < c1; c += L * U::DEPTH) store(A + (c - c0) / (L * U::DEPTH) * step + i * L, Vec<Unit<U>>{});
      continue;
    }
    const S* f = s.x + first * s.pitch;
    auto read = [&](int64_t c) __attribute__((always_inline)) {
      int64_t n = s.channels - c;
      auto at = [&](int64_t pixel) __attribute__((always_inline)) {
        Vec<T> x = load(f + pixel * s.pitch + c, n);
        if constexpr (LOAD == Load::Raw) return x;
        const Vec<T> pre = (x - load(s.norm->mean + c)) * load(s.norm->scale + c) + load(s.norm->shift + c);
        if constexpr (LOAD == Load::Silu) return Silu<T>{}.value(pre);
        else return on_load<LOAD == Load::Leaky, T>(pre, number);
      };
      if constexpr (POOL) return ((at(0) + at(1)) + (at(W) + at(W + 1))) * T(0.25);
      else return at(0);
    };
    Unit<U>* o = A + i * L;
    for (int64_t c = c0; c < c1; c += L * U::DEPTH, o += step) {
      __builtin_prefetch(f + (POOL ? 4 * MR : MR) * s.pitch + c);  // about where the next tile begins
      store(o, U::join(read(c), LAST ? read(c + LAST * L) : Vec<T>{}));
    }
  }
  for (int i = m; i < MR; i++)
    for (int64_t c = c0; c < c1; c += L * U::DEPTH) store(A + (c - c0) / (L * U::DEPTH) * step + i * L, Vec<Unit<U>>{});
}

// Channels of the output, cut into splits that each begin at a multiple of 16 columns.
struct Splits {
  const int64_t* sizes;
  int64_t count;
  int64_t width() const { return columns(sizes, count); }
  int64_t channels() const { int64_t n = 0; for (int64_t i = 0; i < count; i++) n += sizes[i]; return n; }
  template <class F> void each(F f) const {  // f(split, first channel, first column, size)
    for (int64_t i = 0, channel = 0, column = 0; i < count; channel += sizes[i], column += padded_channels(sizes[i]), i++) f(i, channel, column, sizes[i]);
  }
};

template <class S> struct Mix {
  using T = typename Types<S>::T;
  using U = typename Types<S>::Product;
  static constexpr int MR = TILE_ROWS, L = LANES<T>, D = U::DEPTH;
  static constexpr bool IN_MEMORY = false;  // the sums that are emitted: they are in registers
  const Parallel& parallel;
  Grid grid;
  Segment<S>* segments;
  int64_t count;
  Splits out;
  int64_t K = 0, Kp = 0, O = out.width(), P = grid.pixels();  // reduction: real, padded by segment; columns of the output
  int tasks;      // of backward, and of packing
  Shares shares;  // of forward

  Mix(const Parallel& parallel, const Grid& grid, Segment<S>* segments, int64_t count, Splits out)
      : parallel(parallel), grid(grid), segments(segments), count(count), out(out) {
    for (int64_t i = 0; i < count; i++) segments[i].column = Kp, K += segments[i].channels, Kp += round_up(segments[i].channels, L * D);
    const double flops = 2.0 * double(P) * double(K) * double(O);
    tasks = choose_pieces(parallel, ceil_div(P, MR), flops, double(O * Kp * int64_t(sizeof(T))), double(P * (Kp + O) * int64_t(sizeof(S))));
    shares = choose_shares(parallel, ceil_div(P, MR), panels<T>(O), 1, double(O) / double(P), flops);
  }

  // Weights [out][K] in padded form [O][Kp], each row times scale[column] (null: 1).
  const T* padded(Frame& frame, const T* w, const T* scale) const {
    if (!scale && K == Kp && O == out.channels()) return w;  // nothing to pad
    T* full = frame.zeroed<T>(O * Kp);
    out.each([&](int64_t, int64_t channel, int64_t column, int64_t size) {
      for (int64_t n = 0; n < size; n++) {
        const T* from = w + (channel + n) * K;
        T f = scale ? scale[column + n] : T(1);
        for (int64_t i = 0; i < count; from += segments[i].channels, i++)
          for (int64_t c = 0; c < segments[i].channels; c++) full[(column + n) * Kp + segments[i].column + c] = from[c] * f;
      }
    });
    return full;
  }
  int64_t units() const { return packed_size<U>(Kp, O); }
  template <bool TRANSPOSED> Unit<U>* packed(Frame& frame, const T* w) const {
    return pack<TRANSPOSED>(frame.take<Unit<U>>(TRANSPOSED ? packed_size<U>(O, Kp) : units()), w, nullptr);
  }
  template <bool TRANSPOSED> Unit<U>* pack(Unit<U>* to, const T* w, const T* scale) const {
    int64_t depth = TRANSPOSED ? O : Kp, channels = TRANSPOSED ? Kp : O, blocks = ceil_div(depth, depth_block<U>());
    Frame inner;
    const T* full = padded(inner, w, scale);
    for_tasks(parallel, int(min64(tasks, blocks)), [&](int task) {
      pack_product<U, !TRANSPOSED>(to, depth, channels, full, nullptr, share(blocks, task, int(min64(tasks, blocks))));
    });
    return to;
  }

  // Blocks of MR rows of what the product reads, `step` units apart.
  void pack(int64_t k0, int64_t k1, const Source* source, int m, Unit<U>* A, int64_t step = MR * L) const {
    for (int64_t i = 0; i < count; i++) {
      const Segment<S>& s = segments[i];
      int64_t end = s.column + round_up(s.channels, L * D), c0 = max64(k0, s.column), c1 = min64(k1, end);
      if (c0 >= c1) continue;
      Unit<U>* to = A + (c0 - k0) / (L * D) * step;
      c0 -= s.column, c1 -= s.column;
      with_load(s, grid.pool, [&](auto load, auto pixel) { pack_segment<U, decltype(load)::value, decltype(pixel)::value>(s, source, grid, m, c0, c1, to, step); });
    }
  }

  // Tiles multiplied together: large weights are read once for all of them.
  int64_t group() const { return min64(8, max64(1, O * Kp * int64_t(sizeof(T)) >> 17)); }

  // emit(part of the rows, pixel, m, column, acc): m pixels of one panel.
  template <class Emit> void forward(const Unit<U>* W, const Emit& emit) const {
    int64_t tiles = ceil_div(P, MR), blocks = Kp / (L * D), nt = group();
    int64_t chunks = ceil_div(blocks, FORWARD_CHUNK<U>), step = ceil_div(blocks, chunks), np = panels<T>(O);
    for_tasks(parallel, shares.tasks(), [&](int task) {
      Frame frame;
      TileRegisters<U> registers;
      Unit<U>* A = frame.take<Unit<U>>(nt * step * MR * L);
      T* C = frame.take<T>(nt * np * MR * 2 * L);
      Source* source = frame.take<Source>(nt * MR);
      const Range r = shares.rows_of(tiles, task), own = shares.panels_of(np, task);
      for (int64_t t = r.begin; t < r.end; t += nt) {
        int64_t n = min64(nt, r.end - t);
        for (int64_t i = 0; i < n * MR; i++) source[i] = grid.source(min64(t * MR + i, P - 1));
        for (int64_t k = 0; k < blocks; k += step) {
          int64_t kn = min64(step, blocks - k);
          for (int64_t q = 0; q < n; q++)
            pack(k * L * D, (k + kn) * L * D, source + q * MR, rows(t + q), A + q * step * MR * L);
          for (int64_t p = own.begin; p < own.end; p++)
            for (int64_t q = 0; q < n; q++) {
              const Unit<U>* B = W + p * blocks * L * 2 * L;
              T* Cq = C + (q * np + p) * MR * 2 * L;
              auto done = [&](const auto& acc) __attribute__((always_inline)) { emit(shares.row(task), (t + q) * MR, rows(t + q), p * 2 * L, acc); };
              if (panel_vectors<T>(O, p) == 2) pointwise_panel<U, 2>(A + q * step * MR * L, B + k * L * 2 * L, kn, Cq, k == 0, k + kn == blocks, done);
              else pointwise_panel<U, 1>(A + q * step * MR * L, B + k * L * L, kn, Cq, k == 0, k + kn == blocks, done);
            }
        }
      }
    });
  }
  int rows(int64_t tile) const { return int(min64(MR, P - tile * MR)); }

  int64_t first_pixel(int part) const { return min64(P, share(ceil_div(P, MR), part, shares.rows).begin * MR); }
};

// z[P][pitch] (channels of it written) = the product, and its statistics, both in columns.
template <class M, class W, class S>
void forward_raw(const M& product, const W* weight, S* z, int64_t pitch, int64_t channels, Statistics<typename M::T>* stats) {
  using T = typename M::T;
  constexpr int MR = M::MR, L = LANES<T>;
  for (int t = 0; stats && t < product.shares.rows; t++) stats[t].count = product.first_pixel(t + 1) - product.first_pixel(t);
  product.forward(weight, [&](int part, int64_t pixel, int m, int64_t n, const auto& acc) __attribute__((always_inline)) {
    constexpr int NV = int(sizeof(acc[0]) / sizeof(acc[0][0]));
    S* zt = z + pixel * pitch + n;
    if constexpr (M::IN_MEMORY) {
      for (int i = 0; i < m; i++) for (int j = 0; j < NV; j++) store(zt + i * pitch + j * L, acc[i][j], channels - n - j * L);
    } else {
      CSP_UNROLL(16) for (int i = 0; i < MR; i++)
        if (i < m) CSP_UNROLL(2) for (int j = 0; j < NV; j++) store(zt + i * pitch + j * L, acc[i][j], channels - n - j * L);
    }
    if (!stats) return;
    int64_t seen = pixel - product.first_pixel(part);
    if (m == MR) add_tile<T, MR, NV>(stats[part], n, seen, acc);
    else for (int j = 0; j < NV; j++) add_rows(stats[part], n + j * L, seen, m, [&](int64_t i) { return acc[i][j]; });
  });
}

// Where dz comes from, packed by pack_gradient.
template <class S> struct Gradient {
  using T = typename Types<S>::T;
  using U = typename Types<S>::Product;
  virtual void pack(int64_t columns, int64_t p0, int64_t m, int64_t M, Unit<U>* by_channel, Unit<U>* by_pixel) const = 0;
  virtual ~Gradient() = default;
};

// The last row and column of an odd map belong to no average: their gradient is as it was, `in` (null: 0).
template <class S> inline void clear_border(const Grid& g, S* gradient, int64_t pitch, int64_t channels, const S* in = nullptr, int64_t in_pitch = 0) {
  if (!g.pool || in == gradient) return;
  auto clear = [&](int64_t pixel) {
    void* to = gradient + pixel * pitch;
    if (in) memcpy(to, in + pixel * in_pitch, size_t(channels) * sizeof(S));
    else memset(to, 0, size_t(channels) * sizeof(S));
  };
  for (int64_t i = 0; i < g.N; i++) {
    for (int64_t x = 0; g.H % 2 && x < g.W; x++) clear((i * g.H + g.H - 1) * g.W + x);
    for (int64_t y = 0; g.W % 2 && y < g.H; y++) clear((i * g.H + y) * g.W + g.W - 1);
  }
}

template <class S> struct MixBackward {
  using T = typename Types<S>::T;
  using U = typename Types<S>::Product;
  static constexpr int MR = TILE_ROWS, L = LANES<T>, D = U::DEPTH;
  static constexpr int64_t CHUNK = 384 * 4 / int64_t(sizeof(T));
  const Mix<S>& mix;
  const Gradient<S>& gradient;
  const Unit<U>* W;             // packed<true>
  const PartialSums<T>* parts;  // a task: dW [O rounded to a vector][pitch()], sums [pitch()] of dn and dn * (x - mean)
  T* dw;                        // dW [out][K]; null: not wanted
  bool dgrad_too = true;        // else segments have no g and no sums are wanted; W is null

  static int64_t pitch(const Mix<S>& mix) { return round_up(mix.Kp, 2 * L); }
  static int64_t weights(const Mix<S>& mix) { return round_up(mix.O, L) * pitch(mix); }
  // Tiles at a time: their dz stays in the second-level cache. Large weights, whose gradient goes through memory once for each
  // group, have larger ones: dz may then come from the third level.
  int64_t group() const {
    const int64_t tile = mix.O * MR * int64_t(sizeof(T)), large = mix.O * mix.Kp * int64_t(sizeof(T)) >> 22;
    return large ? max64(1, min64(16, (int64_t(1) << 20) / tile)) : max64(1, min64(8, (int64_t(256) << 10) / tile));
  }

  // One vector of channels of one tile: da[i * nv] -> gradient of the segment; what the product read goes to a[row][LANES].
  template <Load LOAD, Pixel PIXEL>
  CSP_NOINLINE void emit(const Segment<S>& s, int64_t c, const Source* source, int m, const Vec<T>* da, int nv, Unit<U>* a,
                         const PartialSums<T>& part) const {
    int64_t n = s.channels - c, W = mix.grid.W;
    Vec<T> mean{}, scale{}, shift{}, sum{}, sum_x{}, number = Vec<T>{} + s.act.number;
    if constexpr (LOAD != Load::Raw) mean = load(s.norm->mean + c), scale = load(s.norm->scale + c), shift = load(s.norm->shift + c);
    auto one = [&](int64_t pixel, Vec<T> d) __attribute__((always_inline)) {
      Vec<T> x = load(s.x + pixel * s.pitch + c, n);
      if constexpr (LOAD != Load::Raw) {
        Vec<T> centred = x - mean, pre = centred * scale + shift;
        constexpr bool LEAKY = LOAD == Load::Leaky;
        if constexpr (LOAD == Load::Silu) d = Silu<T>{}.gradient(pre, d), x = Silu<T>{}.value(pre);
        else d = on_load_gradient<LEAKY, T>(pre, d, number), x = on_load<LEAKY, T>(pre, number);
        sum += d, sum_x += d * centred, d *= scale;
      }
      if (s.g) {
        store(s.g + pixel * s.g_pitch + c, s.g_in ? load(s.g_in + pixel * s.g_in_pitch + c, n) + d : d, n);
      }
      return x;
    };
    auto row = [&](int i) __attribute__((always_inline)) {
      if (i >= m) return Vec<T>{};
      int64_t p = PIXEL == Pixel::Tap ? s.at(mix.grid, source[i]) : source[i].pixel;
      if (PIXEL == Pixel::Tap && p < 0) return Vec<T>{};
      if constexpr (PIXEL != Pixel::Average) return one(p, da[i * nv]);
      Vec<T> d = da[i * nv] * T(0.25), top = one(p, d) + one(p + 1, d);
      return (top + (one(p + W, d) + one(p + W + 1, d))) * T(0.25);
    };
    for (int i = 0; i < MR; i += D) {
      Vec<T> first = row(i);
      store(a + i / D * L, U::join(first, D > 1 ? row(i + D - 1) : Vec<T>{}));
    }
    if constexpr (LOAD != Load::Raw) {
      int64_t k = s.column + c;
      store(part.sum + k, load(part.sum + k) + sum), store(part.sum_x + k, load(part.sum_x + k) + sum_x);
    }
  }

  void emit_vector(int64_t k, const Source* source, int m, const Vec<T>* da, int nv, Unit<U>* a, const PartialSums<T>& part) const {
    int64_t i = mix.count - 1;
    while (mix.segments[i].column > k) i--;
    const Segment<S>& s = mix.segments[i];
    int64_t c = k - s.column;
    with_load(s, mix.grid.pool, [&](auto load, auto pixel) { emit<decltype(load)::value, decltype(pixel)::value>(s, c, source, m, da, nv, a, part); });
  }

  // The segment of two vectors of channels that are read and whose gradient is written in place, null if it takes more.
  const Segment<S>* plain(int64_t k) const {
    if (D > 1 || sizeof(S) != sizeof(T) || mix.grid.pool || mix.grid.h) return nullptr;
    int64_t i = mix.count - 1;
    while (mix.segments[i].column > k) i--;
    const Segment<S>& s = mix.segments[i];
    return s.norm || s.g_in || k + 2 * L > s.column + s.channels ? nullptr : &s;
  }
  CSP_NOINLINE void dgrad_plain(const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t blocks, S* g, int64_t pitch, int m) const {
    Vec<T> acc[MR][2];
    clear(acc);
    product<U>(acc, A, a_step, B, blocks);
    CSP_UNROLL(16) for (int i = 0; i < MR; i++)
      if (i < m) CSP_UNROLL(2) for (int j = 0; j < 2; j++) store(g + i * pitch + j * L, acc[i][j]);
  }

  template <int NV>
  CSP_NOINLINE void dgrad(const Unit<U>* A, int64_t a_step, const Unit<U>* B, int64_t blocks, Vec<T>* da) const {
    if constexpr (TILES<U>) {
      tile_product<U, NV>(reinterpret_cast<T*>(da), A, a_step, B, blocks, true);
    } else {
      Vec<T> acc[MR][NV];
      clear(acc);
      product<U>(acc, A, a_step, B, blocks);
      CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) da[i * NV + j] = acc[i][j];
    }
  }

  bool apart() const {
    return dw && mix.Kp >= 2 * L * mix.tasks && shares_channels(mix.tasks, weights(mix) * int64_t(sizeof(T)), mix.P * (mix.Kp + mix.O) * int64_t(sizeof(S)));
  }
  int sets() const { return apart() ? 1 : mix.tasks; }  // of sums
  // Whether dW itself is the one set of sums.
  bool in_place() const { return dw && sets() == 1 && mix.K == mix.Kp && mix.O == mix.out.channels(); }
  void run() const {
    const bool in_place = this->in_place();
    add_up(in_place ? dw : nullptr, in_place ? mix.K : pitch(mix));
    if (dw && !in_place) weight_gradient();
  }

 private:
  // to: the set of sums of all tasks, null: each has its own; rows of it lie ldw apart.
  void add_up(T* to, int64_t ldw) const {
    int64_t P = mix.P, O = mix.O, Kp = mix.Kp, tiles = ceil_div(P, MR), blocks = ceil_div(O, depth_block<U>());
    int64_t chunk = round_up(ceil_div(Kp, ceil_div(Kp, CHUNK)), 2 * L), nt = group();
    const bool apart = this->apart();
    for_tasks(mix.parallel, mix.tasks, [&](int task) {
      Frame frame;
      TileRegisters<U> registers;
      const PartialSums<T> part{to ? to : parts[apart ? 0 : task].weight, parts[task].sum, parts[task].sum_x};
      part.clear(0, pitch(mix));
      const Range whole{0, Kp}, own = share(ceil_div(Kp, 2 * L), task, mix.tasks), of = apart ? Range{own.begin * 2 * L, min64(Kp, own.end * 2 * L)} : whole;
      Unit<U>* by_channel = frame.take<Unit<U>>(round_up(O, L * D) * nt * MR);
      Unit<U>* by_pixel = D == 1 ? by_channel : frame.take<Unit<U>>(round_up(O, L * D) * pixel_room<U>(nt * MR));
      Unit<U>* a = frame.take<Unit<U>>((chunk + 2 * L) * pixel_room<U>(nt * MR));
      Source* source = frame.take<Source>(nt * MR);
      Vec<T>* da = frame.zeroed<Vec<T>>(MR * 2);
      Range r = apart ? Range{0, tiles} : share(tiles, task, mix.tasks);
      for (int64_t t = r.begin; t < r.end; t += nt) {
        int64_t n = min64(nt, r.end - t), M = n * MR, p0 = t * MR, units = pixel_units<U>(M);
        for (int64_t i = 0; i < M; i++) source[i] = mix.grid.source(min64(p0 + i, P - 1));
        gradient.pack(O, p0, min64(M, P - p0), M, by_channel, by_pixel);
        for (int64_t k0 = of.begin; k0 < of.end; k0 += chunk) {
          int64_t k1 = min64(of.end, k0 + chunk);
          if constexpr (D == 1)
            for (int64_t q = 0; !dgrad_too && q < n; q++) mix.pack(k0, k1, source + q * MR, mix.rows(t + q), a + q * MR * L, units * L);
          for (int64_t k = k0; (D > 1 || dgrad_too) && k < k1; k += 2 * L)
            for (int64_t q = 0; q < n; q++) {
              if (const Segment<S>* s = plain(k)) {
                if (!s->g) continue;
                S* g = s->g + (p0 + q * MR) * s->g_pitch + (k - s->column);
                if constexpr (D == 1) dgrad_plain(by_channel + q * MR * L, M * L, W + k / (2 * L) * blocks * L * 2 * L, blocks, g, s->g_pitch, mix.rows(t + q));
                continue;
              }
              int nv = Kp - k > L ? 2 : 1;
              const Unit<U>*A = by_channel + q * MR * L, *B = W + k / (2 * L) * blocks * L * 2 * L;
              if (!dgrad_too) {}  // da stays zero
              else if (nv == 2) dgrad<2>(A, M * L, B, blocks, da);
              else dgrad<1>(A, M * L, B, blocks, da);
              for (int j = 0; j < nv; j++)
                emit_vector(k + j * L, source + q * MR, mix.rows(t + q), da + j, nv, a + ((k - k0) / L + j) * units * L + q * MR / D * L, part);
            }
          if (dw) clear_tail<U>(a, ceil_div(k1 - k0, L), M);
          for (int64_t k = k0; dw && k < k1; k += 2 * L)
            for (int64_t o = 0; o < O; o += L) {
              const Unit<U>*A = by_pixel + o * units, *ak = a + (k - k0) * units;
              T* dW = part.weight + o * ldw + k;
              if constexpr (D == 1 && sizeof(S) == sizeof(T)) {
                if (const Segment<S>* s = plain(k)) {
                  const S* x = s->x + p0 * s->pitch + (k - s->column);
                  for (int row = 0; row < L; row += WROWS<T>)
                    if (t == r.begin) outer_product<U, WROWS<T>, 2, true>(A + row, x, x + L, min64(M, P - p0), dW + row * ldw, ldw, s->pitch);
                    else outer_product<U, WROWS<T>, 2>(A + row, x, x + L, min64(M, P - p0), dW + row * ldw, ldw, s->pitch);
                  continue;
                }
              }
              wgrad_panel<U>(A, ak, units, dW, ldw, t == r.begin, Kp - k <= L);
            }
        }
      }
    });
    for (int64_t i = 0; i < mix.count; i++) {
      const Segment<S>& s = mix.segments[i];
      if (s.g) clear_border(mix.grid, s.g, s.g_pitch, s.channels, s.g_in, s.g_in_pitch);
    }
  }

  // dW, the tasks' sums.
  void weight_gradient() const {
    const int64_t ldw = pitch(mix);
    const int sets = this->sets();
    mix.out.each([&](int64_t, int64_t channel, int64_t column, int64_t size) {
      for_tasks(mix.parallel, mix.tasks, [&](int task) {
        Range r = share(size, task, mix.tasks);
        for (int64_t n = r.begin; n < r.end; n++) {
          T* to = dw + (channel + n) * mix.K;
          for (int64_t i = 0; i < mix.count; to += mix.segments[i].channels, i++)
            add_weights(parts, sets, (column + n) * ldw + mix.segments[i].column, mix.segments[i].channels, to);
        }
      });
    });
  }
};

}  // namespace csp::CSP_ISA
