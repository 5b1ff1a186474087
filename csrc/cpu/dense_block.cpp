// The dense block on the CPU: forward, backward with deferred batch-norm correction, and inference. Compiled once per
// instruction set (CSP_ISA names the namespace); docs/algorithms.md has the mathematics.
#include "dense_block.h"
#include "tile/conv3x3.h"
#include "tile/fused_layer.h"
#include "tile/norm.h"
#include "tile/pointwise.h"
#include "tile/storage.h"

namespace csp::CSP_ISA {
namespace {

template <class S, int M> struct Block {
  using T = typename Types<S>::T;
  using U = typename Types<S>::Product;
  static constexpr int L = LANES<T>, E = (M + 2) * (M + 2);
  const DenseBlock& a;
  Frame frame;
  const int64_t P = a.pixels(), C = a.channels(), b = a.bottleneck, g = a.growth, zp = a.z_pitch();
  const double flops = 2.0 * double(P) * double(b) * double(a.in_channels + 9 * g);
  const int tasks1 = choose_tasks(a.parallel, ceil_div(P, TILE_ROWS), flops);
  const int tasks3 = choose_tasks(a.parallel, Tiling<M>(a.N, a.H, a.W).rows, flops);
  S* F = static_cast<S*>(a.features);

  explicit Block(const DenseBlock& args) : a(args) {}

  const T* weight(const void* p) const { return static_cast<const T*>(p); }
  Moments<T> moments1(int64_t l) const {
    const DenseLayer& p = a.layers[l];
    return {a.mean, a.var, weight(p.mean1), weight(p.var1), p.eps1};
  }
  Moments<T> moments2(int64_t l) const {
    const DenseLayer& p = a.layers[l];
    return {a.mean + C + l * b, a.var + C + l * b, weight(p.mean2), weight(p.var2), p.eps2};
  }
  bool features_need_statistics() const {
    if (a.features_read) return true;
    for (int64_t l = 0; l < a.num_layers; l++) if (!a.layers[l].mean1) return true;
    return false;
  }
  // F[:, :c0] = x, and its statistics.
  void copy_input(bool collect) {
    const S* x = static_cast<const S*>(a.x);
    int64_t c0 = a.in_channels, tiles = ceil_div(P, 16);
    int tasks = choose_tasks(a.parallel, tiles, 16.0 * double(P * c0));
    Frame inner;
    Statistics<T>* stats = take_statistics<T>(inner, tasks, c0);
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(tiles, task, tasks);
      int64_t seen = 0;
      for (int64_t t = r.begin; t < r.end; t++) {
        int64_t m = min64(16, P - t * 16);
        const S* xt = x + t * 16 * a.x_pitch;
        for (int64_t i = 0; i < m; i++) memcpy(static_cast<void*>(F + (t * 16 + i) * C), xt + i * a.x_pitch, size_t(c0) * sizeof(S));
        for (int64_t c = 0; collect && c < c0; c += L)
          add_rows(stats[task], c, seen, m, [&](int64_t i) __attribute__((always_inline)) { return load(xt + i * a.x_pitch + c, c0 - c); });
        seen += m;
      }
      stats[task].count = seen;
    });
    if (collect) merge(a.parallel, stats, tasks, x, a.x_pitch, P, c0, a.mean, a.var);
  }

  // Weights of one layer in the order the products read them, packed just before use so that they are in cache.
  Weights3x3<T> weights3x3(int64_t l) const { return {g, b, a.layers[l].w2_channels_last}; }
  struct Packed { Unit<U>* w1; T* w2; };
  Packed take_packed() {
    int64_t K = a.prefix(a.num_layers - 1);
    return {frame.take<Unit<U>>(max64(packed_size<U>(K, b), packed_size<U>(b, K))),
            frame.take<T>(max64(winograd_size<T, M>(b, g), winograd_size<T, M>(g, b)))};
  }
  // TRANSPOSED: for backward. scale: null, or a factor for each channel of the 1x1.
  template <bool TRANSPOSED> void pack(const Packed& packed, int64_t l, const T* scale = nullptr) {
    const DenseLayer& p = a.layers[l];
    int64_t K = a.prefix(l), depth1 = TRANSPOSED ? b : K, channels1 = TRANSPOSED ? K : b, depth2 = TRANSPOSED ? g : b;
    int64_t blocks1 = ceil_div(depth1, depth_block<U>()), blocks2 = ceil_div(depth2, L);
    int tasks = choose_tasks(a.parallel, blocks1, 60.0 * double(b * (K + E * g)));
    for_tasks(a.parallel, tasks, [&](int task) {
      pack_product<U, !TRANSPOSED>(packed.w1, depth1, channels1, weight(p.w1), scale, share(blocks1, task, tasks));
      pack_winograd<T, M, TRANSPOSED>(packed.w2, weight(p.w2), weights3x3(l), share(blocks2, task, tasks));
    });
  }

  void bottleneck(int64_t l, const Unit<U>* w1, S* z, bool collect) {
    Frame inner;
    int64_t K = a.prefix(l);
    Affine<T> norm(inner, K);
    moments1(l).fill(norm, weight(a.layers[l].gamma1), weight(a.layers[l].beta1), K);
    Statistics<T>* stats = collect ? take_statistics<T>(inner, tasks1, b) : nullptr;
    pointwise_forward<U>(a.parallel, tasks1, P, F, C, K, norm, w1, b, z, zp, stats);
    if (collect) merge(a.parallel, stats, tasks1, z, zp, P, b, a.mean + C + l * b, a.var + C + l * b);
  }

  // z of a layer: kept, or in scratch memory for one.
  S* z_scratch = nullptr;
  S* z_of(int64_t l) {
    if (a.z) return static_cast<S*>(a.z[l]);
    if (!z_scratch) z_scratch = frame.take<S>(P * zp);
    return z_scratch;
  }

  void forward() {
    bool collect = features_need_statistics();
    if (!a.z) z_of(0);
    copy_input(collect);
    Packed packed = take_packed();
    for (int64_t l = 0; l < a.num_layers; l++) {
      const DenseLayer& p = a.layers[l];
      int64_t K = a.prefix(l);
      S* z = z_of(l);
      pack<false>(packed, l);
      bottleneck(l, packed.w1, z, !p.mean2);
      Frame inner;
      Affine<T> norm(inner, b);
      moments2(l).fill(norm, weight(p.gamma2), weight(p.beta2), b);
      Dropout<T> dropout(a.drop_rate, a.seed, l);
      Statistics<T>* stats = collect ? take_statistics<T>(inner, tasks3, g) : nullptr;
      Conv3x3<S> conv{a.parallel, tasks3, a.N, a.H, a.W, b, zp, g, C, norm, dropout};
      conv3x3_forward<M>(conv, z, packed.w2, F + K, stats);
      if (collect) merge(a.parallel, stats, tasks3, F + K, C, P, g, a.mean + K, a.var + K);
    }
  }

  // ---- backward
  double *owed_mean, *owed_slope;  // [C]: gradient = G - owed_mean - (F - mean) * owed_slope
  // Of some channels, as a load-time affine; false: nothing, all their readers are frozen.
  bool owed(const Affine<T>& to, int64_t at, int64_t count) const {
    bool any = false;
    for (int64_t c = 0; c < count; c++) {
      double mean = a.mean[at + c], slope = owed_slope[at + c], offset = owed_mean[at + c];
      any = any || slope != 0 || offset != 0;
      to.mean[c] = T(mean), to.scale[c] = T(slope), to.shift[c] = T(offset - slope * (mean - double(T(mean))));
    }
    return any;
  }

  void add_up(const PartialSums<T>* parts, int tasks, const Moments<T>& m, int64_t n, T* dgamma, T* dbeta) {
    for (int64_t c = 0; c < n; c++) {
      double sum = 0, sum_x = 0;
      for (int t = 0; t < tasks; t++) sum += double(parts[t].sum[c]), sum_x += double(parts[t].sum_x[c]);
      dbeta[c] = T(sum), dgamma[c] = T(m.rstd(c) * (sum_x - m.lost(c) * sum));
    }
  }

  void backward_3x3(int64_t l, const S* G, const T* U2, const S* z, S* dn, PartialSums<T>* parts, const Affine<T>& norm) {
    const DenseLayer& p = a.layers[l];
    Frame inner;
    int64_t K = a.prefix(l), gp = round_up(g, L);
    Affine<T> slice(inner, g);
    bool owes = owed(slice, K, g);
    Dropout<T> dropout(a.drop_rate, a.seed, l);
    Conv3x3<S> conv{a.parallel, tasks3, a.N, a.H, a.W, b, zp, g, C, norm, dropout};
    Conv3x3Backward<M, S> backward{conv, F + K, G + K, {slice.mean, slice.scale, slice.shift, owes}, z, U2, {dn, zp}, gp, parts};
    backward.run();
    backward.finish(static_cast<T*>(p.dw2), weights3x3(l));
    add_up(parts, tasks3, moments2(l), b, static_cast<T*>(p.dgamma2), static_cast<T*>(p.dbeta2));
  }

  void backward_1x1(int64_t l, const S* G_in, S* G, const Unit<U>* w1, const S* z, const S* dn, PartialSums<T>* parts, const Affine<T>& norm2) {
    const DenseLayer& p = a.layers[l];
    Frame inner;
    int64_t K = a.prefix(l), Kp = round_up(K, 2 * L);
    Moments<T> m1 = moments1(l), m2 = moments2(l);
    Affine<T> norm1(inner, K), dz(inner, b);  // dz: mean as slope, shift as offset
    m1.fill(norm1, weight(p.gamma1), weight(p.beta1), K);
    for (int64_t c = 0; c < b && !m2.frozen(); c++) {
      double s = double(weight(p.gamma2)[c]) * m2.rstd(c), slope = -s * m2.rstd(c) * double(static_cast<T*>(p.dgamma2)[c]) / double(P);
      dz.mean[c] = T(slope), dz.shift[c] = T(-s * double(static_cast<T*>(p.dbeta2)[c]) / double(P) - slope * m2.lost(c));
    }
    PointwiseBackward<U, S> backward{F, G_in, G, P, C, K, b, zp, norm1, dn, z, {norm2.mean, dz.mean, dz.shift, !m2.frozen()}, w1, Kp, parts};
    backward.run(a.parallel, tasks1);
    T *dgamma = static_cast<T*>(p.dgamma1), *dbeta = static_cast<T*>(p.dbeta1);
    backward.weight_gradient(a.parallel, tasks1, static_cast<T*>(p.dw1));
    add_up(parts, tasks1, m1, K, dgamma, dbeta);
    for (int64_t c = 0; c < K && !m1.frozen(); c++) {
      double s = double(weight(p.gamma1)[c]) * m1.rstd(c) / double(P);
      owed_mean[c] += s * double(dbeta[c]), owed_slope[c] += s * m1.rstd(c) * double(dgamma[c]);
    }
  }

  // dx = G - owed_mean - (F - mean) * owed_slope
  void input_gradient(const S* G) {
    int64_t c0 = a.in_channels;
    S* dx = static_cast<S*>(a.dx);
    Frame inner;
    Affine<T> input(inner, c0);
    bool owes = owed(input, 0, c0);
    int tasks = choose_tasks(a.parallel, P, 16.0 * double(P * c0));
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(P, task, tasks);
      for (int64_t i = r.begin; i < r.end; i++)
        for (int64_t c = 0; c < c0; c += L) {
          Vec<T> d = load(G + i * C + c, c0 - c);
          if (owes) d -= (load(F + i * C + c, c0 - c) - load(input.mean + c)) * load(input.scale + c) + load(input.shift + c);
          store(dx + i * a.dx_pitch + c, d, c0 - c);
        }
    });
  }

  void backward() {
    int64_t gp = round_up(g, L), Kmax = round_up(a.prefix(a.num_layers - 1), 2 * L) + 2 * L;
    owed_mean = frame.zeroed<double>(C), owed_slope = frame.zeroed<double>(C);
    if (a.owed) memcpy(owed_mean, a.owed, size_t(C) * sizeof(double)), memcpy(owed_slope, a.owed + C, size_t(C) * sizeof(double));
    Packed packed = take_packed();
    PartialSums<T>* parts3 = PartialSums<T>::take(frame, tasks3, E * zp * gp, zp + 2 * L);
    PartialSums<T>* parts1 = PartialSums<T>::take(frame, tasks1, zp * Kmax, Kmax);
    S *G = frame.take<S>(P * C), *dn = frame.take<S>(P * zp);
    if (!a.z) z_of(0);
    const S* source = static_cast<const S*>(a.grad_features);
    for (int64_t l = a.num_layers - 1; l >= 0; l--, source = G) {
      const DenseLayer& p = a.layers[l];
      S* z = z_of(l);
      if (!a.z) pack<false>(packed, l), bottleneck(l, packed.w1, z, false);
      pack<true>(packed, l);
      Frame inner;
      Affine<T> norm2(inner, b);
      moments2(l).fill(norm2, weight(p.gamma2), weight(p.beta2), b);
      backward_3x3(l, source, packed.w2, z, dn, parts3, norm2);
      backward_1x1(l, source, G, packed.w1, z, dn, parts1, norm2);
    }
    input_gradient(G);
  }

  // ---- inference: everything folded, z stays in cache
  void inference() {
    // Fused, each task computes the bottleneck at its edges once more: too much where it has but a few rows.
    if (tasks3 > 1 && Tiling<M>(a.N, a.H, a.W).rows < 4 * tasks3) return forward();
    copy_input(false);
    Packed packed = take_packed();
    T *scale = frame.zeroed<T>(zp + 2 * L), *bias = frame.zeroed<T>(zp + 2 * L);
    for (int64_t l = 0; l < a.num_layers; l++) {
      const DenseLayer& p = a.layers[l];
      Frame inner;
      int64_t K = a.prefix(l);
      Affine<T> norm(inner, K);
      moments1(l).fill(norm, weight(p.gamma1), weight(p.beta1), K);
      Moments<T> m = moments2(l);  // folded into the 1x1
      for (int64_t c = 0; c < b; c++) {
        double s = double(weight(p.gamma2)[c]) * m.rstd(c);
        scale[c] = T(s), bias[c] = T(double(weight(p.beta2)[c]) - m.centre(c) * s);
      }
      pack<false>(packed, l, scale);
      FusedLayer<M, U, S>{a.parallel, tasks3, a.N, a.H, a.W, K, b, g, C, norm, packed.w1, bias, packed.w2}.run(F);
    }
  }
};

template <class S, class F> void with_tiles(const DenseBlock& a, F f) {
  if constexpr (sizeof(S) < 8) if (large_tiles(a.H, a.W, a.winograd)) { Block<S, 4> block(a); f(block); return; }
  Block<S, 2> block(a);
  f(block);
}
template <class F> void with_types(const DenseBlock& a, F f) {
  with_storage(a.storage, [&](auto s) { with_tiles<decltype(s)>(a, f); });
}

}  // namespace

extern const DenseBlockKernels dense_block_kernels;
const DenseBlockKernels dense_block_kernels = {
    [](const DenseBlock& a) { with_types(a, [](auto& block) { block.forward(); }); },
    [](const DenseBlock& a) { with_types(a, [](auto& block) { block.backward(); }); },
    [](const DenseBlock& a) { with_types(a, [](auto& block) { block.inference(); }); },
};

}  // namespace csp::CSP_ISA
