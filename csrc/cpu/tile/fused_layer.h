// A whole dense layer of inference: normalisation, 1x1, activation, 3x3, the bottleneck only ever in cache.
#pragma once
#include "conv3x3.h"
#include "pointwise.h"

namespace csp::CSP_ISA {

template <int M, class U, class S> struct FusedLayer {
  using T = Acc<U>;
  static constexpr int MR = TILE_ROWS, L = LANES<T>, E = (M + 2) * (M + 2);
  const Parallel& parallel;
  int tasks;
  int64_t N, H, W, K, b, g, pitch, to_pitch;  // pixels of F and of what is written are so far apart
  const Affine<T>& norm;
  const Unit<U>* w1;   // pack_product, second normalisation folded in
  const T* bias;       // [b]
  const T* w2;         // WinogradWeights
  Tiling<M> tl{N, H, W, b * g};

  // Rows of h kept: a power of two of image rows, counted over all images.
  struct Ring {
    T* rows;
    int64_t pixels, pitch;
    T* at(int64_t pixel) const { return rows + pixel % pixels * pitch; }
  };

  // h = relu(act(norm(F)) W1 + bias) for pixels begin..end
  void bottleneck(const S* F, int64_t begin, int64_t end, const PointwiseScratch<U>& scratch, const Ring& ring) const {
    for (int64_t p = begin; p < end;) {
      int64_t to_wrap = ring.pixels - p % ring.pixels;
      int m = int(min64(min64(MR, end - p), to_wrap));
      T* h = ring.at(p);
      auto emit = [&](int64_t n, const auto& acc) __attribute__((always_inline)) {
        constexpr int NV = int(sizeof(acc[0]) / sizeof(acc[0][0]));
        Vec<T> shift[2] = {load(bias + n), NV > 1 ? load(bias + n + L) : Vec<T>{}};
        CSP_UNROLL(16) for (int i = 0; i < MR; i++)
          if (i < m) CSP_UNROLL(2) for (int j = 0; j < NV; j++) store(h + i * ring.pitch + n + j * L, act<T>(acc[i][j] + shift[j]));
      };
      pointwise_tile<U>(F + p * pitch, pitch, m, K, norm, w1, b, scratch, emit);
      p += m;
    }
  }

  // to[P][g] = the 3x3 of F[P][K]
  void run(const S* F, S* to) const {
    int64_t batch = tl.batch(), Tp = round_up(batch * tl.TW, MR), blocks = ceil_div(b, L), hp = round_up(b, 2 * L);
    int64_t ring_rows = 4;
    while (ring_rows < batch * M + 4) ring_rows *= 2;
    for_tasks(parallel, tasks, [&](int task) {
      Frame frame;
      PointwiseScratch<U> scratch(frame, b);
      Ring ring{frame.take<T>(ring_rows * W * hp), ring_rows * W, hp};
      T* V = frame.take<T>(E * blocks * Tp * L);
      T* Mb = frame.take<T>(E * Tp * 2 * L);
      Vec<T>* columns = frame.take<Vec<T>>((tl.TW * M + 2) * (M + 2));
      Range r = share(tl.rows, task, tasks);
      int64_t done = 0;
      for (int64_t row = r.begin; row < r.end; row += batch) {
        int64_t nr = min64(batch, r.end - row), last = row + nr - 1;
        int64_t from = tl.image(row) + max64(0, tl.y(row) - 1) * W, end = tl.image(last) + min64(H, tl.y(last) + M + 1) * W;
        bottleneck(F, max64(done, from), end, scratch, ring);
        done = end;
        for (int64_t q = 0; q < nr; q++)
          for (int64_t k = 0; k < blocks; k++) {
            int64_t image = tl.image(row + q);
            transform_row<T, M>(tl, tl.y(row + q), columns, V + (k * Tp + q * tl.TW) * L, blocks * Tp * L,
                                [&](int64_t y, int64_t x) __attribute__((always_inline)) { return load(ring.rows + (((image / W + y) & (ring_rows - 1)) * W + x) * hp + k * L); });
          }
        for (int64_t p = 0; p < panels<T>(g); p++) {
          int nv = panel_vectors<T>(g, p);
          winograd_products<T, M>(V, Tp, nr * tl.TW, blocks, w2 + p * E * part_size<T>(blocks * L * 2), nv, Mb);
          for (int j = 0; j < nv; j++) write_back(to, row, nr, p * 2 * L + j * L, Mb + j * L, Tp * nv * L, nv * L);
        }
      }
    });
  }

  void write_back(S* to, int64_t row, int64_t nr, int64_t ch, const T* Mb, int64_t e_step, int64_t t_step) const {
    for (int64_t q = 0; q < nr; q++)
      for (int64_t tx = 0; tx < tl.TW; tx++) {
        int64_t y0 = tl.y(row + q), x0 = tx * M, ym = H - y0, xm = W - x0, n = g - ch;
        S* o = to + (tl.image(row + q) + y0 * W + x0) * to_pitch + ch;
        Vec<T> y[M][M];
        untransform<T, M>(Mb + (q * tl.TW + tx) * t_step, e_step, y);
        CSP_UNROLL(4) for (int u = 0; u < M; u++) CSP_UNROLL(4) for (int v = 0; v < M; v++)
          if (u < ym && v < xm) store(o + (u * W + v) * to_pitch, y[u][v], n);
      }
  }
};

}  // namespace csp::CSP_ISA
