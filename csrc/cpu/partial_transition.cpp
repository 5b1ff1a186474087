// The partial transition of CSPNet: T over the dense part, U over the bypass and T's output, nothing concatenated, pooled
// before the last product. Post-activation: conv-BN-ReLU; pre-activation: BN-ReLU-conv.
#include "partial_transition.h"
#include <initializer_list>
#include "tile/activate.h"
#include "tile/storage.h"

namespace csp::CSP_ISA {
namespace {

template <class S> struct Transition {
  using T = typename Types<S>::T;
  const PartialTransition& a;
  Frame frame;
  const Grid full{a.N, a.H, a.W, false}, last{a.N, a.H, a.W, a.pool};  // the last product reads averages
  const Grid pooled{a.N, last.rows(), last.columns(), false};
  const bool first = !a.t, bypass = a.part.channels > 0;
  const int64_t mid = first ? a.dense.channels + a.grown.channels : a.t->out;
  const int64_t P = a.pixels();
  Affine<T> grown{frame, a.grown.channels};
  S *y = static_cast<S*>(a.y.dx), *raw_t = nullptr, *raw_u = nullptr;
  const S* dy = static_cast<const S*>(a.y.x);

  explicit Transition(const PartialTransition& args) : a(args) {
    if (a.t) raw_t = raw(*a.t, P);
    if (a.u && a.post) raw_u = raw(*a.u, a.pooled());
  }
  S* raw(const TransitionConv& c, int64_t pixels) {
    bool needed = a.u || a.post;  // else T's output is y
    return c.raw ? static_cast<S*>(c.raw) : needed ? frame.take<S>(pixels * padded_channels(c.out)) : nullptr;
  }
  const T* weight(const TransitionConv& c) const { return static_cast<const T*>(c.weight); }

  Affine<T> filled(const BatchNorm& n, int64_t at, int64_t count) {
    Affine<T> norm(frame, count);
    Norm<T>{n, at}.fill(norm, count);
    return norm;
  }
  void statistics(const Slice& s, double* mean, double* var) {
    Frame inner;
    constexpr int L = LANES<T>;
    const S* x = static_cast<const S*>(s.x);
    int64_t tiles = ceil_div(P, 16);
    int tasks = choose_tasks(a.parallel, tiles, 8.0 * double(P * s.channels));
    Statistics<T>* stats = take_statistics<T>(inner, tasks, s.channels);
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(tiles, task, tasks);
      stats[task].count = 0;
      for (int64_t t = r.begin; t < r.end; t++) {
        int64_t m = min64(16, P - t * 16);
        for (int64_t c = 0; c < s.channels; c += L)
          add_rows(stats[task], c, stats[task].count, m, [&](int64_t i) __attribute__((always_inline)) {
            return load(x + (t * 16 + i) * s.pitch + c, s.channels - c);
          });
        stats[task].count += m;
      }
    });
    merge(a.parallel, stats, tasks, x, s.pitch, P, s.channels, mean, var);
  }
  // Of the dense part, where a norm reads it.
  void dense_statistics(const BatchNorm& n, int64_t at) {
    if (n.running_mean) return;
    if (!a.dense_mean) return statistics(a.dense, n.mean + at, n.var + at);
    memcpy(n.mean + at, a.dense_mean, size_t(a.dense.channels) * sizeof(double));
    memcpy(n.var + at, a.dense_var, size_t(a.dense.channels) * sizeof(double));
  }

  // The dense part, with the norm before it in pre-activation order.
  int64_t dense_segments(Segment<S>* s, const Affine<T>* norm) {
    s[0] = segment<S>(a.dense, norm);
    if (a.grown.channels == 0) return 1;
    int64_t each = a.grown.channels / a.grown_slices;
    for (int64_t i = 0; i < a.grown_slices; i++) Norm<T>{a.grown_norms[i]}.fill(grown.from(i * each), each);
    s[1] = segment<S>(a.grown, &grown);
    return 2;
  }
  void add_up_grown(const Mix<S>& mix, const PartialSums<T>* parts) {  // they are the last segment
    int64_t each = a.grown_slices ? a.grown.channels / a.grown_slices : 0;
    for (int64_t i = 0; i < a.grown_slices; i++) Norm<T>{a.grown_norms[i]}.add_up(parts, mix.tasks, mix.segments[mix.count - 1].column + i * each, each);
  }

  // What U reads: the bypass and T's output (or the dense part), each with the norm that stands before it.
  struct Inputs {
    Affine<T> part, middle;
    Segment<S> s[3];
    int64_t count;
  };
  void read(Inputs& in, S* gradient) {
    int64_t n = 0, cp = a.part.channels;
    if (!a.post) {
      if (bypass) in.part = filled(a.u->norm, 0, cp);
      in.middle = filled(a.u->norm, cp, mid);
    } else if (a.t) {
      in.middle = filled(a.t->norm, 0, mid);
    }
    if (bypass) in.s[n++] = segment<S>(a.part, a.post ? nullptr : &in.part);
    if (first) n += dense_segments(in.s + n, a.post ? nullptr : &in.middle);
    else in.s[n++] = {raw_t, padded_channels(mid), mid, &in.middle, gradient, padded_channels(mid), 0};
    in.count = n;
  }
  Inputs inputs() { return {Affine<T>(frame, a.part.channels), Affine<T>(frame, mid), {}, 0}; }

  // channels: written from each pixel's first on.
  void product(const Mix<S>& mix, const TransitionConv& c, S* z, int64_t pitch, int64_t channels, double* mean, double* var) {
    Frame inner;
    Statistics<T>* stats = mean ? take_statistics<T>(inner, mix.tasks, mix.O) : nullptr;
    mix.forward_raw(mix.template packed<false>(inner, weight(c)), z, pitch, channels, stats);
    if (stats) mix.merge(stats, z, pitch, mean, var);
  }
  void activate_into(const Grid& grid, const BatchNorm& n, const int64_t& channels, const S* z, S* to) {
    Affine<T> norm = filled(n, 0, channels);
    Output<S> out{to, a.y.dx_pitch};
    activate(a.parallel, grid, z, padded_channels(channels), norm, Splits{&channels, 1}, &out, Relu<T>{});
  }

  // ---- forward
  void forward_t() {
    const TransitionConv& t = *a.t;
    if (!a.post) dense_statistics(t.norm, 0);
    Affine<T> norm = a.post ? Affine<T>(frame, 0) : filled(t.norm, 0, a.dense.channels);
    Segment<S> s[2];
    int64_t count = dense_segments(s, a.post ? nullptr : &norm);
    Mix<S> mix(a.parallel, !a.u && !a.post ? last : full, s, count, {&t.out, 1});
    if (!raw_t) return product(mix, t, y + a.part.channels, a.y.dx_pitch, t.out, nullptr, nullptr);
    const BatchNorm& next = a.post ? t.norm : a.u->norm;
    int64_t at = a.post ? 0 : a.part.channels;
    bool collect = !next.running_mean;
    product(mix, t, raw_t, mix.O, mix.O, collect ? next.mean + at : nullptr, collect ? next.var + at : nullptr);
  }
  void forward_u() {
    const TransitionConv& u = *a.u;
    bool collect = !u.norm.running_mean;
    if (!a.post && bypass && collect) statistics(a.part, u.norm.mean, u.norm.var);
    if (!a.post && first) dense_statistics(u.norm, a.part.channels);
    Inputs in = inputs();
    read(in, nullptr);
    Mix<S> mix(a.parallel, last, in.s, in.count, {&u.out, 1});
    if (!a.post) return product(mix, u, y, a.y.dx_pitch, u.out, nullptr, nullptr);
    if (!collect && !u.raw) return folded(mix, u, y);
    product(mix, u, raw_u, mix.O, mix.O, collect ? u.norm.mean : nullptr, u.norm.var);
    activate_into(pooled, u.norm, u.out, raw_u, y);
  }
  void folded(const Mix<S>& mix, const TransitionConv& c, S* to) {
    T *scale = frame.zeroed<T>(mix.O), *bias = frame.zeroed<T>(mix.O);
    Norm<T>{c.norm}.fold(scale, bias, c.out);
    Output<S> out{to, a.y.dx_pitch};
    mix_activated(mix, mix.template packed<false>(frame, weight(c), scale), bias, &out, Relu<T>{});
  }
  void forward() {
    if (a.t) forward_t();
    if (a.u) return forward_u();
    if (a.post) activate_into(last, a.t->norm, a.t->out, raw_t, y + a.part.channels);
    if (bypass) copy_part();
  }

  // y[:, :part] = average(part)
  void copy_part() {
    constexpr int L = LANES<T>;
    const S* x = static_cast<const S*>(a.part.x);
    int64_t pixels = last.pixels(), pitch = a.part.pitch, W = a.W, C = a.part.channels;
    int tasks = choose_tasks(a.parallel, pixels, 8.0 * double(P * C));
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(pixels, task, tasks);
      for (int64_t p = r.begin; p < r.end; p++) {
        const S* f = x + last.source(p) * pitch;
        for (int64_t c = 0; c < C; c += L) {
          auto at = [&](int64_t pixel) __attribute__((always_inline)) { return load(f + pixel * pitch + c, C - c); };
          store(y + p * a.y.dx_pitch + c, a.pool ? ((at(0) + at(1)) + (at(W) + at(W + 1))) * T(0.25) : at(0), C - c);
        }
      }
    });
  }

  // ---- backward
  void copy_part_backward() {
    constexpr int L = LANES<T>;
    S* dx = static_cast<S*>(a.part.dx);
    if (!dx) return;
    int64_t pixels = last.pixels(), pitch = a.part.dx_pitch, C = a.part.channels;
    int tasks = choose_tasks(a.parallel, pixels, 8.0 * double(P * C));
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(pixels, task, tasks);
      for (int64_t p = r.begin; p < r.end; p++) {
        S* f = dx + last.source(p) * pitch;
        for (int64_t c = 0; c < C; c += L) {
          Vec<T> d = load(dy + p * a.y.pitch + c, C - c);
          if (!a.pool) { store(f + c, d, C - c); continue; }
          for (int64_t o : {int64_t(0), int64_t(1), a.W, a.W + 1}) store(f + o * pitch + c, d * T(0.25), C - c);
        }
      }
    });
    clear_border(last, dx, pitch, C);
  }

  // One product backwards: its gradients into the segments and dweight; gives the tasks' sums.
  const PartialSums<T>* unmix(const Mix<S>& mix, const TransitionConv& c, const OutputGradient<S>& gradient) {
    const PartialSums<T>* parts = PartialSums<T>::take(frame, mix.tasks, MixBackward<S>::weights(mix), MixBackward<S>::pitch(mix));
    MixBackward<S> back{mix, gradient, mix.template packed<true>(frame, weight(c)), parts};
    back.run();
    back.weight_gradient(static_cast<T*>(c.dweight));
    return parts;
  }
  // Through ReLU and norm of the output: dn and, in `correction`, what turns it into dz.
  S* through_norm(const TransitionConv& c, const Grid& grid, const S* z, const S* d, Correction<T>& correction) {
    int64_t pixels = grid.N * grid.H * grid.W, pitch = padded_channels(c.out);
    Affine<T> norm = filled(c.norm, 0, c.out);
    S* dn = frame.take<S>(pixels * pitch);
    int tasks = choose_tasks(a.parallel, pixels, 16.0 * double(pixels * pitch));
    PartialSums<T>* sums = PartialSums<T>::take(frame, tasks, 0, pitch);
    Output<const S> out{d, a.y.pitch};
    activate_backward(a.parallel, grid, z, pitch, norm, Splits{&c.out, 1}, &out, Relu<T>{}, dn, sums, tasks);
    Norm<T> n{c.norm};
    n.add_up(sums, tasks, 0, c.out);
    correction.fill(n, 0, c.out, pixels, false);
    return dn;
  }
  // x.dx -= owed_mean + (x - mean) * owed_slope
  void settle(const Slice& s, const BatchNorm& n, int64_t at) {
    constexpr int L = LANES<T>;
    S* dx = static_cast<S*>(s.dx);
    if (!dx || n.running_mean) return;
    const S* x = static_cast<const S*>(s.x);
    Correction<T> c(frame, s.channels);
    c.fill({n, at}, 0, s.channels, P, true);
    int tasks = choose_tasks(a.parallel, P, 8.0 * double(P * s.channels));
    for_tasks(a.parallel, tasks, [&](int task) {
      Range r = share(P, task, tasks);
      for (int64_t i = r.begin; i < r.end; i++)
        for (int64_t k = 0; k < s.channels; k += L) {
          int64_t left = s.channels - k;
          S* d = dx + i * s.dx_pitch + k;
          Vec<T> centred = load(x + i * s.pitch + k, left) - load(c.mean + k);
          store(d, load(d, left) + (centred * load(c.slope + k) + load(c.offset + k)), left);
        }
    });
  }
  // The dense part's share of a norm's correction: applied, or left to the dense block.
  void settle_dense(const BatchNorm& n, int64_t at) {
    if (!a.owed) return settle(a.dense, n, at);
    Norm<T> norm{n, at};
    for (int64_t c = 0; c < a.dense.channels; c++) a.owed[c] = norm.owed_mean(c, P), a.owed[a.dense.channels + c] = norm.owed_slope(c, P);
  }

  void backward_t(const OutputGradient<S>& gradient, const Grid& grid) {
    Affine<T> norm = a.post ? Affine<T>(frame, 0) : filled(a.t->norm, 0, a.dense.channels);
    Segment<S> s[2];
    int64_t count = dense_segments(s, a.post ? nullptr : &norm);
    Mix<S> mix(a.parallel, grid, s, count, {&a.t->out, 1});
    const PartialSums<T>* parts = unmix(mix, *a.t, gradient);
    if (a.post) return add_up_grown(mix, parts);
    Norm<T>{a.t->norm}.add_up(parts, mix.tasks, s[0].column, a.dense.channels);
    settle_dense(a.t->norm, 0);
  }
  void backward_u(S* gradient_t) {
    const TransitionConv& u = *a.u;
    Correction<T> correction(frame, u.out);
    const S* dn = a.post ? through_norm(u, pooled, raw_u, dy, correction) : nullptr;
    int64_t pitch = padded_channels(u.out);
    const OutputGradient<S> gradient = a.post ? OutputGradient<S>(dn, raw_u, pitch, pitch, &correction) : OutputGradient<S>(dy, nullptr, a.y.pitch, u.out, nullptr);
    Inputs in = inputs();
    read(in, gradient_t);
    Mix<S> mix(a.parallel, last, in.s, in.count, {&u.out, 1});
    const PartialSums<T>* parts = unmix(mix, u, gradient);
    if (!a.post && bypass) {
      Norm<T>{u.norm}.add_up(parts, mix.tasks, in.s[0].column, a.part.channels);
      settle(a.part, u.norm, 0);
    }
    if (a.post && first) return add_up_grown(mix, parts);
    Norm<T>{a.post ? a.t->norm : u.norm, a.post ? 0 : a.part.channels}.add_up(parts, mix.tasks, in.s[in.count - 1].column, mid);
    if (first) settle_dense(u.norm, a.part.channels);
  }
  void backward() {
    if (!a.u) {
      if (bypass) copy_part_backward();
      const S* d = dy + a.part.channels;
      if (!a.post) return backward_t({d, nullptr, a.y.pitch, a.t->out, nullptr}, last);
      Correction<T> correction(frame, a.t->out);
      int64_t pitch = padded_channels(a.t->out);
      return backward_t({through_norm(*a.t, last, raw_t, d, correction), raw_t, pitch, pitch, &correction}, full);
    }
    int64_t pitch = padded_channels(mid);
    S* G = first ? nullptr : frame.take<S>(P * pitch);
    backward_u(G);
    if (first) return;
    Correction<T> correction(frame, mid);
    correction.fill({a.post ? a.t->norm : a.u->norm, a.post ? 0 : a.part.channels}, 0, mid, P, true);
    backward_t({G, raw_t, pitch, mid, &correction}, full);
  }
};

template <class F> void run(const PartialTransition& a, F f) {
  with_storage(a.storage, [&](auto s) { Transition<decltype(s)> t(a); f(t); });
}

}  // namespace

extern const PartialTransitionKernels partial_transition_kernels;
const PartialTransitionKernels partial_transition_kernels = {
    [](const PartialTransition& a) { run(a, [](auto& t) { t.forward(); }); },
    [](const PartialTransition& a) { run(a, [](auto& t) { t.backward(); }); },
};

}  // namespace csp::CSP_ISA
