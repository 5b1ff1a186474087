// The 3x3 convolution with stride 2 of many channels by Winograd's F(2, 2) (Lavin & Gray, arXiv 1509.09308) on even and odd pixels
// apart. In one dimension two outputs y read five pixels x through the taps w,
//   y[0] = x[0] w[0] + x[1] w[1] + x[2] w[2],  y[1] = x[2] w[0] + x[3] w[1] + x[4] w[2],
// of which x[0], x[2], x[4] meet two taps, three products by F(2, 2), and x[1], x[3] one tap:
//   (x[0] - x[2]) w[0],  x[2] (w[0] + w[2]),  (x[2] - x[4]) w[2],  x[1] w[1],  x[3] w[1].
// In two dimensions a tile of 2 x 2 outputs takes 25 products instead of 36. All numbers of the transforms are 0, 1 and -1.
// The last two products have one weight: in two dimensions there are 16 parts of weights, and a product of a part has one row a tile,
// two, or four (`copies`). Work is cut into rows of tiles, which run on over image boundaries, as in conv3x3.h.
#pragma once
#include "conv3x3.h"
#include "strided3x3.h"

namespace csp::CSP_ISA {

// The one-dimensional transforms, to values or from values in the order of the products above.
namespace halves {
template <class T> CSP_INLINE void input(const Vec<T>* x, Vec<T>* o) { o[0] = x[0] - x[2], o[1] = x[2], o[2] = x[2] - x[4], o[3] = x[1], o[4] = x[3]; }
template <class T> CSP_INLINE void output(const Vec<T>* o, Vec<T>* y) { y[0] = o[0] + o[1] + o[3], y[1] = o[1] - o[2] + o[4]; }
// The gradient of x[0 .. 3] by those of y[0 .. 2], y[2] being the first of the next tile: the same products, weights in reverse.
template <class T> CSP_INLINE void dgrad_input(const Vec<T>* y, Vec<T>* o) { o[0] = y[0] - y[1], o[1] = y[1], o[2] = y[1] - y[2], o[3] = y[0], o[4] = y[1]; }
template <class T> CSP_INLINE void dgrad_output(const Vec<T>* o, Vec<T>* x) { x[0] = o[3], x[1] = o[0] + o[1], x[2] = o[4], x[3] = o[1] - o[2]; }
// The transposes of output and of weight.
template <class T> CSP_INLINE void gradient(const Vec<T>* y, Vec<T>* o) { o[0] = y[0], o[1] = y[0] + y[1], o[2] = -y[1], o[3] = y[0], o[4] = y[1]; }
template <class T> CSP_INLINE void weight_gradient(const Vec<T>* u, Vec<T>* w) { w[0] = u[0] + u[1], w[1] = u[3], w[2] = u[1] + u[2]; }
template <class T> CSP_INLINE void weight(const Vec<T>* w, Vec<T>* u) { u[0] = w[0], u[1] = w[0] + w[2], u[2] = w[2], u[3] = w[1]; }
}  // namespace halves

// Where the 25 values of each of so many tiles lie among rows of products, part by part; a part is a whole number of register tiles.
struct StridedParts {
  static constexpr int SIDE = 4, COUNT = SIDE * SIDE, VALUES = 25;
  int64_t tiles, begin[COUNT + 1];
  explicit StridedParts(int64_t tiles) : tiles(tiles) {
    begin[0] = 0;
    for (int part = 0; part < COUNT; part++) begin[part + 1] = begin[part] + round_up(used(part), TILE_ROWS);
  }
  static int copies(int part) { return (part / SIDE == 3 ? 2 : 1) * (part % SIDE == 3 ? 2 : 1); }
  int64_t used(int part) const { return copies(part) * tiles; }
  int64_t rows(int part) const { return begin[part + 1] - begin[part]; }
  int64_t rows() const { return begin[COUNT]; }
  // Where the values of tile `tile` lie, to[VALUES], in memory of [part][block][row][width]; those of the next tiles lie behind them.
  template <class P> CSP_INLINE void place(P* memory, int64_t blocks, int64_t block, int64_t tile, int64_t width, P** to) const {
    for (int i = 0; i < 5; i++)
      for (int j = 0; j < 5; j++) {
        const int part = std::min(i, 3) * SIDE + std::min(j, 3), copy = (i == 4) * (j < 3 ? 1 : 2) + (j == 4);
        to[i * 5 + j] = memory + (begin[part] * blocks + block * rows(part) + copy * tiles + tile) * width;
      }
  }
};

// Tiles of 2 x 2 outputs over all images.
struct StridedTiles {
  int64_t N, H, W;  // of the input
  int64_t h = ceil_div(H, 2), w = ceil_div(W, 2), TH = ceil_div(h, 2), TW = ceil_div(w, 2), rows = N * TH;
  int64_t batch = fullest(), batches = ceil_div(rows, batch);  // rows of tiles that are multiplied together
  int64_t image(int64_t row) const { return row / TH; }
  int64_t y(int64_t row) const { return row % TH * 2; }  // of the outputs
  // They fill register tiles and stay in the second-level cache.
  int64_t fullest() const {
    int64_t best = 1;
    double best_fill = 0;
    for (int64_t n = 1; n <= rows && n * TW <= max64(TW, 2 * TILE_ROWS); n++) {
      int64_t multiplied = 0;
      for (int part = 0; part < StridedParts::COUNT; part++) multiplied += rows_multiplied(StridedParts::copies(part) * n * TW);
      const double fill = double(StridedParts::VALUES * n * TW) / double(multiplied);
      if (fill > best_fill + 1e-3) best = n, best_fill = fill;
    }
    return best;
  }
};

// Of each tile of a row, IN x IN values, tiles STEP apart, transformed to[25][tile][LANES]; value(row, column).
template <class T, int IN, int STEP, class Transform, class Value>
CSP_INLINE void transform_tiles(int64_t TW, Vec<T>* columns, T* const* to, Transform transform, Value value) {
  constexpr int L = LANES<T>;
  for (int64_t x = 0; x < (TW - 1) * STEP + IN; x++) {
    Vec<T> d[IN];
    CSP_UNROLL(8) for (int i = 0; i < IN; i++) d[i] = value(i, x);
    transform(d, columns + x * 5);
  }
  for (int64_t t = 0; t < TW; t++)
    CSP_UNROLL(8) for (int i = 0; i < 5; i++) {
      Vec<T> d[IN], o[5];
      CSP_UNROLL(8) for (int j = 0; j < IN; j++) d[j] = columns[(t * STEP + j) * 5 + i];
      transform(d, o);
      CSP_UNROLL(8) for (int j = 0; j < 5; j++) store(to[i * 5 + j] + t * L, o[j]);
    }
}

// y[OUT][OUT] of one tile, from[25] apart.
template <class T, int OUT, class Transform> CSP_INLINE void untransform_tile(const T* const* from, int64_t offset, Transform transform, Vec<T> (&y)[OUT][OUT]) {
  Vec<T> half[OUT][5];
  CSP_UNROLL(8) for (int j = 0; j < 5; j++) {
    Vec<T> d[5], o[OUT];
    CSP_UNROLL(8) for (int i = 0; i < 5; i++) d[i] = load(from[i * 5 + j] + offset);
    transform(d, o);
    CSP_UNROLL(8) for (int i = 0; i < OUT; i++) half[i][j] = o[i];
  }
  CSP_UNROLL(8) for (int i = 0; i < OUT; i++) transform(half[i], y[i]);
}

// The weights w [O][9][C], transformed: [panel][part][block of the reduction][LANES][NV * LANES], parts part_size apart. Forward:
// reduction over inputs, channels those of the output; transposed, for dgrad: the other way round, from input `at` on, taps in reverse.
template <class T, bool TRANSPOSED> struct StridedWeights {
  static constexpr int L = LANES<T>, SIDE = StridedParts::SIDE;
  const T* w;
  Weights3x3<T> place;
  int64_t at, channels;
  const T* scale = nullptr;  // of each of the channels
  int64_t blocks = ceil_div(TRANSPOSED ? place.g : place.b, L);
  int64_t panel_size() const { return StridedParts::COUNT * part_size<T>(blocks * L * 2); }
  int64_t size() const { return panels<T>(channels) * panel_size(); }
  const T* pack(const Parallel& parallel, T* to) const {
    const int tasks = choose_tasks(parallel, blocks, 60.0 * StridedParts::COUNT * double(blocks * L * channels));
    for_tasks(parallel, tasks, [&](int task) {
      const StreamedStore streamed(to);
      for (int64_t p = 0; p < panels<T>(channels); p++) pack_panel(to + p * panel_size(), p, share(blocks, task, tasks), streamed);
    });
    return to;
  }
  CSP_NOINLINE void pack_panel(T* to, int64_t p, Range part, const StreamedStore& streamed) const {
    alignas(64) T taps[Weights3x3<T>::SIZE];
    const int nv = panel_vectors<T>(channels, p);
    for (int64_t kb = part.begin; kb < part.end; kb++)
      for (int j = 0; j < nv; j++) {
        const int64_t c = p * 2 * L + j * L;
        if (TRANSPOSED) place.gather_transposed(w, kb * L, at + c, taps);
        else place.gather(w, kb * L, c, taps);
        const Vec<T> s = scale ? load(scale + c, channels - c) : Vec<T>{} + T(1);
        for (int k = 0; k < L; k++) {
          Vec<T> rows[SIDE][3], line[SIDE];
          CSP_UNROLL(3) for (int x = 0; x < 3; x++) {
            Vec<T> column[3];
            CSP_UNROLL(3) for (int y = 0; y < 3; y++) column[y] = load(taps + (k * 9 + (TRANSPOSED ? 8 - y * 3 - x : y * 3 + x)) * L) * s;
            halves::weight<T>(column, line);
            CSP_UNROLL(4) for (int i = 0; i < SIDE; i++) rows[i][x] = line[i];
          }
          CSP_UNROLL(4) for (int i = 0; i < SIDE; i++) {
            halves::weight<T>(rows[i], line);
            CSP_UNROLL(4) for (int x = 0; x < SIDE; x++) streamed(to + (i * SIDE + x) * part_size<T>(blocks * L * nv) + ((kb * L + k) * nv + j) * L, line[x]);
          }
        }
      }
  }
};

// All products of a batch for one panel: out [part's row][NV * LANES]. V: [part][block][row][LANES].
template <class T> CSP_INLINE void strided_products(const StridedParts& parts, const T* V, int64_t blocks, const T* U, int nv, T* out) {
  constexpr int L = LANES<T>;
  for (int part = 0; part < StridedParts::COUNT; part++)
    each_rows(parts.used(part), [&](int64_t t, auto rows) __attribute__((always_inline)) {
      constexpr int MR = decltype(rows)::value;
      const T *A = V + (parts.begin[part] * blocks + t) * L, *B = U + part * part_size<T>(blocks * L * nv);
      T* to = out + (parts.begin[part] + t) * nv * L;
      if (nv == 2) winograd_product<T, MR, 2>(A, parts.rows(part) * L, B, blocks, to);
      else winograd_product<T, MR, 1>(A, parts.rows(part) * L, B, blocks, to);
    });
}

// Whether tiles save more than they cost, on what a product has of each weight: of its 9 P multiplications those of the last tiles, which
// may be half empty, are lost, and weights that are transformed `anew` (and their gradients) are 16 instead of 9.
inline bool strided_tiles_pay(const Grid& in, bool anew) {
  const StridedTiles tiles{in.N, in.H, in.W};
  const double pixels = double(tiles.N * tiles.h * tiles.w), saved = 9 * pixels - double(StridedParts::VALUES * tiles.rows * tiles.TW);
  return saved > 0.7 * pixels && (!anew || saved > 600);
}

template <class S> struct StridedWinograd {
  using T = typename Types<S>::T;
  static constexpr int L = LANES<T>, MR = REGISTER_ROWS;
  static constexpr bool IN_MEMORY = true;  // the sums that are emitted
  const Parallel& parallel;
  StridedTiles tiles;
  const Segment<S>* segments;  // of whole vectors of channels each, but for the last
  int64_t count, C, O;
  int64_t blocks = ceil_div(C, L), op = round_up(O, L), P = tiles.N * tiles.h * tiles.w;
  double flops = 18.0 * double(P * C * O);
  // Each task transforms what it reads: for four panels at least.
  Shares shares = choose_shares(parallel, tiles.batches, panels<T>(O), 4, double(O) / double(P), flops);

  StridedWinograd(const Parallel& parallel, const Grid& in, const Segment<S>* segments, int64_t count, int64_t C, int64_t O)
      : parallel(parallel), tiles{in.N, in.H, in.W}, segments(segments), count(count), C(C), O(O) {}
  static constexpr int64_t FEWEST = 32;  // channels of the input
  // anew: weights are transformed at each call.
  static bool fits(const Grid& in, const Segment<S>* segments, int64_t count, int64_t C, bool anew) {
    for (int64_t i = 0; i + 1 < count; i++) if (segments[i].channels % L) return false;
    return C >= FEWEST && strided_tiles_pay(in, anew);
  }

  StridedWeights<T, false> weights(const T* w, const T* scale) const { return {w, {O, C, true}, 0, O, scale}; }
  int64_t packed() const { return weights(nullptr, nullptr).size(); }
  const T* pack(T* to, const T* w, const T* scale) const { return weights(w, scale).pack(parallel, to); }

  int64_t first_pixel(int part) const {
    const int64_t row = min64(tiles.rows, share(tiles.batches, part, shares.rows).begin * tiles.batch);
    return (tiles.image(row) * tiles.h + tiles.y(row)) * tiles.w;
  }
  // f(block, segment, first channel in it)
  template <class F> CSP_INLINE void each_block(F f) const {
    for (int64_t i = 0, block = 0; i < count; i++)
      for (int64_t c = 0; c < segments[i].channels; c += L) f(block++, segments[i], c);
  }
  // Transforms channels c.. of a row of tiles, zeros around the map.
  CSP_NOINLINE void transform(const Segment<S>& s, int64_t c, int64_t row, Vec<T>* columns, T* const* to) const {
    const int64_t n = s.channels - c, top = tiles.y(row) * 2 - 1;
    const S* image = s.x + tiles.image(row) * tiles.H * tiles.W * s.pitch + c;
    const Vec<T> number = Vec<T>{} + s.act.number;
    with_load(s, false, [&](auto load_of, auto) __attribute__((always_inline)) {
      constexpr Load LOAD = decltype(load_of)::value;
      Vec<T> mean{}, scale{}, shift{};
      if constexpr (LOAD != Load::Raw) mean = load(s.norm->mean + c), scale = load(s.norm->scale + c), shift = load(s.norm->shift + c);
      transform_tiles<T, 5, 4>(tiles.TW, columns, to, halves::input<T>, [&](int i, int64_t x) __attribute__((always_inline)) {
        const int64_t y = top + i;
        if (x == 0 || x > tiles.W || y < 0 || y >= tiles.H) return Vec<T>{};
        const Vec<T> value = load_masked(image + (y * tiles.W + x - 1) * s.pitch, n);
        if constexpr (LOAD == Load::Raw) return value;
        else if constexpr (LOAD == Load::Silu) return Silu<T>{}.value((value - mean) * scale + shift);
        else return on_load<LOAD == Load::Leaky, T>((value - mean) * scale + shift, number);
      });
    });
  }
  Vec<T>* take_columns(Frame& frame) const { return frame.take<Vec<T>>((tiles.TW * 4 + 1) * 5); }

  // emit(part of the rows, pixel, m, column, acc): m pixels of one panel, as Mix has it.
  template <class Emit> void forward(const T* weight, const Emit& emit) const {
    const int64_t batch = tiles.batch, panel = weights(nullptr, nullptr).panel_size(), most = StridedParts(batch * tiles.TW).rows();
    for_tasks(parallel, shares.tasks(), [&](int task) {
      Frame frame;
      T *V = frame.take<T>(most * blocks * L), *products = frame.take<T>(most * 2 * L);
      Vec<T>*columns = take_columns(frame), *rows = frame.take<Vec<T>>(2 * (tiles.TW * 2 + MR) * 2);
      const Range r = shares.rows_of(tiles.batches, task), own = shares.panels_of(panels<T>(O), task);
      const int64_t end = min64(r.end * batch, tiles.rows);
      for (int64_t row = r.begin * batch; row < end; row += batch) {
        const int64_t nr = min64(batch, end - row);
        const StridedParts parts(nr * tiles.TW);
        for (int64_t q = 0; q < nr; q++)
          each_block([&](int64_t block, const Segment<S>& s, int64_t c) {
            T* to[StridedParts::VALUES];
            parts.place(V, blocks, block, q * tiles.TW, L, to);
            transform(s, c, row + q, columns, to);
          });
        for (int64_t p = own.begin; p < own.end; p++) {
          strided_products(parts, V, blocks, weight + p * panel, panel_vectors<T>(O, p), products);
          for (int64_t q = 0; q < nr; q++)
            with_panel<T>(O, p, [&](auto vectors) {
              constexpr int NV = decltype(vectors)::value;
              untransform<NV>(parts, products, q, rows);
              const int64_t first = (tiles.image(row + q) * tiles.h + tiles.y(row + q)) * tiles.w;
              for (int64_t v = 0; v < min64(2, tiles.h - tiles.y(row + q)); v++)
                for (int64_t x = 0; x < tiles.w; x += MR)
                  emit(shares.row(task), first + v * tiles.w + x, int(min64(MR, tiles.w - x)), p * 2 * L, *reinterpret_cast<const Vec<T>(*)[MR][NV]>(rows + (v * (tiles.TW * 2 + MR) + x) * NV));
            });
        }
      }
    });
  }
  // Two rows of outputs, [2][TW * 2 + MR][NV].
  template <int NV> CSP_NOINLINE void untransform(const StridedParts& parts, const T* products, int64_t q, Vec<T>* rows) const {
    const T* from[StridedParts::VALUES];
    parts.place(products, 1, 0, q * tiles.TW, NV * L, from);
    for (int64_t t = 0; t < tiles.TW; t++)
      for (int j = 0; j < NV; j++) {
        Vec<T> y[2][2];
        untransform_tile<T, 2>(from, (t * NV + j) * L, halves::output<T>, y);
        CSP_UNROLL(2) for (int v = 0; v < 2; v++) CSP_UNROLL(2) for (int u = 0; u < 2; u++) rows[(v * (tiles.TW * 2 + MR) + t * 2 + u) * NV + j] = y[v][u];
      }
  }

  // dw [O][9][C] = dz^T x; dz: [P][pitch]. A task has a part of the rows of tiles and a set of sums, or all of them and a part of the input's channels.
  void wgrad(const S* dz, int64_t pitch, T* dw) const {
    Frame frame;
    const int64_t set = StridedParts::COUNT * blocks * L * op, sums_size = set * int64_t(sizeof(T)), reads = P * (4 * C + O) * int64_t(sizeof(S));
    const int most = choose_pieces(parallel, tiles.rows, flops, double(sums_size), double(reads));
    Shares shared{most, 1};
    if (shares_channels(most, sums_size, reads)) shared = {1, int(min64(most, blocks))};
    T* sums = frame.take<T>(set * shared.rows);  // [task's rows][block][part][LANES][op]
    for_tasks(parallel, shared.tasks(), [&](int task) { add_up(dz, pitch, shared.rows_of(tiles.rows, task), shared.panels_of(blocks, task), sums + shared.row(task) * set); });
    const int tasks = int(min64(blocks, most));
    for_tasks(parallel, tasks, [&](int task) {
      const Range r = share(blocks, task, tasks);
      for (int64_t block = r.begin; block < r.end; block++) finish(block, sums + block * StridedParts::COUNT * L * op, shared.rows, set, dw);
    });
  }

 private:
  void add_up(const S* dz, int64_t pitch, Range of_rows, Range of_blocks, T* sums) const {
    // Rows of tiles at a time: their gradient stays in the second-level cache, unless sums would go through memory too often.
    const int64_t few = max64(2 * TILE_ROWS, min64(64, (int64_t(1) << 20) / (StridedParts::VALUES * op * int64_t(sizeof(T)))));
    const int64_t group = max64(1, few / tiles.TW), vectors = op / L, most = StridedParts(group * tiles.TW).rows();
    Frame frame;
    T *dM = frame.take<T>(most * op), *V = frame.take<T>(most * L);
    Vec<T>* columns = take_columns(frame);
    for (int64_t row = of_rows.begin; row < of_rows.end; row += group) {
      const int64_t nr = min64(group, of_rows.end - row);
      const StridedParts parts(nr * tiles.TW);
      for (int64_t q = 0; q < nr; q++)
        for (int64_t o = 0; o < vectors; o++) {
          T* to[StridedParts::VALUES];
          parts.place(dM, vectors, o, q * tiles.TW, L, to);
          transform_gradient(dz + o * L, pitch, O - o * L, row + q, columns, to);
        }
      each_block([&](int64_t block, const Segment<S>& s, int64_t c) {
        if (block < of_blocks.begin || block >= of_blocks.end) return;
        for (int64_t q = 0; q < nr; q++) {
          T* to[StridedParts::VALUES];
          parts.place(V, 1, 0, q * tiles.TW, L, to);
          transform(s, c, row + q, columns, to);
        }
        row == of_rows.begin ? products<true>(parts, V, dM, sums + block * StridedParts::COUNT * L * op) : products<false>(parts, V, dM, sums + block * StridedParts::COUNT * L * op);
      });
    }
  }
  CSP_NOINLINE void transform_gradient(const S* dz, int64_t pitch, int64_t n, int64_t row, Vec<T>* columns, T* const* to) const {
    const S* image = dz + tiles.image(row) * tiles.h * tiles.w * pitch;
    transform_tiles<T, 2, 2>(tiles.TW, columns, to, halves::gradient<T>, [&](int i, int64_t x) __attribute__((always_inline)) {
      const int64_t y = tiles.y(row) + i;
      return y < tiles.h && x < tiles.w ? load_masked(image + (y * tiles.w + x) * pitch, n) : Vec<T>{};
    });
  }
  // sums [part][LANES][op] of one vector of the input's channels. FIRST: they begin here.
  template <bool FIRST> void products(const StridedParts& parts, const T* V, const T* dM, T* sums) const {
    const int64_t vectors = op / L;
    for (int part = 0; part < StridedParts::COUNT; part++)
      for (int64_t o = 0; o < vectors; o += 2)
        for (int i = 0; i < L; i += WROWS<T>) {
          const T *A = V + parts.begin[part] * L + i, *b = dM + (parts.begin[part] * vectors + o * parts.rows(part)) * L;
          T* to = sums + (part * L + i) * op + o * L;
          if (o + 1 < vectors) outer_product<Plain<T>, WROWS<T>, 2, FIRST>(A, b, b + parts.rows(part) * L, parts.used(part), to, op);
          else outer_product<Plain<T>, WROWS<T>, 1, FIRST>(A, b, b, parts.used(part), to, op);
        }
  }
  // dw of one vector of the input's channels.
  void finish(int64_t block, const T* sums, int sets, int64_t set, T* dw) const {
    constexpr int SIDE = StridedParts::SIDE;
    const Weights3x3<T> place{O, C, true};
    alignas(64) T taps[Weights3x3<T>::SIZE];
    for (int64_t o = 0; o < op; o += L) {
      for (int i = 0; i < L; i++) {
        Vec<T> half[3][SIDE], w[3];
        CSP_UNROLL(4) for (int x = 0; x < SIDE; x++) {
          Vec<T> u[SIDE];
          CSP_UNROLL(4) for (int y = 0; y < SIDE; y++) {
            const T* from = sums + ((y * SIDE + x) * L + i) * op + o;
            u[y] = load(from);
            for (int t = 1; t < sets; t++) u[y] += load(from + t * set);
          }
          halves::weight_gradient<T>(u, w);
          CSP_UNROLL(3) for (int y = 0; y < 3; y++) half[y][x] = w[y];
        }
        CSP_UNROLL(3) for (int y = 0; y < 3; y++) {
          halves::weight_gradient<T>(half[y], w);
          CSP_UNROLL(3) for (int x = 0; x < 3; x++) store(taps + (i * 9 + y * 3 + x) * L, w[x]);
        }
      }
      place.scatter(taps, block * L, o, dw);
    }
  }
};

// dgrad of the same, of channels at.. of the input, n of them.
template <class S> struct StridedWinogradDgrad {
  using T = typename Types<S>::T;
  static constexpr int L = LANES<T>;
  const Parallel& parallel;
  StridedTiles tiles;
  int64_t C, O, at, n;
  int64_t blocks = ceil_div(O, L);
  Shares shares = choose_shares(parallel, tiles.batches, panels<T>(n), 4, double(n) / double(tiles.N * tiles.h * tiles.w), 18.0 * double(tiles.N * tiles.h * tiles.w * n * O));

  StridedWeights<T, true> weights(const T* w) const { return {w, {O, C, true}, at, n}; }
  // emit(part of the rows, whether the row is odd, whether the column is, pixel among such ones, m, column, acc, nv): nv vectors of each of m pixels
  template <class Emit> void run_all(const S* dz, int64_t pitch, const T* w, const Emit& emit) const {
    Frame shared;
    const auto place = weights(w);
    const T* weight = place.pack(parallel, shared.take<T>(place.size()));
    const int64_t batch = tiles.batch, most = StridedParts(batch * tiles.TW).rows();
    for_tasks(parallel, shares.tasks(), [&](int task) {
      Frame frame;
      T *V = frame.take<T>(most * blocks * L), *products = frame.take<T>(most * 2 * L);
      Vec<T>*columns = frame.take<Vec<T>>((tiles.TW * 2 + 1) * 5), *rows = frame.take<Vec<T>>(16 * tiles.TW * 2);
      const Range r = shares.rows_of(tiles.batches, task), own = shares.panels_of(panels<T>(n), task);
      const int64_t end = min64(r.end * batch, tiles.rows);
      for (int64_t row = r.begin * batch; row < end; row += batch) {
        const int64_t nr = min64(batch, end - row);
        const StridedParts parts(nr * tiles.TW);
        for (int64_t q = 0; q < nr; q++)
          for (int64_t block = 0; block < blocks; block++) {
            T* to[StridedParts::VALUES];
            parts.place(V, blocks, block, q * tiles.TW, L, to);
            transform(dz + block * L, pitch, O - block * L, row + q, columns, to);
          }
        for (int64_t p = own.begin; p < own.end; p++) {
          const int nv = panel_vectors<T>(n, p);
          strided_products(parts, V, blocks, weight + p * place.panel_size(), nv, products);
          for (int64_t q = 0; q < nr; q++) {
            nv == 2 ? untransform<2>(parts, products, q, rows) : untransform<1>(parts, products, q, rows);
            for (int64_t i = 0; i < min64(4, tiles.H - tiles.y(row + q) * 2); i++)
              for (int64_t odd_x = 0; odd_x < 2; odd_x++) {
                const int64_t columns_of = (tiles.W + 1 - odd_x) / 2, rows_of = (tiles.H + 1 - i % 2) / 2;
                if (columns_of) emit(shares.row(task), i % 2, odd_x, (tiles.image(row + q) * rows_of + tiles.y(row + q) + i / 2) * columns_of, int(columns_of), p * 2 * L, rows + (i * 2 + odd_x) * tiles.TW * 2 * nv, nv);
              }
          }
        }
      }
    });
  }

 private:
  // Zeros below and right of the outputs.
  CSP_NOINLINE void transform(const S* dz, int64_t pitch, int64_t left, int64_t row, Vec<T>* columns, T* const* to) const {
    const S* image = dz + tiles.image(row) * tiles.h * tiles.w * pitch;
    transform_tiles<T, 3, 2>(tiles.TW, columns, to, halves::dgrad_input<T>, [&](int i, int64_t x) __attribute__((always_inline)) {
      const int64_t y = tiles.y(row) + i;
      return y < tiles.h && x < tiles.w ? load_masked(image + (y * tiles.w + x) * pitch, left) : Vec<T>{};
    });
  }
  // Four rows of pixels of the input, [4][odd column][TW * 2][NV].
  template <int NV> CSP_NOINLINE void untransform(const StridedParts& parts, const T* products, int64_t q, Vec<T>* rows) const {
    const T* from[StridedParts::VALUES];
    parts.place(products, 1, 0, q * tiles.TW, NV * L, from);
    for (int64_t t = 0; t < tiles.TW; t++)
      for (int j = 0; j < NV; j++) {
        Vec<T> x[4][4];
        untransform_tile<T, 4>(from, (t * NV + j) * L, halves::dgrad_output<T>, x);
        CSP_UNROLL(4) for (int i = 0; i < 4; i++) CSP_UNROLL(4) for (int u = 0; u < 4; u++) rows[((i * 2 + u % 2) * tiles.TW * 2 + t * 2 + u / 2) * NV + j] = x[i][u];
      }
  }
};

}  // namespace csp::CSP_ISA
