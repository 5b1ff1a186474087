// Dense layers in the order convolution, batch norm, ReLU, with one branch or PeleeNet's two. What is kept are the raw
// outputs of the convolutions; every reader applies norm and ReLU on load, and x is read where it lies.
#include "post_dense_block.h"
#include "tile/activate.h"
#include "tile/conv3x3.h"
#include "tile/storage.h"

namespace csp::CSP_ISA {
namespace {

template <class S, int M> struct PostBlock {
  using T = typename Types<S>::T;
  static constexpr int L = LANES<T>, E = (M + 2) * (M + 2);
  const PostDenseBlock& a;
  Frame frame;
  const int64_t P = a.pixels(), C = a.grown(), widest = a.bottleneck, g = a.growth, zp = a.z_pitch(), mp = a.middle_pitch();
  const Grid grid{a.N, a.H, a.W, false};
  const int tasks3 = choose_tasks(a.parallel, Tiling<M>(a.N, a.H, a.W).rows, 18.0 * double(P) * double(widest) * double(g));
  const Dropout<T> no_dropout{0, 0, 0};
  S* F = static_cast<S*>(a.features);
  S* G = static_cast<S*>(a.G);
  Affine<T> features{frame, C};  // of the slices, filled as their statistics come
  T* packed = frame.take<T>(max64(max64(winograd_size<T, M>(widest, g), winograd_size<T, M>(g, widest)), winograd_size<T, M>(g, g)));
  S *z_scratch = nullptr, *middle_scratch = nullptr;

  explicit PostBlock(const PostDenseBlock& args) : a(args) {
    if (!a.z) z_scratch = frame.take<S>(P * zp);
    if (mp && !a.middle) middle_scratch = frame.take<S>(P * mp);
  }
  bool padded() const {  // some columns of z belong to no channel
    for (int64_t l = 0; l < a.num_layers; l++) if (width(l) % 16) return true;
    return false;
  }
  int64_t width(int64_t l) const { return a.layers[l].bottleneck; }
  int64_t second_branch(int64_t l) const { return padded_channels(width(l)); }  // its first column of z
  S* z_of(int64_t l) const { return a.z ? static_cast<S*>(a.z[l]) : z_scratch; }
  S* middle_of(int64_t l) const { return a.middle ? static_cast<S*>(a.middle[l]) : middle_scratch; }
  Affine<T> filled(Frame& f, const BatchNorm& n, int64_t count) const {
    Affine<T> norm(f, count);
    Norm<T>{n}.fill(norm, count);
    return norm;
  }
  void fill_features(int64_t slice) const { Norm<T>{a.norm(slice)}.fill(features.from(slice * g), g); }

  // What layer l reads: x as it is, and the slices before it.
  struct Inputs {
    Segment<S> s[2];
    int64_t count;
  };
  Inputs inputs(int64_t l) const {
    Inputs in{{segment<S>(a.x, nullptr), {F, C, l * a.branches * g, &features, G, C, 0}}, l ? 2 : 1};
    for (Segment<S>& s : in.s) s.g_in = s.g, s.g_in_pitch = s.g_pitch;
    return in;
  }
  int64_t reads(int64_t l) const { return a.x.channels + l * a.branches * g; }

  const T* stacked(Frame& f, int64_t l) const {  // the 1x1 weights of all branches, [branches * b, K]
    const PostLayer& p = a.layers[l];
    if (a.branches == 1) return static_cast<const T*>(p.reduce[0].weight);
    int64_t n = width(l) * reads(l);
    T* w = f.take<T>(2 * n);
    for (int i = 0; i < 2; i++) memcpy(w + i * n, p.reduce[i].weight, size_t(n) * sizeof(T));
    return w;
  }

  // ---- forward
  void reduce(int64_t l, bool collect) {
    Frame inner;
    const PostLayer& p = a.layers[l];
    const int64_t b = width(l), splits[2] = {b, b};
    Inputs in = inputs(l);
    Mix<S> mix(a.parallel, grid, in.s, in.count, {splits, a.branches});
    for (int i = 0; i < a.branches; i++) collect = collect && !(p.reduce[0].norm.running_mean && p.reduce[a.branches - 1].norm.running_mean);
    Statistics<T>* stats = collect ? take_statistics<T>(inner, mix.tasks, mix.O) : nullptr;
    mix.forward_raw(mix.template packed<false>(inner, stacked(inner, l)), z_of(l), zp, mix.O, stats);
    if (!collect) return;
    double* both = inner.take<double>(4 * b);
    mix.merge(stats, z_of(l), zp, both, both + 2 * b);
    for (int i = 0; i < a.branches; i++) {
      memcpy(p.reduce[i].norm.mean, both + i * b, size_t(b) * sizeof(double));
      memcpy(p.reduce[i].norm.var, both + (2 + i) * b, size_t(b) * sizeof(double));
    }
  }
  // to = 3x3 of relu(norm(from)); statistics for the norm that follows.
  void conv(const ConvNorm& c, int64_t channels, const S* from, int64_t from_pitch, const BatchNorm& before, S* to, int64_t to_pitch, bool collect) {
    Frame inner;
    Affine<T> norm = filled(inner, before, channels);
    pack<false>(c, channels);
    Statistics<T>* stats = collect && !c.norm.running_mean ? take_statistics<T>(inner, tasks3, g) : nullptr;
    Conv3x3<S> shape{a.parallel, tasks3, a.N, a.H, a.W, channels, from_pitch, g, to_pitch, norm, no_dropout};
    conv3x3_forward<M>(shape, from, packed, to, stats);
    if (stats) merge(a.parallel, stats, tasks3, to, to_pitch, P, g, c.norm.mean, c.norm.var);
  }
  template <bool TRANSPOSED> void pack(const ConvNorm& c, int64_t channels) {
    int64_t blocks = ceil_div(TRANSPOSED ? g : channels, L);
    int tasks = choose_tasks(a.parallel, blocks, 60.0 * double(channels * E * g));
    for_tasks(a.parallel, tasks, [&](int task) {
      pack_winograd<T, M, TRANSPOSED>(packed, static_cast<const T*>(c.weight), {g, channels, c.channels_last}, share(blocks, task, tasks));
    });
  }
  void middle(int64_t l, bool collect) {
    const PostLayer& p = a.layers[l];
    S* m = middle_of(l);
    for (int64_t i = 0; g < mp && i < P; i++) memset(static_cast<void*>(m + i * mp + g), 0, size_t(mp - g) * sizeof(S));
    conv(p.first[1], width(l), z_of(l) + second_branch(l), zp, p.reduce[1].norm, m, mp, collect);
  }
  void forward() {
    for (int64_t l = 0; l < a.num_layers; l++) {
      const PostLayer& p = a.layers[l];
      S* slice = F + l * a.branches * g;
      reduce(l, true);
      conv(p.first[0], width(l), z_of(l), zp, p.reduce[0].norm, slice, C, true);
      fill_features(l * a.branches);
      if (a.branches == 1) continue;
      middle(l, true);
      conv(p.second, g, middle_of(l), mp, p.first[1].norm, slice + g, C, true);
      fill_features(l * 2 + 1);
    }
    if (a.y.dx) write_output();
  }
  void write_output() {
    S* y = static_cast<S*>(a.y.dx);
    const S* x = static_cast<const S*>(a.x.x);
    int tasks = choose_tasks(a.parallel, P, 8.0 * double(P * a.x.channels));
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(P, task, tasks);
      for (int64_t i = r.begin; i < r.end; i++) memcpy(static_cast<void*>(y + i * a.y.dx_pitch), x + i * a.x.pitch, size_t(a.x.channels) * sizeof(S));
    });
    Output<S> out{y + a.x.channels, a.y.dx_pitch};
    activate(a.parallel, grid, F, C, features, Splits{&C, 1}, &out, Relu<T>{});
  }

  // ---- backward
  void read_output_gradient() {  // G, the sums, and dx of y's first channels
    const S* dy = static_cast<const S*>(a.y.x);
    S* dx = static_cast<S*>(a.x.dx);
    int tasks = choose_tasks(a.parallel, P, 16.0 * double(P * a.channels()));
    PartialSums<T>* sums = PartialSums<T>::take(frame, tasks, 0, round_up(C, 16) + 16);
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(P, task, tasks);
      sums[task].clear(0, round_up(C, 16));
      for (int64_t p = r.begin; p < r.end; p += 32) {  // short sums lose less than long ones
        int64_t end = min64(p + 32, r.end);
        for (int64_t i = p; i < end; i++) memcpy(static_cast<void*>(dx + i * a.x.dx_pitch), dy + i * a.y.pitch, size_t(a.x.channels) * sizeof(S));
        for (int64_t c = 0; c < C; c += L) read_output_gradient(p, end, c, sums[task]);
      }
    });
    for (int64_t s = 0; s < a.slices(); s++) Norm<T>{a.norm(s)}.add_up(sums, tasks, s * g, g);
  }
  void read_output_gradient(int64_t begin, int64_t end, int64_t c, const PartialSums<T>& sums) const {
    const S* dy = static_cast<const S*>(a.y.x) + a.x.channels + c;
    Vec<T> mean = load(features.mean + c), scale = load(features.scale + c), shift = load(features.shift + c), sum{}, sum_x{};
    int64_t n = C - c;
    for (int64_t i = begin; i < end; i++) {
      Vec<T> centred = load(F + i * C + c, n) - mean, dn = act_gradient<T>(centred * scale + shift, load(dy + i * a.y.pitch, n));
      store(G + i * C + c, dn * scale, n);
      sum += dn, sum_x += dn * centred;
    }
    store(sums.sum + c, load(sums.sum + c) + sum), store(sums.sum_x + c, load(sums.sum_x + c) + sum_x);
  }
  // Back through one 3x3: from the gradient of its raw output `out` (G form, norm c.norm) to that of what it reads.
  void unconv(const ConvNorm& c, int64_t channels, const S* from, int64_t from_pitch, const BatchNorm& before, const S* out, const S* dout,
              int64_t out_pitch, S* dfrom) {
    Frame inner;
    Affine<T> norm = filled(inner, before, channels);
    Norm<T> after{c.norm}, reads{before};
    Affine<T> owed(inner, g);
    for (int64_t k = 0; k < g; k++) {
      double slope = after.owed_slope(k, P);
      owed.mean[k] = T(after.moments.centre(k)), owed.scale[k] = T(slope), owed.shift[k] = T(after.owed_mean(k, P) - slope * after.moments.lost(k));
    }
    pack<true>(c, channels);
    int64_t gp = round_up(g, L);
    PartialSums<T>* parts = PartialSums<T>::take(inner, tasks3, E * round_up(channels, L) * gp, round_up(channels, L) + 2 * L);
    Conv3x3<S> shape{a.parallel, tasks3, a.N, a.H, a.W, channels, from_pitch, g, out_pitch, norm, no_dropout};
    Conv3x3Backward<M, S> back{shape, out, dout, {owed.mean, owed.scale, owed.shift, !after.frozen()}, from, packed, {dfrom, from_pitch}, gp, parts};
    back.run();
    back.finish(static_cast<T*>(c.dweight), {g, channels, c.channels_last});
    reads.add_up(parts, tasks3, 0, channels);
  }
  void unreduce(int64_t l, const S* z, const S* dz) {
    Frame inner;
    const PostLayer& p = a.layers[l];
    const int64_t b = width(l), splits[2] = {b, b};
    Inputs in = inputs(l);
    Mix<S> mix(a.parallel, grid, in.s, in.count, {splits, a.branches});
    Correction<T> correction(inner, mix.O);
    for (int i = 0; i < a.branches; i++) correction.fill({p.reduce[i].norm}, i * second_branch(l), b, P, true);
    const PartialSums<T>* parts = PartialSums<T>::take(inner, mix.tasks, MixBackward<S>::weights(mix), MixBackward<S>::pitch(mix));
    const OutputGradient<S> gradient(dz, z, zp, mix.O, &correction);
    MixBackward<S> back{mix, gradient, mix.template packed<true>(inner, stacked(inner, l)), parts};
    back.run();
    int64_t n = b * reads(l);
    T* dw = a.branches == 1 ? static_cast<T*>(p.reduce[0].dweight) : inner.take<T>(2 * n);
    back.weight_gradient(dw);
    for (int i = 0; a.branches > 1 && i < 2; i++) memcpy(p.reduce[i].dweight, dw + i * n, size_t(n) * sizeof(T));
    for (int64_t s = 0; s < l * a.branches; s++) Norm<T>{a.norm(s)}.template add_up<true>(parts, mix.tasks, in.s[1].column + s * g, g);
  }
  void backward() {
    S* dz = padded() ? frame.zeroed<S>(P * zp) : frame.take<S>(P * zp);
    S* dmiddle = mp ? frame.take<S>(P * mp) : nullptr;
    for (int64_t s = 0; s < a.slices(); s++) fill_features(s);
    if (a.y.x) read_output_gradient();
    for (int64_t l = a.num_layers - 1; l >= 0; l--) {
      const PostLayer& p = a.layers[l];
      int64_t at = l * a.branches * g;
      if (!a.z) reduce(l, false);
      S* z = z_of(l);
      if (a.branches > 1) {
        if (!a.middle) middle(l, false);
        unconv(p.second, g, middle_of(l), mp, p.first[1].norm, F + at + g, G + at + g, C, dmiddle);
        unconv(p.first[1], width(l), z + second_branch(l), zp, p.reduce[1].norm, middle_of(l), dmiddle, mp, dz + second_branch(l));
      }
      unconv(p.first[0], width(l), z, zp, p.reduce[0].norm, F + at, G + at, C, dz);
      unreduce(l, z, dz);
    }
  }
};

template <class F> void run(const PostDenseBlock& a, F f) {
  with_storage(a.storage, [&](auto s) {
    using S = decltype(s);
    if constexpr (sizeof(S) < 8) if (large_tiles(a.H, a.W, a.winograd)) { PostBlock<S, 4> block(a); f(block); return; }
    PostBlock<S, 2> block(a);
    f(block);
  });
}

}  // namespace

extern const PostDenseBlockKernels post_dense_block_kernels;
const PostDenseBlockKernels post_dense_block_kernels = {
    [](const PostDenseBlock& a) { run(a, [](auto& b) { b.forward(); }); },
    [](const PostDenseBlock& a) { run(a, [](auto& b) { b.backward(); }); },
};

}  // namespace csp::CSP_ISA
