// The 3x3 convolution as nine products on tiles (AMX), in place of Winograd: forward with statistics, and both gradients. What it
// reads is cut into bfloat16 once, a strip of rows at a time, zeros around it; each tap reads the strip elsewhere.
#pragma once
#include "conv3x3.h"
#include "tiles.h"

namespace csp::CSP_ISA {

constexpr int DIRECT = 0;  // in place of the size of Winograd's output tiles

// All images as one, with a blank row behind each. A row is `pitch` positions: its pixels, then at least one blank one, which is
// also the one in front of the next row. Even, so that pairs of positions are pairs one row further on.
struct Tall {
  int64_t N, H, W, pitch = round_up(W + 1, 2);
  int64_t rows() const { return N * (H + 1) - 1; }
  bool blank(int64_t row) const { return row < 0 || row >= rows() || row % (H + 1) == H; }
  int64_t pixel(int64_t row) const { return (row / (H + 1) * H + row % (H + 1)) * W; }  // the first of a row
  // rows of a strip
  int64_t strip() const { return max64(1, 512 / pitch); }
};

// Rows first - 1 .. first + count of a tall image as units [position][depth / 2]; a blank position lies in front of the first.
template <class U> struct Strip {
  static constexpr int L = 16, PARTS = U::PARTS;
  const Tall& tall;
  int64_t depth, first = 0, count = 0, filled = -1;  // filled: rows of the image that are there end before this one
  Unit<U>* positions;
  // Positions of the results of `rows` rows, in whole registers.
  static int64_t results(const Tall& tall, int64_t rows) { return round_up(rows * tall.pitch, 32); }
  static int64_t size(const Tall& tall) { return results(tall, tall.strip()) + 2 * tall.pitch + 4; }
  Strip(Frame& frame, const Tall& tall, int64_t channels)
      : tall(tall), depth(round_up(channels, 32)), positions(frame.take<Unit<U>>(size(tall) * depth / 2)) {}
  Unit<U>* position(int64_t p) const { return positions + p * (depth / 2); }
  Unit<U>* row(int64_t r) const { return position(1 + r * tall.pitch); }
  int64_t results() const { return results(tall, count); }
  // Where a part of channels k to k + 15 of a position lies, one bfloat16 after the other.
  static CSP_INLINE uint16_t* part(Unit<U>* position, int64_t k, int p) { return reinterpret_cast<uint16_t*>(part_of(position + k / 32 * L, p)) + k % 32; }
  static CSP_INLINE void put(Unit<U>* position, int64_t k, Vec<float> x) {
    CSP_UNROLL(2) for (int p = 0; p < PARTS; p++) {
      Vec<uint32_t> rounded = U::store_part(part(position, k, p), x);
      if (p + 1 < PARTS) x = U::rest(x, rounded);
    }
  }
  static void clear(Unit<U>* from, Unit<U>* to) { memset(static_cast<void*>(from), 0, size_t(to - from) * sizeof(Unit<U>)); }

  // Moves on to `rows` rows from `begin` on. reader(first of a vector of channels, put): calls put(value(pixel), whether what rounding
  // takes off is carried on).
  template <class Make> void move(int64_t begin, int64_t rows, int64_t channels, const Make& reader) {
    int64_t kept = 0;
    if (filled == begin + 1 && count >= 1) {  // the last two rows are the first two now
      kept = 2;
      memmove(static_cast<void*>(row(0)), row(count), size_t(row(2) - row(0)) * sizeof(Unit<U>));
    } else {
      clear(positions, row(0));
    }
    first = begin, count = rows, filled = begin + rows + 1;
    for (int64_t r = kept; r < rows + 2; r++) {
      const int64_t source = begin - 1 + r, from = 1 + r * tall.pitch;
      const bool blank = tall.blank(source);
      clear(position(from + (blank ? 0 : tall.W)), row(r + 1));
      if (blank) continue;
      const int64_t pixel = tall.pixel(source);
      for (int64_t k = 0; k < depth; k += L) {
        if (k >= channels) {
          for (int64_t x = 0; x < tall.W; x++) put(position(from + x), k, Vec<float>{});
          continue;
        }
        reader(k, [&](const auto& value, auto carries) __attribute__((always_inline)) {
          if constexpr (PARTS == 1 && decltype(carries)::value) round_and_carry(from, k, [&](int64_t x) __attribute__((always_inline)) { return value(pixel + x); });
          else for (int64_t x = 0; x < tall.W; x++) put(position(from + x), k, value(pixel + x));
        });
      }
    }
    clear(row(rows + 2), position(size(tall)));
  }

  // Rounds the values of a row so that their sums stay what they were: what rounding takes off a value is added to one of the next.
  // A gradient whose values are already bfloat16, less the small mean that a norm takes off all of them, would else be itself again.
  template <class Value> void round_and_carry(int64_t from, int64_t k, const Value& value) const {
    constexpr int CHAINS = 4;  // one would wait for itself
    const Vec<float> large = Vec<float>{} + 1e30f;
    Vec<float> lost[CHAINS] = {};
    for (int64_t x = 0; x < tall.W; x += CHAINS)
      CSP_UNROLL(4) for (int i = 0; i < CHAINS; i++) {
        if (x + i >= tall.W) break;
        const Vec<float> sum = value(x + i) + lost[i];
        BFloat16* to = reinterpret_cast<BFloat16*>(part(position(from + x + i), k, 0));
        store(to, sum);
        const Vec<float> rest = sum - load(to);
        lost[i] = rest < large ? rest > -large ? rest : Vec<float>{} : Vec<float>{};  // nothing of infinities and NaN
      }
  }

  // f(first pixel, first position of the results) of each row that is not blank
  template <class F> CSP_INLINE void each_row(F f) const {
    for (int64_t r = 0; r < count; r++)
      if (!tall.blank(first + r)) f(tall.pixel(first + r), r * tall.pitch);
  }
};

// Weights w [g][9][b] for tile_product3x3: [panel][tap][depth / 32][16][NV * 16]. Forward: depth b, channels g; transposed (dgrad):
// depth g, channels b, taps turned round. scale: of each of those channels, null: 1. part: which panels this call packs.
template <class U> inline int64_t direct_size(int64_t depth, int64_t channels) { return panels<Acc<U>>(channels) * 9 * ceil_div(depth, 32) * 16 * 32; }
template <class U, bool TRANSPOSED>
inline void pack_direct(Unit<U>* out, const Acc<U>* w, int64_t g, int64_t b, const Acc<U>* scale, Range part) {
  using T = Acc<U>;
  constexpr int L = LANES<T>;
  const int64_t depth = TRANSPOSED ? g : b, channels = TRANSPOSED ? b : g, blocks = ceil_div(depth, 2 * L);
  for (int64_t p = part.begin; p < part.end; p++) {
    const int nv = panel_vectors<T>(channels, p);
    Unit<U>* to = out + p * 9 * blocks * L * 2 * L;
    for (int64_t tap = 0; tap < 9; tap++)
      for (int64_t k = 0; k < depth; k += 2 * L, to += L * nv * L)
        for (int j = 0; j < nv; j++) {
          const int64_t n = p * 2 * L + j * L;
          if constexpr (TRANSPOSED) {
            auto row = [&](int64_t o) { return o < g ? load(w + (o * 9 + 8 - tap) * b + n, b - n) : Vec<T>{}; };
            for (int i = 0; i < L; i++) store(to + (i * nv + j) * L, U::join(row(k + 2 * i), row(k + 2 * i + 1)));
          } else {
            store_transposed(to + j * L, nv * L, true, [&](int64_t i, bool) {
              if (n + i >= g) return Vec<Unit<U>>{};
              const T *row = w + ((n + i) * 9 + tap) * b + k, s = scale ? scale[n + i] : T(1);
              return U::neighbours(load(row, b - k) * s, load(row + L, b - k - L) * s);
            });
          }
        }
  }
}

template <class U>
CSP_INLINE void multiply(const Strip<U>& strip, const Unit<U>* W, int64_t panel, int nv, Acc<U>* sums) {
  const Unit<U>* w = W + panel * 9 * (strip.depth / 32) * 16 * 32;
  if (nv == 2) tile_product3x3<U, 2>(strip.positions, strip.depth, strip.tall.pitch, strip.results(), w, sums);
  else tile_product3x3<U, 1>(strip.positions, strip.depth, strip.tall.pitch, strip.results(), w, sums);
}

// Moves a strip of channels `of` of act(norm(z)).
template <class U, class S> void move_input(const Conv3x3<S>& c, const S* z, Strip<U>& strip, int64_t begin, int64_t rows, Range of) {
  using T = decltype(widen(S{}));
  strip.move(begin, rows, of.end - of.begin, [&](int64_t at, auto put) {
    const int64_t k = of.begin + at;
    const Vec<T> mean = load(c.norm.mean + k), scale = load(c.norm.scale + k), shift = load(c.norm.shift + k), number = Vec<T>{} + c.act.number;
    auto with = [&](auto leaky) __attribute__((always_inline)) {
      put([&](int64_t pixel) __attribute__((always_inline)) {
        return on_load<decltype(leaky)::value, T>((load_masked(z + pixel * c.zp + k, c.b - k) - mean) * scale + shift, number);
      }, std::false_type{});
    };
    if (c.act.leaky) with(std::true_type{});
    else with(std::false_type{});
  });
}

// slice = after(conv3x3(act(norm(z))), pixel, channel), statistics of the slice.
template <class U, class S, class After>
void direct3x3_forward(const Conv3x3<S>& c, const S* z, const Unit<U>* W, S* slice, Statistics<Acc<U>>* stats, const After& after) {
  using T = Acc<U>;
  constexpr int L = LANES<T>;
  const Tall tall{c.N, c.H, c.W};
  for_tasks(c.parallel, c.shares.tasks(), [&](int task) {
    Frame frame;
    TileRegisters<U> registers;
    Strip<U> strip(frame, tall, c.b);
    T* sums = frame.take<T>(Strip<U>::results(tall, tall.strip()) * 2 * L);
    T* out = frame.take<T>(tall.strip() * tall.W * L);
    const int part = c.shares.row(task);
    const Range r = c.shares.rows_of(tall.rows(), task), own = c.shares.panels_of(panels<T>(c.g), task);
    int64_t seen = 0;
    for (int64_t row = r.begin; row < r.end; row += tall.strip()) {
      move_input(c, z, strip, row, min64(tall.strip(), r.end - row), {0, c.b});
      int64_t pixels = 0;
      for (int64_t p = own.begin; p < own.end; p++) {
        const int nv = panel_vectors<T>(c.g, p);
        multiply<U>(strip, W, p, nv, sums);
        for (int j = 0; j < nv; j++) {
          const int64_t ch = p * 2 * L + j * L, n = c.g - ch;
          pixels = 0;
          strip.each_row([&](int64_t first, int64_t position) __attribute__((always_inline)) {
            for (int64_t x = 0; x < tall.W; x++) {
              const Vec<T> value = after(load(sums + ((position + x) * nv + j) * L), first + x, ch);
              store(slice + (first + x) * c.pitch + ch, value, n);
              if (stats) store(out + pixels * L, value);
              pixels++;
            }
          });
          if (stats && pixels) add_rows(stats[part], ch, seen, pixels, [&](int64_t i) __attribute__((always_inline)) { return load(out + i * L); });
        }
      }
      seen += pixels;
    }
    if (stats && c.shares.first_panel(task)) stats[part].count = seen;
  });
}

// The twin of Conv3x3Backward.
template <class U, class S> struct Direct3x3Backward {
  using T = Acc<U>;
  static constexpr int L = LANES<T>;
  const Conv3x3<S>& c;
  const S *F, *G;           // the slices
  SliceGradient<T> correction;
  const S* z;
  const Unit<U>* W;         // pack_direct, transposed
  ReadGradient<S> dz;
  const PartialSums<T>* parts;  // a task: dW [9][round_up(g, 32)][round_up(b, 32)], sums of dn and of dn * (z - mean)
  bool wants_dgrad = true;
  bool apart = false;       // tasks share the input's channels, for wgrad, and the first part's dW
  int64_t g_pitch = c.pitch;
  int64_t rows = round_up(c.g, 2 * L), ldw = round_up(c.b, 2 * L);
  Tall tall{c.N, c.H, c.W};
  static int64_t weights(int64_t g, int64_t b) { return 9 * round_up(g, 2 * L) * round_up(b, 2 * L); }

  void move_gradient(Strip<U>& strip, int64_t begin, int64_t count) const {
    strip.move(begin, count, c.g, [&](int64_t k, auto put) {
      const Vec<T> mean = load(correction.mean + k), slope = load(correction.slope + k), offset = load(correction.offset + k);
      const int64_t n = c.g - k;
      auto given = [&](int64_t pixel) __attribute__((always_inline)) { return load_masked(G + pixel * g_pitch + k, n); };
      if (!correction.owes) return put([&](int64_t pixel) __attribute__((always_inline)) { return c.dropout(given(pixel), pixel, k); }, std::false_type{});
      put([&](int64_t pixel) __attribute__((always_inline)) {
        return c.dropout(given(pixel) - ((load_masked(F + pixel * c.pitch + k, n) - mean) * slope + offset), pixel, k);
      }, std::true_type{});
    });
  }

  template <Put PUT, bool LEAKY> void emit(const Strip<U>& strip, int64_t ch, const T* sums, int64_t step, const PartialSums<T>& part) const {
    PixelBackward<PUT, LEAKY, S> back(z, c.zp, c.b, c.norm, c.act, dz, ch);
    strip.each_row([&](int64_t first, int64_t position) __attribute__((always_inline)) {
      for (int64_t x = 0; x < tall.W; x++) back(first + x, load(sums + (position + x) * step));
      back.add_to(part);
    });
  }
  void dgrad(const Strip<U>& strip, T* sums, const PartialSums<T>& part) const {
    for (int64_t p = 0; p < panels<T>(c.b); p++) {
      const int nv = panel_vectors<T>(c.b, p);
      multiply<U>(strip, W, p, nv, sums);
      for (int j = 0; j < nv; j++)
        with_put(dz, c.act.leaky, [&](auto how, auto leaky) { emit<decltype(how)::value, decltype(leaky)::value>(strip, p * 2 * L + j * L, sums + j * L, nv * L, part); });
    }
  }

  // Position p and the next one as pairs, channels ch to ch + 15.
  static CSP_INLINE Vec<Unit<U>> pairs(const Strip<U>& strip, int64_t p, int64_t ch) {
    Vec<Unit<U>> to;
    CSP_UNROLL(2) for (int i = 0; i < U::PARTS; i++) {
      auto wide = [&](int64_t at) __attribute__((always_inline)) { return __builtin_convertvector(*reinterpret_cast<const U16*>(Strip<U>::part(strip.position(at), ch, i)), Vec<uint32_t>); };
      to.part[i] = wide(p) | wide(p + 1) << 16;
    }
    return to;
  }
  // dW[tap][o][first + c] += sum over positions of dY[position][o] * X[position of the tap][c]
  void wgrad(Strip<U>& gradient, Strip<U>& input, int64_t first, Unit<U>* dY, Unit<U>* X, const PartialSums<T>& part) const {
    const int64_t Q = gradient.results(), units = Q / 2, room = Strip<U>::size(tall) / 2 * L, real = gradient.count * tall.pitch;
    for (int64_t o = 0; o < rows; o += L)
      for (int64_t q = 0; q < units; q += L) {
        Unit<U>* block = dY + o * units + q * L;
        for (int64_t i = 0; i < L; i++) store(block + i * L, 2 * (q + i) < real ? pairs(gradient, 1 + tall.pitch + 2 * (q + i), o) : Vec<Unit<U>>{});
        transpose_units<U>(block);
      }
    const int64_t read = (Q + 2 * tall.pitch + 2) / 2;  // pairs of the input
    for (int64_t ch = 0; ch < input.depth; ch += 2 * L) {
      for (int64_t j = 0; j < 2; j++)
        for (int64_t odd = 0; odd < 2; odd++)
          for (int64_t q = 0; q < read; q++) store(X + (odd * 2 + j) * room + q * L, pairs(input, 2 * q + odd, ch + j * L));
      for (int64_t o = 0; o < rows; o += 2 * L)
        for (int64_t tap = 0; tap < 9; tap++) {
          const int64_t odd = tap % 3 == 1, shift = (tap / 3 * tall.pitch + tap % 3 - odd) / 2;
          tile_outer_product3x3<U>(dY + o * units, L * units, X + odd * 2 * room + shift * L, room, units, part.weight + (tap * rows + o) * ldw + first + ch, ldw);
        }
    }
  }

  static bool shares(int tasks, const Conv3x3<S>& c) {
    return shares_channels(tasks, weights(c.g, c.b) * int64_t(sizeof(T)), c.N * c.H * c.W * (c.b + c.g) * int64_t(sizeof(S)));
  }
  int sets() const { return apart ? 1 : c.shares.rows; }  // of sums
  // The gradients of tall rows r that are wanted; wgrad of channels `of`.
  void run(Range r, bool dgrad_too, bool wgrad_too, Range of, const PartialSums<T>& sums_of_channels, const PartialSums<T>& sums_of_weights) const {
    Frame frame;
    TileRegisters<U> registers;
    Strip<U> gradient(frame, tall, c.g), input(frame, tall, of.end - of.begin);
    const int64_t Q = Strip<U>::results(tall, tall.strip());
    T* sums = frame.take<T>(Q * 2 * L);
    Unit<U>* dY = frame.take<Unit<U>>(rows * Q / 2);
    Unit<U>* X = frame.take<Unit<U>>(4 * (Strip<U>::size(tall) / 2 * L));
    for (int64_t row = r.begin; row < r.end; row += tall.strip()) {
      const int64_t count = min64(tall.strip(), r.end - row);
      move_gradient(gradient, row, count);
      if (dgrad_too) dgrad(gradient, sums, sums_of_channels);
      if (!wgrad_too) continue;
      move_input(c, z, input, row, count, of);
      wgrad(gradient, input, of.begin, dY, X, sums_of_weights);
    }
  }
  // dW: [g][b][9], or [g][9][b] if it is channels_last; null: not wanted
  void run(T* dW, bool channels_last) const {
    const bool wants_wgrad = dW;
    if (!apart || wants_dgrad) for_tasks(c.parallel, c.shares.rows, [&](int task) {
      parts[task].clear(apart ? 0 : weights(c.g, c.b), round_up(c.b, L));
      run(share(tall.rows(), task, c.shares.rows), wants_dgrad, wants_wgrad && !apart, {0, c.b}, parts[task], parts[task]);
    });
    const int64_t blocks = ldw / (2 * L);
    if (apart && wants_wgrad) for_tasks(c.parallel, c.shares.rows, [&](int task) {
      const Range block = share(blocks, task, c.shares.rows), of{block.begin * 2 * L, min64(c.b, block.end * 2 * L)};
      if (of.begin >= of.end) return;
      for (int64_t row = 0; row < 9 * rows; row++) memset(parts[0].weight + row * ldw + of.begin, 0, size_t((block.end - block.begin) * 2 * L) * sizeof(T));
      run({0, tall.rows()}, false, true, of, parts[0], parts[0]);
    });
    if (wants_wgrad) finish(dW, channels_last);
  }

  // dW: the tasks' sums.
  void finish(T* dW, bool channels_last) const {
    for_tasks(c.parallel, c.shares.rows, [&](int task) {
      const Range r = share(c.g, task, c.shares.rows);
      for (int64_t o = r.begin; o < r.end; o++)
        for (int64_t tap = 0; tap < 9; tap++)
          for (int64_t ch = 0; ch < c.b; ch += L) {
            const int64_t at = (tap * rows + o) * ldw + ch, n = min64(L, c.b - ch);
            Vec<T> sum = load(parts[0].weight + at);
            for (int t = 1; t < sets(); t++) sum += load(parts[t].weight + at);
            if (channels_last) store(dW + (o * 9 + tap) * c.b + ch, sum, n);
            else for (int64_t i = 0; i < n; i++) dW[(o * c.b + ch + i) * 9 + tap] = sum[i];
          }
    });
  }
};

}  // namespace csp::CSP_ISA
