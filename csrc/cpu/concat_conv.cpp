// 1x1 convolution, batch norm and activation over inputs that are never concatenated, into one or more outputs.
#include "concat_conv.h"
#include "tile/activate.h"
#include "tile/storage.h"

namespace csp::CSP_ISA {
namespace {

template <class S> struct Concat {
  using T = typename Types<S>::T;
  const ConcatConv& a;
  Frame frame;
  Grid grid{a.N, a.H, a.W, false};
  Segment<S>* segments = read_segments();
  Mix<S> mix{a.parallel, grid, segments, a.count, {a.splits, a.split_count}};
  S* raw = static_cast<S*>(a.raw);
  const T* weight = static_cast<const T*>(a.weight);

  explicit Concat(const ConcatConv& args) : a(args) {}

  Segment<S>* read_segments() {
    Segment<S>* s = frame.take<Segment<S>>(a.count);
    for (int64_t i = 0; i < a.count; i++) s[i] = segment<S>(a.inputs[i], nullptr);
    return s;
  }
  template <class V> Output<V>* outputs() {
    Output<V>* o = frame.take<Output<V>>(a.split_count);
    for (int64_t i = 0; i < a.split_count; i++) {
      if constexpr (std::is_const_v<V>) o[i] = {static_cast<V*>(a.outputs[i].x), a.outputs[i].pitch};
      else o[i] = {static_cast<V*>(a.outputs[i].dx), a.outputs[i].dx_pitch};
    }
    return o;
  }
  Affine<T> norm_in_columns() {
    Affine<T> norm(frame, mix.O);
    mix.out.each([&](int64_t, int64_t channel, int64_t column, int64_t size) { Norm<T>{a.norm, channel}.fill(norm.from(column), size); });
    return norm;
  }
  template <class F> void with_act(F f) { with_activation<T>(a.activation, a.negative_slope, f); }

  void forward() {
    bool collect = !a.norm.running_mean;
    Statistics<T>* stats = collect ? take_statistics<T>(frame, mix.tasks, mix.O) : nullptr;
    mix.forward_raw(mix.template packed<false>(frame, weight), raw, mix.O, mix.O, stats);
    if (collect) mix.merge(stats, raw, mix.O, a.norm.mean, a.norm.var);
    Affine<T> norm = norm_in_columns();
    with_act([&](auto act) { activate(a.parallel, grid, raw, mix.O, norm, mix.out, outputs<S>(), act); });
  }

  void backward() {
    int tasks = choose_tasks(a.parallel, mix.P, 16.0 * double(mix.P * mix.O));
    Affine<T> norm = norm_in_columns();
    PartialSums<T>* sums = PartialSums<T>::take(frame, tasks, 0, mix.O);
    Correction<T> correction(frame, mix.O);
    const Output<const S>* dy = outputs<const S>();
    Places<const S> places(frame, mix.out, dy, LANES<T>);
    with_act([&](auto act) {
      const bool keep = act.COSTLY;
      S* dn = keep ? frame.take<S>(mix.P * mix.O) : nullptr;
      activate_backward(a.parallel, grid, raw, mix.O, norm, mix.out, dy, act, dn, sums, tasks);
      mix.out.each([&](int64_t, int64_t channel, int64_t column, int64_t size) {
        Norm<T> n{a.norm, channel};
        n.add_up(sums, tasks, column, size);
        correction.fill(n, column, size, mix.P, false);
      });
      if (keep) unmix(OutputGradient<S>(dn, raw, mix.O, mix.O, &correction));
      else unmix(ActivatedGradient<S, decltype(act)>(places, raw, mix.O, norm, correction, act));
    });
  }
  void unmix(const Gradient<S>& gradient) {
    MixBackward<S> back{mix, gradient, mix.template packed<true>(frame, weight),
                        PartialSums<T>::take(frame, mix.tasks, MixBackward<S>::weights(mix), MixBackward<S>::pitch(mix))};
    back.run();
    back.weight_gradient(static_cast<T*>(a.dweight));
  }

  void inference() {
    T *scale = frame.zeroed<T>(mix.O), *bias = frame.zeroed<T>(mix.O);
    mix.out.each([&](int64_t, int64_t channel, int64_t column, int64_t size) { Norm<T>{a.norm, channel}.fold(scale + column, bias + column, size); });
    auto* W = mix.template packed<false>(frame, weight, scale);
    with_act([&](auto act) { mix_activated(mix, W, bias, outputs<S>(), act); });
  }
};

template <class F> void run(const ConcatConv& a, F f) {
  with_storage(a.storage, [&](auto s) { Concat<decltype(s)> c(a); f(c); });
}

}  // namespace

extern const ConcatConvKernels concat_conv_kernels;
const ConcatConvKernels concat_conv_kernels = {
    [](const ConcatConv& a) { run(a, [](auto& c) { c.forward(); }); },
    [](const ConcatConv& a) { run(a, [](auto& c) { c.backward(); }); },
    [](const ConcatConv& a) { run(a, [](auto& c) { c.inference(); }); },
};

}  // namespace csp::CSP_ISA
