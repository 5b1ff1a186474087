// The 3x3 convolution by Winograd: forward with statistics, and both gradients. Work is cut into rows of output tiles, which
// run on over image boundaries; a batch of tile rows is transformed, multiplied and transformed back while it is in cache.
#pragma once
#include "affine.h"
#include "pack.h"
#include "scratch.h"
#include "statistics.h"

namespace csp::CSP_ISA {

// Cuts rows into those of register tiles, the last one or two of which may be smaller; f(first, integral_constant of their rows).
template <int MR = TILE_ROWS, int FEW = FEW_ROWS, class F> CSP_INLINE void each_rows(int64_t rows, F f) {
  for (int64_t t = 0; t < rows;) {
    const int64_t left = rows - t;
    if (left > 2 * FEW || (left > FEW && left <= MR)) f(t, std::integral_constant<int, MR>{}), t += MR;
    else f(t, std::integral_constant<int, FEW>{}), t += FEW;
  }
}
inline int64_t rows_multiplied(int64_t rows) {
  int64_t n = 0;
  each_rows(rows, [&](int64_t, auto tile) { n += decltype(tile)::value; });
  return n;
}

template <int M> struct Tiling {
  static constexpr int IN = M + 2, E = IN * IN;
  int64_t H, W, TH, TW, rows;  // tile rows over all images
  bool large;                  // weights do not stay in the second-level cache from batch to batch
  Tiling(int64_t N, int64_t H, int64_t W, int64_t weights) : H(H), W(W), TH(ceil_div(H, M)), TW(ceil_div(W, M)), rows(N * TH), large(E * weights >> 18) {}
  int64_t batches() const { return ceil_div(rows, batch()); }
  int64_t image(int64_t row) const { return row / TH * H * W; }  // first pixel of the image of a tile row
  int64_t y(int64_t row) const { return row % TH * M; }
  // tile rows a batch: fills the register tile, stays in the second-level cache; or all of them, if they are few and the weights many
  int64_t batch() const {
    int64_t best = 1;
    if (large && rows * TW <= (M == 2 ? 64 : 32)) return rows;
    double best_fill = 0;
    for (int64_t n = 1; n <= rows && n * TW <= max64(TW, M == 2 ? 56 : 28); n++) {
      double fill = double(n * TW) / double(rows_multiplied(n * TW));
      if (fill > best_fill + 1e-3) best = n, best_fill = fill;
    }
    return best;
  }
};

// F(4x4) where it was asked for and its larger tiles do not waste more than they save.
inline bool large_tiles(int64_t H, int64_t W, int winograd) {
  int64_t small = ceil_div(H, 2) * ceil_div(W, 2) * 16, large = ceil_div(H, 4) * ceil_div(W, 4) * 36;
  return winograd == 4 && double(large) < 0.7 * double(small);
}

// V[e][tile][LANES] (e apart e_step) = B^T d B for one tile row and one channel vector; value(y, x) inside the image.
template <class T, int M, class Value>
CSP_INLINE void transform_row(const Tiling<M>& g, int64_t y0, Vec<T>* columns, T* V, int64_t e_step, Value value) {
  constexpr int IN = M + 2, L = LANES<T>;
  auto blank = [&](int64_t x) { for (int i = 0; i < IN; i++) columns[x * IN + i] = Vec<T>{}; };
  blank(0);
  for (int64_t x = g.W + 1; x < g.TW * M + 2; x++) blank(x);
  int64_t top = y0 - 1;
  if (top >= 0 && top + IN <= g.H) {
    for (int64_t x = 0; x < g.W; x++) {
      Vec<T> d[IN];
      CSP_UNROLL(8) for (int i = 0; i < IN; i++) d[i] = value(top + i, x);
      input_transform<T, M>(d, columns + (x + 1) * IN);
    }
  } else {
    for (int64_t x = 0; x < g.W; x++) {
      Vec<T> d[IN];
      CSP_UNROLL(8) for (int i = 0; i < IN; i++) d[i] = top + i >= 0 && top + i < g.H ? value(top + i, x) : Vec<T>{};
      input_transform<T, M>(d, columns + (x + 1) * IN);
    }
  }
  for (int64_t t = 0; t < g.TW; t++)
    CSP_UNROLL(8) for (int i = 0; i < IN; i++) {
      Vec<T> d[IN], o[IN];
      CSP_UNROLL(8) for (int j = 0; j < IN; j++) d[j] = columns[(t * M + j) * IN + i];
      input_transform<T, M>(d, o);
      CSP_UNROLL(8) for (int j = 0; j < IN; j++) store(V + (i * IN + j) * e_step + t * L, o[j]);
    }
}

template <class T, int M> CSP_INLINE void untransform(const T* Mb, int64_t e_step, Vec<T> (&y)[M][M]) {
  constexpr int IN = M + 2;
  Vec<T> t[M][IN];
  CSP_UNROLL(8) for (int j = 0; j < IN; j++) {
    Vec<T> d[IN], o[M];
    CSP_UNROLL(8) for (int i = 0; i < IN; i++) d[i] = load(Mb + (i * IN + j) * e_step);
    output_transform<T, M>(d, o);
    CSP_UNROLL(8) for (int i = 0; i < M; i++) t[i][j] = o[i];
  }
  CSP_UNROLL(8) for (int i = 0; i < M; i++) output_transform<T, M>(t[i], y[i]);
}

// out[MR][NV*LANES] = A * B
template <class T, int MR, int NV>
CSP_NOINLINE void winograd_product(const T* A, int64_t a_step, const T* B, int64_t blocks, T* out) {
  constexpr int L = LANES<T>;
  Vec<T> acc[MR][NV];
  clear(acc);
  product<Plain<T>>(acc, A, a_step, B, blocks);
  CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) store(out + (i * NV + j) * L, acc[i][j]);
}

// All E products of a batch of `tiles` tiles for one panel: Mb[e][Tp][NV*LANES]. V: [e][block][Tp][LANES].
template <class T, int M>
CSP_INLINE void winograd_products(const T* V, int64_t Tp, int64_t tiles, int64_t blocks, const T* U, int nv, T* Mb) {
  constexpr int L = LANES<T>, E = (M + 2) * (M + 2);
  for (int e = 0; e < E; e++)
    each_rows(tiles, [&](int64_t t, auto rows) __attribute__((always_inline)) {
      constexpr int MR = decltype(rows)::value;
      const T *A = V + (e * blocks * Tp + t) * L, *B = U + e * part_size<T>(blocks * L * nv);
      T* out = Mb + (e * Tp + t) * nv * L;
      if (nv == 2) winograd_product<T, MR, 2>(A, Tp * L, B, blocks, out);
      else winograd_product<T, MR, 1>(A, Tp * L, B, blocks, out);
    });
}

// Keeps an element with probability 1 - rate, scaled to the same mean; decided by a hash of its index, so that backward
// finds the same mask without storing it.
template <class T> struct Dropout {
  uint32_t seed, threshold;
  T scale;
  bool on;
  Dropout(double rate, uint64_t seed64, int64_t layer)
      : seed(uint32_t(seed64 ^ (seed64 >> 32)) * 0x9e3779b9u + uint32_t(layer) * 0x85ebca6bu),
        threshold(uint32_t(rate * 4294967295.0)), scale(T(rate < 1 ? 1 / (1 - rate) : 0)), on(rate > 0) {}
  CSP_INLINE Vec<T> operator()(Vec<T> x, int64_t pixel, int64_t channel) const {
    if (!on) return x;
    constexpr int L = LANES<T>;
    Vec<T> keep{};
    for (int i = 0; i < L; i++) {
      uint64_t index = uint64_t(pixel) * 4096u + uint64_t(channel + i);
      uint32_t h = uint32_t(index) ^ (uint32_t(index >> 32) * 0x27d4eb2fu) ^ seed;
      h = (h ^ (h >> 16)) * 0x7feb352du, h = (h ^ (h >> 15)) * 0x846ca68bu, h ^= h >> 16;
      keep[i] = h >= threshold ? scale : T(0);
    }
    return x * keep;
  }
};

// What every phase needs to know of a 3x3: z [P][zp] normalised on load, F slice [P][pitch] of g channels.
template <class S> struct Conv3x3 {
  using T = decltype(widen(S{}));
  const Parallel& parallel;
  Shares shares;           // of forward; backward shares the rows alone
  int64_t N, H, W, b, zp, g, pitch;
  const Affine<T>& norm;   // of z
  const Dropout<T>& dropout;
  OnLoad<T> act = {};      // of norm(z)

  // V of one tile row and channel vector k of act(norm(z)).
  template <int M>
  CSP_INLINE void transform_input(const Tiling<M>& tl, const S* z, int64_t row, int64_t k, Vec<T>* columns, T* V, int64_t e_step) const {
    constexpr int L = LANES<T>;
    const Vec<T> mean = load(norm.mean + k * L), scale = load(norm.scale + k * L), shift = load(norm.shift + k * L), number = Vec<T>{} + act.number;
    const S* zk = z + tl.image(row) * zp + k * L;
    auto with = [&](auto leaky) __attribute__((always_inline)) {
      transform_row<T, M>(tl, tl.y(row), columns, V, e_step, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
        return on_load<decltype(leaky)::value, T>((load_masked(zk + (y * W + x) * zp, b - k * L) - mean) * scale + shift, number);
      });
    };
    act.leaky ? with(std::true_type{}) : with(std::false_type{});
  }
};

// Weights as products read them: packed before, or by the task that multiplies a panel, then in its second-level cache.
template <class T, int M, bool TRANSPOSED> struct Panels {
  WinogradWeights<T, M, TRANSPOSED> weights;
  const T* packed;  // null: not yet
  T* room(Frame& frame) const { return packed ? nullptr : frame.take<T>(weights.panel_size()); }
  const T* get(int64_t p, T* room) const {
    if (packed) return packed + p * weights.panel_size();
    weights.pack_panel(room, p, {0, weights.blocks}, store_vector<T>);
    return room;
  }
};

// slice = after(conv3x3(act(norm(z))), pixel, channel), statistics of the slice.
template <int M, class S, class After>
void conv3x3_forward(const Conv3x3<S>& c, const S* z, const Panels<decltype(widen(S{})), M, false>& U, S* slice,
                     Statistics<decltype(widen(S{}))>* stats, const After& after) {
  using T = decltype(widen(S{}));
  constexpr int L = LANES<T>, E = (M + 2) * (M + 2);
  Tiling<M> tl(c.N, c.H, c.W, c.b * c.g);
  int64_t batch = tl.batch(), Tp = round_up(batch * tl.TW, TILE_ROWS), blocks = ceil_div(c.b, L);
  for_tasks(c.parallel, c.shares.tasks(), [&](int task) {
    Frame frame;
    T* V = frame.take<T>(E * blocks * Tp * L);
    T* Mb = frame.take<T>(E * Tp * 2 * L);
    T* out = frame.take<T>(batch * tl.TW * M * M * 2 * L);
    T* room = U.room(frame);
    Vec<T>* columns = frame.take<Vec<T>>((tl.TW * M + 2) * (M + 2));
    const int part = c.shares.row(task);
    const Range r = c.shares.rows_of(tl.batches(), task), own = c.shares.panels_of(panels<T>(c.g), task);
    const int64_t end = min64(r.end * batch, tl.rows);
    int64_t seen = 0;
    for (int64_t row = r.begin * batch; row < end; row += batch) {
      int64_t nr = min64(batch, end - row), pixels = 0;
      for (int64_t q = 0; q < nr; q++) {
        for (int64_t k = 0; k < blocks; k++) c.transform_input(tl, z, row + q, k, columns, V + (k * Tp + q * tl.TW) * L, blocks * Tp * L);
      }
      for (int64_t p = own.begin; p < own.end; p++) {
        int nv = panel_vectors<T>(c.g, p);
        winograd_products<T, M>(V, Tp, nr * tl.TW, blocks, U.get(p, room), nv, Mb);
        for (int j = 0; j < nv; j++) {
          int64_t ch = p * 2 * L + j * L, n = c.g - ch;
          pixels = 0;
          for (int64_t q = 0; q < nr; q++)
            for (int64_t tx = 0; tx < tl.TW; tx++) {
              int64_t y0 = tl.y(row + q), x0 = tx * M, first = tl.image(row + q) + y0 * c.W + x0;
              int ym = int(min64(M, c.H - y0)), xm = int(min64(M, c.W - x0));
              Vec<T> y[M][M];
              untransform<T, M>(Mb + ((q * tl.TW + tx) * nv + j) * L, Tp * nv * L, y);
              auto put = [&](int u, int v) __attribute__((always_inline)) {
                int64_t pixel = first + u * c.W + v;
                Vec<T> value = after(y[u][v], pixel, ch);
                store(slice + pixel * c.pitch + ch, value, n);
                if (stats) store(out + pixels * L, value);
                pixels++;
              };
              if (ym == M && xm == M) { CSP_UNROLL(4) for (int u = 0; u < M; u++) CSP_UNROLL(4) for (int v = 0; v < M; v++) put(u, v); }
              else { CSP_UNROLL(4) for (int u = 0; u < M; u++) CSP_UNROLL(4) for (int v = 0; v < M; v++) if (u < ym && v < xm) put(u, v); }
            }
          if (stats) add_rows(stats[part], ch, seen, pixels, [&](int64_t i) __attribute__((always_inline)) { return load(out + i * L); });
        }
      }
      seen += pixels;
    }
    if (stats && c.shares.first_panel(task)) stats[part].count = seen;
  });
}

// dY = dropout(G - (F - mean) * slope - offset): the slice's gradient with the deferred correction. owes: else dropout(G).
template <class T> struct SliceGradient { const T *mean, *slope, *offset; bool owes; };

// Where the gradient of z goes: g = in (null: 0) + dn times the norm's scale; g null: it is not wanted.
template <class S> struct ReadGradient {
  S* g;
  int64_t pitch;
  const S* in = nullptr;
  int64_t in_pitch = 0;
};

// Makes of what a product gives at a pixel, the gradient of act(norm(z)), that of z, for one vector of channels: dn = act'(norm(z)) times
// it, dz as ReadGradient says, sums of dn and of dn * (z - mean).
enum class Put { Nothing, Write, Add };  // dz
template <Put PUT, bool LEAKY, class S> struct PixelBackward {
  using T = decltype(widen(S{}));
  const S* z;
  int64_t zp;
  ReadGradient<S> dz;
  int64_t ch, n;  // the vector's first channel, those from there on
  Vec<T> mean, scale, shift, number, sum{}, sum_z{};
  CSP_INLINE PixelBackward(const S* z, int64_t zp, int64_t channels, const Affine<T>& norm, const OnLoad<T>& act, const ReadGradient<S>& dz, int64_t ch)
      : z(z), zp(zp), dz(dz), ch(ch), n(channels - ch), mean(load(norm.mean + ch)), scale(load(norm.scale + ch)), shift(load(norm.shift + ch)), number(Vec<T>{} + act.number) {}
  CSP_INLINE void operator()(int64_t pixel, Vec<T> product) {
    const Vec<T> centred = load_masked(z + pixel * zp + ch, n) - mean, dn = on_load_gradient<LEAKY, T>(centred * scale + shift, product, number);
    if constexpr (PUT == Put::Write) store_masked(dz.g + pixel * dz.pitch + ch, dn * scale, n);
    if constexpr (PUT == Put::Add) store_masked(dz.g + pixel * dz.pitch + ch, load_masked(dz.in + pixel * dz.in_pitch + ch, n) + dn * scale, n);
    sum += dn, sum_z += dn * centred;
  }
  // Adds the sums so far, which begin anew: short ones lose less.
  CSP_INLINE void add_to(const PartialSums<T>& part) {
    store(part.sum + ch, load(part.sum + ch) + sum), store(part.sum_x + ch, load(part.sum_x + ch) + sum_z);
    sum = sum_z = Vec<T>{};
  }
};
// f(integral_constant of Put, bool_constant of leaky)
template <class S, class F> CSP_INLINE void with_put(const ReadGradient<S>& dz, bool leaky, F f) {
  auto put = [&](auto how) __attribute__((always_inline)) { leaky ? f(how, std::true_type{}) : f(how, std::false_type{}); };
  if (!dz.g) put(std::integral_constant<Put, Put::Nothing>{});
  else if (dz.in) put(std::integral_constant<Put, Put::Add>{});
  else put(std::integral_constant<Put, Put::Write>{});
}

template <int M, class S> struct Conv3x3Backward {
  using T = decltype(widen(S{}));
  static constexpr int L = LANES<T>, IN = M + 2, E = IN * IN;
  const Conv3x3<S>& c;
  const S *F, *G;           // the slices
  SliceGradient<T> correction;
  const S* z;
  const Panels<T, M, true>& U;
  ReadGradient<S> dz;
  int64_t gp;               // g rounded up to a vector
  const PartialSums<T>* parts;  // a task: dU [E][bp][gp], sums [bp] of dn and of dn * (z - mean)
  bool wants_dgrad = true;
  bool apart = false;       // tasks share the input's channels, for wgrad, and parts have no dU
  Shares dgrad_shares = c.shares;  // where it is apart
  int64_t g_pitch = c.pitch;
  int64_t bp = round_up(c.b, L);
  Tiling<M> tl{c.N, c.H, c.W, c.b * c.g};

  CSP_INLINE Vec<T> dY(int64_t pixel, int64_t ch, Vec<T> mean, Vec<T> slope, Vec<T> offset) const {
    int64_t n = c.g - ch;
    Vec<T> g = load(G + pixel * g_pitch + ch, n);
    if (correction.owes) g -= (load(F + pixel * c.pitch + ch, n) - mean) * slope + offset;
    return c.dropout(g, pixel, ch);
  }

  void dgrad(int64_t begin, int64_t end, Range panels, int64_t batch, int64_t Tp, Vec<T>* columns, T* V, T* Mb, T* room, const PartialSums<T>& part) const {
    int64_t blocks = gp / L;
    for (int64_t row = begin; row < end; row += batch) {
      int64_t nr = min64(batch, end - row);
      for (int64_t q = 0; q < nr; q++)
        for (int64_t k = 0; k < blocks; k++) {
          Vec<T> mean = load(correction.mean + k * L), slope = load(correction.slope + k * L), offset = load(correction.offset + k * L);
          int64_t image = tl.image(row + q);
          transform_row<T, M>(tl, tl.y(row + q), columns, V + (k * Tp + q * tl.TW) * L, blocks * Tp * L,
                              [&](int64_t y, int64_t x) __attribute__((always_inline)) {
                                return dY(image + y * c.W + x, k * L, mean, slope, offset);
                              });
        }
      for (int64_t p = panels.begin; p < panels.end; p++) {
        int nv = panel_vectors<T>(c.b, p);
        winograd_products<T, M>(V, Tp, nr * tl.TW, blocks, U.get(p, room), nv, Mb);
        for (int j = 0; j < nv; j++)
          with_put(dz, c.act.leaky, [&](auto how, auto leaky) {
            emit<decltype(how)::value, decltype(leaky)::value>(row, nr, p * 2 * L + j * L, Mb + j * L, Tp * nv * L, nv * L, part);
          });
      }
    }
  }

  // Transforms back one channel vector of a batch, masks it, sums it.
  template <Put PUT, bool LEAKY> void emit(int64_t row, int64_t nr, int64_t ch, const T* Mb, int64_t e_step, int64_t t_step, const PartialSums<T>& part) const {
    PixelBackward<PUT, LEAKY, S> back(z, c.zp, c.b, c.norm, c.act, dz, ch);
    for (int64_t q = 0; q < nr; q++)
      for (int64_t tx = 0; tx < tl.TW; tx++) {
        int64_t y0 = tl.y(row + q), x0 = tx * M, first = tl.image(row + q) + y0 * c.W + x0;
        int ym = int(min64(M, c.H - y0)), xm = int(min64(M, c.W - x0));
        Vec<T> y[M][M];
        untransform<T, M>(Mb + (q * tl.TW + tx) * t_step, e_step, y);
        auto put = [&](int u, int v) __attribute__((always_inline)) { back(first + u * c.W + v, y[u][v]); };
        if (ym == M && xm == M) { CSP_UNROLL(4) for (int u = 0; u < M; u++) CSP_UNROLL(4) for (int v = 0; v < M; v++) put(u, v); }
        else { CSP_UNROLL(4) for (int u = 0; u < M; u++) CSP_UNROLL(4) for (int v = 0; v < M; v++) if (u < ym && v < xm) put(u, v); }
      }
    back.add_to(part);
  }

  // dM[e][k][tile][LANES] = A dY A^T; tiles: of one such row of dM; store: of a vector, store() or StreamedStore
  template <class Store> void transform_gradient(int64_t begin, int64_t nr, int64_t tiles, T* dM, const Store& store) const {
    int64_t blocks = gp / L;
    for (int64_t q = 0; q < nr; q++)
      for (int64_t k = 0; k < blocks; k++) {
        Vec<T> mean = load(correction.mean + k * L), slope = load(correction.slope + k * L), offset = load(correction.offset + k * L);
        for (int64_t tx = 0; tx < tl.TW; tx++) {
          int64_t y0 = tl.y(begin + q), x0 = tx * M, first = tl.image(begin + q) + y0 * c.W + x0;
          int64_t ym = c.H - y0, xm = c.W - x0;
          Vec<T> half[IN][M];
          CSP_UNROLL(4) for (int v = 0; v < M; v++) {
            Vec<T> d[M], o[IN];
            CSP_UNROLL(4) for (int u = 0; u < M; u++) d[u] = u < ym && v < xm ? dY(first + u * c.W + v, k * L, mean, slope, offset) : Vec<T>{};
            gradient_transform<T, M>(d, o);
            CSP_UNROLL(8) for (int i = 0; i < IN; i++) half[i][v] = o[i];
          }
          CSP_UNROLL(8) for (int i = 0; i < IN; i++) {
            Vec<T> o[IN];
            gradient_transform<T, M>(half[i], o);
            CSP_UNROLL(8) for (int j = 0; j < IN; j++) store(dM + (((i * IN + j) * blocks + k) * tiles + q * tl.TW + tx) * L, o[j]);
          }
        }
      }
  }

  // dU [LANES][gp] of e and vector k of the input's channels; V: [e][k][tile][LANES] of so many vectors. FIRST: the sums begin here.
  template <bool FIRST> void products(const T* V, int64_t k, int64_t vectors, const T* dM, int64_t tiles, int e, T* dU) const {
    const int64_t blocks = gp / L;
    for (int i = 0; i < L; i += WROWS<T>)
      for (int64_t o = 0; o < blocks; o += 2) {
        const T *A = V + (e * vectors + k) * tiles * L + i, *b0 = dM + (e * blocks + o) * tiles * L;
        T* to = dU + i * gp + o * L;
        if (o + 1 < blocks) outer_product<Plain<T>, WROWS<T>, 2, FIRST>(A, b0, b0 + tiles * L, tiles, to, gp);
        else outer_product<Plain<T>, WROWS<T>, 1, FIRST>(A, b0, b0, tiles, to, gp);
      }
  }
  // Of tile rows begin..end, all channels, to a part's sums.
  void wgrad(int64_t begin, int64_t end, Vec<T>* columns, T* V, T* dM, const PartialSums<T>& part) const {
    int64_t nr = end - begin, tiles = nr * tl.TW;
    transform_gradient(begin, nr, tiles, dM, store_vector<T>);
    for (int64_t k = 0; k < bp / L; k++) {
      for (int64_t q = 0; q < nr; q++) c.transform_input(tl, z, begin + q, k, columns, V + q * tl.TW * L, tiles * L);
      for (int e = 0; e < E; e++) products<false>(V, 0, 1, dM, tiles, e, part.weight + (e * bp + k * L) * gp);
    }
  }

  // Whether the tasks' sums are larger than what they are of, which is small: see run_apart.
  static bool shares(int tasks, const Conv3x3<S>& c, int64_t gp) {
    const Tiling<M> tl(c.N, c.H, c.W, c.b * c.g);
    return E * tl.rows * tl.TW * gp * int64_t(sizeof(T)) <= int64_t(32) << 20 &&
           shares_channels(tasks, E * round_up(c.b, L) * gp * int64_t(sizeof(T)), c.N * c.H * c.W * (c.b + c.g) * int64_t(sizeof(S)));
  }
  int sets() const { return apart ? 0 : c.shares.rows; }  // of sums
  // dW2 null: not wanted
  void run(T* dW2, const Weights3x3<T>& place) const {
    if (apart) return run_apart(dW2, place);
    int64_t batch = tl.batch(), Tp = round_up(batch * tl.TW, TILE_ROWS);
    int64_t group = max64(1, ceil_div(M == 2 ? 98 : 56, tl.TW * batch)) * batch, tiles = group * tl.TW;
    for_tasks(c.parallel, c.shares.rows, [&](int task) {
      Frame frame;
      parts[task].clear(E * bp * gp, bp);
      T* V = frame.take<T>(max64(E * (gp / L) * Tp, E * tiles) * L);
      T* Mb = frame.take<T>(E * Tp * 2 * L);
      T* dM = frame.take<T>(E * tiles * gp);
      T* room = U.room(frame);
      Vec<T>* columns = frame.take<Vec<T>>((tl.TW * M + 2) * IN);
      Range r = share(tl.rows, task, c.shares.rows);
      for (int64_t row = r.begin; row < r.end; row += group) {
        int64_t end = min64(row + group, r.end);
        if (wants_dgrad) dgrad(row, end, {0, panels<T>(c.b)}, batch, Tp, columns, V, Mb, room, parts[task]);
        if (dW2) wgrad(row, end, columns, V, dM, parts[task]);
      }
    });
    if (dW2) finish(dW2, place);
  }
  // The gradient of the output is transformed once; then a task has some of the input's channels, whose sums stay in its
  // second-level cache until they are the gradient of weights.
  void run_apart(T* dW2, const Weights3x3<T>& place) const {
    for (int t = 0; t < dgrad_shares.rows; t++) parts[t].clear(0, bp);
    const int64_t batch = tl.batch(), Tp = round_up(batch * tl.TW, TILE_ROWS);
    if (wants_dgrad) for_tasks(c.parallel, dgrad_shares.tasks(), [&](int task) {
      Frame frame;
      T* V = frame.take<T>(E * gp * Tp);
      T* Mb = frame.take<T>(E * Tp * 2 * L);
      T* room = U.room(frame);
      Vec<T>* columns = frame.take<Vec<T>>((tl.TW * M + 2) * IN);
      const Range r = dgrad_shares.rows_of(tl.batches(), task);
      dgrad(r.begin * batch, min64(r.end * batch, tl.rows), dgrad_shares.panels_of(panels<T>(c.b), task), batch, Tp, columns, V, Mb, room, parts[dgrad_shares.row(task)]);
    });
    if (!dW2) return;
    Frame shared;
    const int64_t tiles = tl.rows * tl.TW, vectors = bp / L, most = max64(1, min64(4, (int64_t(1) << 20) / (E * L * gp * int64_t(sizeof(T)))));
    // Vectors of a block: as many for each thread in each round.
    const int64_t rounds = ceil_div(vectors, most * c.parallel.threads), some = ceil_div(vectors, rounds * c.parallel.threads), blocks = ceil_div(vectors, some);
    T* dM = shared.take<T>(E * tiles * gp);
    const int by_rows = int(min64(c.shares.rows, tl.rows)), by_blocks = int(min64(blocks, most_pieces(c.parallel)));
    for_tasks(c.parallel, by_rows, [&](int task) {
      const Range r = share(tl.rows, task, by_rows);
      transform_gradient(r.begin, r.end - r.begin, tiles, dM + r.begin * tl.TW * L, StreamedStore(dM));
    });
    for_tasks(c.parallel, by_blocks, [&](int task) {
      Frame frame;
      T* V = frame.take<T>(E * some * tiles * L);
      T* dU = frame.take<T>(E * some * L * gp);
      Vec<T>* columns = frame.take<Vec<T>>((tl.TW * M + 2) * IN);
      const Range r = share(blocks, task, by_blocks);
      for (int64_t first = r.begin * some; first < min64(r.end * some, vectors); first += some) {
        const int64_t n = min64(some, vectors - first);
        for (int64_t k = 0; k < n; k++)
          for (int64_t row = 0; row < tl.rows; row++) c.transform_input(tl, z, row, first + k, columns, V + (k * tiles + row * tl.TW) * L, n * tiles * L);
        for (int e = 0; e < E; e++)
          for (int64_t k = 0; k < n; k++) products<true>(V, k, n, dM, tiles, e, dU + (e * n + k) * L * gp);
        for (int64_t k = 0; k < n; k++)
          finish((first + k) * L, dW2, place, [&](int e, int64_t i, int64_t o) __attribute__((always_inline)) { return load(dU + ((e * n + k) * L + i) * gp + o); });
      }
    });
  }

  // dW2 = G^T (sum of the tasks' dU) G
  void finish(T* dW2, const Weights3x3<T>& place) const {
    for_tasks(c.parallel, c.shares.rows, [&](int task) {
      Range r = share(bp / L, task, c.shares.rows);
      for (int64_t k = r.begin * L; k < r.end * L; k += L)
        finish(k, dW2, place, [&](int e, int64_t i, int64_t o) __attribute__((always_inline)) {
          const int64_t at = (e * bp + k + i) * gp + o;
          Vec<T> sum = load(parts[0].weight + at);
          for (int t = 1; t < sets(); t++) sum += load(parts[t].weight + at);
          return sum;
        });
    });
  }
  // Of LANES channels from k on; sum(e, channel behind k, output channel): dU
  template <class Sum> void finish(int64_t k, T* dW2, const Weights3x3<T>& place, const Sum& sum) const {
    alignas(64) T taps[Weights3x3<T>::SIZE];
    for (int64_t o = 0; o < gp; o += L) {
      for (int64_t i = 0; i < L; i++) {
        Vec<T> half[3][IN], w[3];
        CSP_UNROLL(6) for (int j = 0; j < IN; j++) {
          Vec<T> u[IN];
          CSP_UNROLL(6) for (int e = 0; e < IN; e++) u[e] = sum(e * IN + j, i, o);
          weight_gradient_transform<T, M>(u, w);
          CSP_UNROLL(3) for (int y = 0; y < 3; y++) half[y][j] = w[y];
        }
        CSP_UNROLL(3) for (int y = 0; y < 3; y++) {
          weight_gradient_transform<T, M>(half[y], w);
          CSP_UNROLL(3) for (int x = 0; x < 3; x++) store(taps + (i * 9 + y * 3 + x) * L, w[x]);
        }
      }
      place.scatter(taps, k, o, dW2);
    }
  }
};

}  // namespace csp::CSP_ISA
