// The 1x1 product with its normalisation-activation prologue, forward, and both gradients in one pass over the features.
#pragma once
#include "affine.h"
#include "pack.h"
#include "scratch.h"
#include "statistics.h"
#include "tiles.h"

namespace csp::CSP_ISA {

// A[block][MR][LANES]: rows 0..m-1 of F[:, k0:k1] after the prologue, the rest zero. K: width of the prefix.
template <class U, class S>
CSP_INLINE void pack_rows(const S* F, int64_t pitch, int m, int64_t k0, int64_t k1, int64_t K, const Affine<Acc<U>>& norm,
                          Unit<U>* A) {
  using T = Acc<U>;
  constexpr int MR = TILE_ROWS, L = LANES<T>, D = U::DEPTH;
  for (int64_t k = k0; k < k1; k += D * L, A += MR * L) {
    const bool whole = k + D * L <= K;
    Vec<T> mean[D], scale[D], shift[D];
    for (int d = 0; d < D; d++) mean[d] = load(norm.mean + k + d * L), scale[d] = load(norm.scale + k + d * L), shift[d] = load(norm.shift + k + d * L);
    auto value = [&](const S* f, int d) __attribute__((always_inline)) {
      Vec<T> x = whole ? load(f + d * L) : load(f + d * L, K - k - d * L);
      return act<T>((x - mean[d]) * scale[d] + shift[d]);
    };
    for (int i = 0; i < m; i++) store(A + i * L, U::join(value(F + i * pitch + k, 0), D > 1 ? value(F + i * pitch + k, D - 1) : Vec<T>{}));
    for (int i = m; i < MR; i++) store(A + i * L, Vec<Unit<U>>{});
  }
}

// One panel of a tile: partial sums rest in C between chunks, emit(acc) gets the finished ones.
template <class U, int NV, class Emit>
CSP_NOINLINE void pointwise_panel(const Unit<U>* A, const Unit<U>* B, int64_t blocks, Acc<U>* C, bool first, bool last,
                                  const Emit& emit) {
  using T = Acc<U>;
  constexpr int MR = TILE_ROWS, L = LANES<T>;
  Vec<T> acc[MR][NV];
  if constexpr (TILES<U>) {
    tile_product<U, NV>(C, A, MR * L, B, blocks, first);
    if (!last) return;
    CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) acc[i][j] = load(C + (i * NV + j) * L);
    emit(acc);
  } else {
    if (first) clear(acc);
    else CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) acc[i][j] = load(C + (i * NV + j) * L);
    product<U>(acc, A, MR * L, B, blocks);
    if (last) emit(acc);
    else CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) store(C + (i * NV + j) * L, acc[i][j]);
  }
}

template <class U> constexpr int64_t FORWARD_CHUNK = 20 * VECTOR_BYTES / int64_t(sizeof(Vec<Unit<U>>));  // blocks of the reduction: 20 KiB of A

template <class U> struct PointwiseScratch {
  Unit<U>* A;
  Acc<U>* C;
  PointwiseScratch(Frame& frame, int64_t b)
      : A(frame.take<Unit<U>>(TILE_ROWS * FORWARD_CHUNK<U> * LANES<Unit<U>>)),
        C(frame.take<Acc<U>>(panels<Acc<U>>(b) * TILE_ROWS * 2 * LANES<Acc<U>>)) {}
};

// The share of panel p in bringing the next tile's rows into the second-level cache while this one is multiplied.
template <class S>
CSP_INLINE void prefetch_rows(const S* F, int64_t pitch, int m, int64_t k0, int64_t k1, int64_t p, int64_t of) {
  if (m < TILE_ROWS) return;  // the last tile
  for (int64_t i = TILE_ROWS * p / of; i < TILE_ROWS * (p + 1) / of; i++)
    for (int64_t k = k0; k < k1; k += 64 / int64_t(sizeof(S))) __builtin_prefetch(F + (TILE_ROWS + i) * pitch + k, 0, 2);
}

// act(norm(F[m rows, :K])) * W[K, b]; emit(channel, acc) for each panel of b. W from pack_product.
template <class U, class S, class Emit>
CSP_INLINE void pointwise_tile(const S* F, int64_t pitch, int m, int64_t K, const Affine<Acc<U>>& norm, const Unit<U>* W,
                               int64_t b, const PointwiseScratch<U>& scratch, const Emit& emit) {
  using T = Acc<U>;
  constexpr int L = LANES<T>;
  int64_t blocks = ceil_div(K, depth_block<U>()), chunks = ceil_div(blocks, FORWARD_CHUNK<U>), step = ceil_div(blocks, chunks);
  for (int64_t k = 0; k < blocks; k += step) {
    int64_t n = min64(step, blocks - k);
    pack_rows<U>(F, pitch, m, k * depth_block<U>(), (k + n) * depth_block<U>(), K, norm, scratch.A);
    for (int64_t p = 0; p < panels<T>(b); p++) {
      prefetch_rows(F, pitch, m, k * depth_block<U>(), min64(K, (k + n) * depth_block<U>()), p, panels<T>(b));
      T* C = scratch.C + p * TILE_ROWS * 2 * L;
      const Unit<U>* B = W + p * blocks * L * 2 * L;
      auto done = [&](const auto& acc) __attribute__((always_inline)) { emit(p * 2 * L, acc); };
      if (panel_vectors<T>(b, p) == 2) pointwise_panel<U, 2>(scratch.A, B + k * L * 2 * L, n, C, k == 0, k + n == blocks, done);
      else pointwise_panel<U, 1>(scratch.A, B + k * L * L, n, C, k == 0, k + n == blocks, done);
    }
  }
}

// z[P, bp] = act(norm(F[:, :K])) * W, statistics of z. Tasks share the tiles.
template <class U, class S>
void pointwise_forward(const Parallel& parallel, int tasks, int64_t P, const S* F, int64_t pitch, int64_t K,
                       const Affine<Acc<U>>& norm, const Unit<U>* W, int64_t b, S* z, int64_t zp, Statistics<Acc<U>>* stats) {
  using T = Acc<U>;
  constexpr int MR = TILE_ROWS, L = LANES<T>;
  int64_t tiles = ceil_div(P, MR);
  for_tasks(parallel, tasks, [&](int task) {
    Frame frame;
    TileRegisters<U> registers;
    PointwiseScratch<U> scratch(frame, b);
    Range r = share(tiles, task, tasks);
    int64_t seen = 0;
    for (int64_t t = r.begin; t < r.end; t++) {
      int m = int(min64(MR, P - t * MR));
      S* zt = z + t * MR * zp;
      auto emit = [&](int64_t n, const auto& acc) __attribute__((always_inline)) {
        constexpr int NV = int(sizeof(acc[0]) / sizeof(acc[0][0]));
        if (__builtin_expect(m == MR, 1)) {
          CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) store(zt + i * zp + n + j * L, acc[i][j]);
          if (stats) add_tile<T, MR, NV>(stats[task], n, seen, acc);
        } else {
          Vec<T> rows[MR][NV];
          CSP_UNROLL(16) for (int i = 0; i < MR; i++) CSP_UNROLL(2) for (int j = 0; j < NV; j++) rows[i][j] = acc[i][j];
          for (int j = 0; j < NV; j++) {
            for (int i = 0; i < m; i++) store(zt + i * zp + n + j * L, rows[i][j]);
            if (stats) add_rows(stats[task], n + j * L, seen, m, [&](int64_t i) { return rows[i][j]; });
          }
        }
      };
      pointwise_tile<U>(F + t * MR * pitch, pitch, m, K, norm, W, b, scratch, emit);
      seen += m;
    }
    if (stats) stats[task].count = seen;
  });
}

// Inference: z[P, bp] = activation(act(norm(F[:, :K])) * W + bias), what follows the product folded into W and bias [b].
template <class U, class S, class A>
void pointwise_activated(const Parallel& parallel, int tasks, int64_t P, const S* F, int64_t pitch, int64_t K, const Affine<Acc<U>>& norm,
                         const Unit<U>* W, const Acc<U>* bias, int64_t b, S* z, int64_t zp, const A& activation) {
  using T = Acc<U>;
  constexpr int MR = TILE_ROWS, L = LANES<T>;
  int64_t tiles = ceil_div(P, MR);
  for_tasks(parallel, tasks, [&](int task) {
    Frame frame;
    TileRegisters<U> registers;
    PointwiseScratch<U> scratch(frame, b);
    Range r = share(tiles, task, tasks);
    for (int64_t t = r.begin; t < r.end; t++) {
      int m = int(min64(MR, P - t * MR));
      S* zt = z + t * MR * zp;
      pointwise_tile<U>(F + t * MR * pitch, pitch, m, K, norm, W, b, scratch, [&](int64_t n, const auto& acc) __attribute__((always_inline)) {
        constexpr int NV = int(sizeof(acc[0]) / sizeof(acc[0][0]));
        CSP_UNROLL(2) for (int j = 0; j < NV; j++) {
          Vec<T> shift = load(bias + n + j * L);
          CSP_UNROLL(16) for (int i = 0; i < MR; i++)
            if (i < m) store(zt + i * zp + n + j * L, activation.value(acc[i][j] + shift), b - n - j * L);
        }
      });
    }
  });
}

// Units of M pixels in the order of wgrad: on tiles, whole ones.
template <class U> CSP_INLINE int64_t pixel_units(int64_t M) { return TILES<U> ? round_up(M / U::DEPTH, 16) : M / U::DEPTH; }
// Of a buffer of M pixels that is read in either order.
template <class U> CSP_INLINE int64_t pixel_room(int64_t M) { return max64(M, pixel_units<U>(M)); }
// L rows of dW += by_pixel^T a (FIRST: =) for NV vectors of columns; a: [vector][units][L].
template <class U, int NV, bool FIRST> CSP_INLINE void wgrad_panel(const Unit<U>* by_pixel, const Unit<U>* a, int64_t units, Acc<U>* dW, int64_t ldw) {
  constexpr int L = LANES<Acc<U>>;
  const Unit<U>* a1 = NV > 1 ? a + units * L : a;
  if constexpr (TILES<U>) tile_outer_product<U, NV, FIRST>(by_pixel, a, a1, units, dW, ldw);
  else for (int row = 0; row < L; row += WROWS<Acc<U>>) outer_product<U, WROWS<Acc<U>>, NV, FIRST>(by_pixel + row, a, a1, units, dW + row * ldw, ldw);
}
// first: dW begins here; one: of the one vector of columns that is left.
template <class U> CSP_INLINE void wgrad_panel(const Unit<U>* by_pixel, const Unit<U>* a, int64_t units, Acc<U>* dW, int64_t ldw, bool first, bool one) {
  if (one) first ? wgrad_panel<U, 1, true>(by_pixel, a, units, dW, ldw) : wgrad_panel<U, 1, false>(by_pixel, a, units, dW, ldw);
  else first ? wgrad_panel<U, 2, true>(by_pixel, a, units, dW, ldw) : wgrad_panel<U, 2, false>(by_pixel, a, units, dW, ldw);
}
// to [n] = the sum over tasks of what lies at `at` in their weight gradients, padded to a vector.
template <class T> CSP_INLINE void add_weights(const PartialSums<T>* parts, int tasks, int64_t at, int64_t n, T* to) {
  for (int64_t c = 0; c < n; c += LANES<T>) {
    Vec<T> sum = load(parts[0].weight + at + c);
    for (int t = 1; t < tasks; t++) sum += load(parts[t].weight + at + c);
    store(to + c, sum, n - c);
  }
}
// On tiles: nothing is where M pixels fill no whole tile.
template <class U> CSP_INLINE void clear_tail(Unit<U>* rows, int64_t vectors, int64_t M) {
  constexpr int L = LANES<Acc<U>>;
  const int64_t units = pixel_units<U>(M), used = M / U::DEPTH;
  for (int64_t v = 0; units > used && v < vectors; v++) memset(rows + (v * units + used) * L, 0, size_t((units - used) * L) * sizeof(Unit<U>));
}

// Rows of a gradient, value(pixel, column), m pixels from p0 on, M with padding: by_channel for dgrad, by_pixel for wgrad
// (the same where a unit is one value), each [vector of channels][unit of pixels][LANES] and on tiles its blocks transposed. Few
// rows at a time, so that each is read once.
template <class U, class Value>
CSP_INLINE void pack_gradient(const Value& value, int64_t columns, int64_t p0, int64_t m, int64_t M, Unit<U>* by_channel, Unit<U>* by_pixel) {
  using T = Acc<U>;
  constexpr int MR = TILE_ROWS, L = LANES<T>, D = U::DEPTH;
  const int64_t units = pixel_units<U>(M);
  auto at = [&](int64_t i, int64_t n) __attribute__((always_inline)) { return i < m && n < columns ? value(p0 + i, n) : Vec<T>{}; };
  for (int64_t row = 0; row < M; row += MR)
    for (int64_t c = 0; c < columns; c += L * D) {
      Unit<U>* to = by_channel + c / (L * D) * M * L;
      for (int64_t i = row; i < row + MR; i += D) {
        if constexpr (D == 1) { store(to + i * L, at(i, c)); continue; }
        Vec<T> v[2][2] = {{at(i, c), at(i, c + L)}, {at(i + 1, c), at(i + 1, c + L)}};
        store(to + i * L, U::join(v[0][0], v[0][1])), store(to + (i + 1) * L, U::join(v[1][0], v[1][1]));
        store(by_pixel + (c / L * units + i / 2) * L, U::join(v[0][0], v[1][0]));
        if (c + L < columns) store(by_pixel + ((c / L + 1) * units + i / 2) * L, U::join(v[0][1], v[1][1]));
      }
    }
  if constexpr (TILES<U>) {
    const int64_t vectors = ceil_div(columns, L);
    clear_tail<U>(by_pixel, vectors, M);
    for (int64_t block = 0; block < vectors * units * L; block += L * L) transpose_units<U>(by_pixel + block);
  }
}

// dz = dn + (z - mean) * slope + offset, the gradient before the second normalisation; dn: times its scale. owes: else dz = dn.
template <class T> struct BottleneckGradient { const T *mean, *slope, *offset; bool owes; };

template <class U, class S> struct PointwiseBackward {
  using T = Acc<U>;
  static constexpr int MR = TILE_ROWS, L = LANES<T>, D = U::DEPTH, ROWS = MR * 8;
  static constexpr int64_t CHUNK = 384 * 4 / int64_t(sizeof(T));
  const S *F, *G_in;            // [P, pitch]
  S* G;                         // [P, pitch]: G = G_in + scale * dn1
  int64_t P, pitch, K, b, zp;
  const Affine<T>& norm;
  const S *dn, *z;              // [P, zp]
  BottleneckGradient<T> dz;
  const Unit<U>* Wt;            // pack_product, reduction over b, channels K
  int64_t Kp;                   // pitch of dW
  const PartialSums<T>* parts;  // a task: dW1 [rows][Kp], sums [Kp] of dn1 and of dn1 * (x - mean)
  int64_t rows = zp;            // b rounded up to 16
  bool wgrad = true;

  // dz of M rows, m of them real: by_channel for dgrad, by_pixel for wgrad (the same where a unit is one value).
  void pack_dz(int64_t p0, int64_t m, int64_t M, Unit<U>* by_channel, Unit<U>* by_pixel) const {
    auto pack = [&](auto load_some) __attribute__((always_inline)) {
      pack_gradient<U>([&](int64_t pixel, int64_t k) __attribute__((always_inline)) {
        int64_t o = pixel * zp + k;
        Vec<T> d = load_some(dn + o, k);
        return dz.owes ? d + ((load_some(z + o, k) - load(dz.mean + k)) * load(dz.slope + k) + load(dz.offset + k)) : d;
      }, round_up(b, L), p0, m, M, by_channel, by_pixel);
    };
    if (b % L == 0) pack([](const S* p, int64_t) __attribute__((always_inline)) { return load(p); });
    else pack([&](const S* p, int64_t k) __attribute__((always_inline)) { return load(p, b - k); });
  }

  // One tile of dgrad for NV vectors of channels from k on; leaves act(norm(F)) for wgrad in a[j][row][LANES].
  template <int NV>
  CSP_NOINLINE void dgrad_panel(const Unit<U>* A, int64_t a_step, int64_t blocks, int64_t p, int rows, int64_t k, Unit<U>* a,
                                int64_t aj, const PartialSums<T>& part) const {
    Vec<T> acc[MR][NV];
    const S *f0 = F + p * pitch + k, *g0 = G_in + p * pitch + k;
    S* o0 = G + p * pitch + k;
    if (rows == MR) CSP_UNROLL(16) for (int i = 0; i < MR; i++) {
      __builtin_prefetch(f0 + i * pitch), __builtin_prefetch(g0 + i * pitch, 1);
      if (NV > 1 && sizeof(S) > 2) __builtin_prefetch(f0 + i * pitch + L), __builtin_prefetch(g0 + i * pitch + L, 1);
    }
    const Unit<U>* B = Wt + (k / (2 * L)) * blocks * L * 2 * L;
    if constexpr (TILES<U>) tile_product<U, NV>(reinterpret_cast<T*>(acc), A, a_step, B, blocks, true);
    else clear(acc), product<U>(acc, A, a_step, B, blocks);
    CSP_UNROLL(2) for (int j = 0; j < NV; j++) {
      int64_t c = k + j * L, n = K - c;
      Vec<T> mean = load(norm.mean + c), scale = load(norm.scale + c), shift = load(norm.shift + c);
      Vec<T> sum{}, sum_x{}, sum1{}, sum_x1{};  // of this tile: short sums lose less
      const S *f = f0 + j * L, *g = g0 + j * L;
      S* o = o0 + j * L;
      auto row = [&](Vec<T> x, Vec<T> gin, Vec<T> da, Vec<T>& s, Vec<T>& sx, Vec<T>& g_out) __attribute__((always_inline)) {
        Vec<T> centred = x - mean, pre = centred * scale + shift, d = act_gradient<T>(pre, da);
        s += d, sx += d * centred, g_out = gin + d * scale;
        return act<T>(pre);
      };
      if (rows == MR && n >= L) {
        CSP_UNROLL(8) for (int i = 0; i < MR; i += 2) {
          Vec<T> u, v;
          Vec<T> a0 = row(load(f + i * pitch), load(g + i * pitch), acc[i][j], sum, sum_x, u);
          Vec<T> a1 = row(load(f + (i + 1) * pitch), load(g + (i + 1) * pitch), acc[i + 1][j], sum1, sum_x1, v);
          store(o + i * pitch, u), store(o + (i + 1) * pitch, v);
          if constexpr (D == 1) store(a + j * aj + i * L, a0), store(a + j * aj + (i + 1) * L, a1);
          else store(a + j * aj + i / 2 * L, U::join(a0, a1));
        }
      } else {
        Vec<T> da[MR], act_rows[MR];
        CSP_UNROLL(16) for (int i = 0; i < MR; i++) da[i] = acc[i][j], act_rows[i] = Vec<T>{};
        for (int i = 0; i < rows; i++) {
          Vec<T> u;
          act_rows[i] = row(load(f + i * pitch, n), load(g + i * pitch, n), da[i], sum, sum_x, u);
          store(o + i * pitch, u, n);
        }
        for (int i = 0; i < MR; i += D) store(a + j * aj + i / D * L, U::join(act_rows[i], act_rows[i + D - 1]));
      }
      store(part.sum + c, load(part.sum + c) + (sum + sum1)), store(part.sum_x + c, load(part.sum_x + c) + (sum_x + sum_x1));
    }
  }

  void run(const Parallel& parallel, int tasks) const {
    int64_t tiles = ceil_div(P, MR), blocks = ceil_div(b, depth_block<U>());
    for_tasks(parallel, tasks, [&](int task) {
      Frame frame;
      TileRegisters<U> registers;
      const PartialSums<T>& part = parts[task];
      part.clear(0, Kp);
      Range r = share(tiles, task, tasks);
      int64_t chunks = ceil_div(K, CHUNK), chunk = round_up(ceil_div(K, chunks), 2 * L);
      Unit<U>* by_channel = frame.take<Unit<U>>(round_up(rows, L * D) * ROWS);
      Unit<U>* by_pixel = D == 1 ? by_channel : frame.take<Unit<U>>(round_up(rows, L * D) * pixel_room<U>(ROWS));
      Unit<U>* a = frame.take<Unit<U>>((chunk + 2 * L) * pixel_room<U>(ROWS));
      for (int64_t k0 = 0; k0 < K; k0 += chunk) {
        int64_t k1 = min64(K, k0 + chunk);
        for (int64_t t = r.begin; t < r.end; t += 8) {
          int64_t nt = min64(8, r.end - t), M = nt * MR, p0 = t * MR, units = pixel_units<U>(M);
          pack_dz(p0, min64(M, P - p0), M, by_channel, by_pixel);
          for (int64_t q = 0; q < nt; q++)
            for (int64_t k = k0; k < k1; k += 2 * L) {
              int m = int(min64(MR, P - p0 - q * MR));
              Unit<U>* aq = a + (k - k0) * units + q * MR / D * L;
              if (K - k > L) dgrad_panel<2>(by_channel + q * MR * L, M * L, blocks, p0 + q * MR, m, k, aq, units * L, part);
              else dgrad_panel<1>(by_channel + q * MR * L, M * L, blocks, p0 + q * MR, m, k, aq, units * L, part);
            }
          if (wgrad) clear_tail<U>(a, ceil_div(k1 - k0, L), M);
          for (int64_t k = k0; wgrad && k < k1; k += 2 * L)
            for (int64_t n = 0; n < b; n += L)
              wgrad_panel<U>(by_pixel + n * units, a + (k - k0) * units, units, part.weight + n * Kp + k, Kp, t == r.begin, K - k <= L);
        }
      }
    });
  }

  // dW1 [b][K], the tasks' sums.
  void weight_gradient(const Parallel& parallel, int tasks, T* dw) const {
    for_tasks(parallel, tasks, [&](int task) {
      Range r = share(b, task, tasks);
      for (int64_t n = r.begin; n < r.end; n++) add_weights(parts, tasks, n * Kp, K, dw + n * K);
    });
  }
};

}  // namespace csp::CSP_ISA
