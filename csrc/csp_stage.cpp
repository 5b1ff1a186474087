// The operators of a whole CSP stage on CPU tensors: the bypass is read where it lies in x. Pre-activation layers copy the
// rest once, into the feature buffer that they extend and the transition reads; post-activation layers read it in place.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense_block.h"
#include "partial_transition.h"
#include "post_dense_block.h"

namespace csp {
namespace {

constexpr const char* OP = "csp_stage";

enum class Layer : int { Pre, Post, TwoWay };

// The arguments of the dense layers and of the transition, apart.
struct StageArguments {
  std::vector<Tensor> params, running, transition_params, transition_running;
  std::vector<int64_t> frozen, transition_frozen;
  std::vector<double> eps, transition_eps;

  StageArguments(const std::vector<Tensor>& all, const std::vector<Tensor>& all_running, const std::vector<int64_t>& all_frozen,
                 const std::vector<double>& all_eps, int64_t fusion) {
    STD_TORCH_CHECK(fusion >= 0 && fusion <= 2, OP, ": unknown fusion ", fusion);
    int64_t last = Fusion(fusion) == Fusion::Csp ? 2 : 1, norms = int64_t(all_frozen.size()) - last;
    STD_TORCH_CHECK(norms > 0 && all_eps.size() == all_frozen.size() && all.size() == 3 * all_frozen.size(), OP, ": 3 tensors, a flag and an eps for each norm");
    auto split = [](const auto& from, int64_t n, auto& first, auto& second) { first.assign(from.begin(), from.begin() + n), second.assign(from.begin() + n, from.end()); };
    split(all, 3 * norms, params, transition_params), split(all_frozen, norms, frozen, transition_frozen), split(all_eps, norms, eps, transition_eps);
    int64_t n = 0;
    for (int64_t f : frozen) n += f ? 2 : 0;
    STD_TORCH_CHECK(size_t(n) <= all_running.size(), OP, ": running lacks statistics of a frozen norm");
    split(all_running, n, running, transition_running);
  }
  bool all_frozen() const {
    for (int64_t f : frozen) if (!f) return false;
    return true;
  }
  bool collects() const {  // pre-activation layers take the features' statistics, for themselves or for the transition
    if (!transition_frozen[0]) return true;
    for (size_t i = 0; i < frozen.size(); i += 2) if (!frozen[i]) return true;
    return false;
  }
};

struct StageCall {
  StageArguments arguments;
  Shape shape;
  int64_t part;
  Slice dense;  // what enters the layers, in x
  std::optional<DenseBlockCall> pre;
  std::optional<PostDenseBlockCall> post;
  std::optional<TransitionCall> transition;

  StageCall(const Tensor& x, const std::vector<Tensor>& params, const std::vector<Tensor>& running, const std::vector<int64_t>& frozen,
            const std::vector<double>& eps, int64_t part_channels, int64_t layer, int64_t fusion, bool pool, int64_t winograd)
      : arguments(params, running, frozen, eps, fusion), shape(OP, x), part(part_channels) {
    STD_TORCH_CHECK(part >= 0 && part < shape.C, OP, ": part_channels must leave a channel for the dense layers");
    STD_TORCH_CHECK(layer >= 0 && layer <= 2, OP, ": unknown layer ", layer);
    const StageArguments& a = arguments;
    const char* begin = static_cast<const char*>(x.const_data_ptr());
    dense = {begin + size_t(part) * size_t(x.element_size()), shape.pitch, shape.C - part, nullptr, 0};
    Slice bypass{begin, shape.pitch, part, nullptr, 0}, features;
    if (Layer(layer) == Layer::Pre) {
      pre.emplace(OP, x, dense.channels, a.params, a.running, &a.frozen, a.eps, winograd);
      pre->block.x = dense.x, pre->block.features_read = a.collects();
      features = {nullptr, channels(), channels(), nullptr, 0};
    } else {
      post.emplace(OP, x, shape, dense, a.params, a.running, a.frozen.data(), a.eps.data(), Layer(layer) == Layer::TwoWay, winograd);
      features = dense;
    }
    Slice grown = post ? Slice{nullptr, post->block.grown(), post->block.grown(), nullptr, 0} : Slice{};
    transition.emplace(OP, x, bypass, features, shape, a.transition_params.data(), a.transition_params.size(), a.transition_running, 0,
                       a.transition_frozen.data(), a.transition_eps.data(), fusion, post.has_value(), pool, grown);
    transition->link();
  }
  int64_t pixels() const { return shape.pixels(); }
  int64_t channels() const { return pre->block.channels(); }
  int64_t feature_channels() const { return pre ? channels() : post->block.grown(); }
  int64_t dense_columns() const { return pre ? channels() + pre->block.num_layers * pre->block.bottleneck : post->statistics_size; }
  int64_t columns() const { return dense_columns() + transition->statistics_size; }
  int64_t num_layers() const { return pre ? pre->block.num_layers : post->block.num_layers; }
  int64_t z_pitch() const { return pre ? pre->block.z_pitch() : post->block.z_pitch(); }
  int64_t middle_pitch() const { return post ? post->block.middle_pitch() : 0; }

  void bind(const Tensor& features, const Kept& z, const Kept& middle, const Tensor& raw_t, const Tensor& raw_u, const Tensor& stats) {
    double *mean = const_cast<double*>(static_cast<const double*>(stats.const_data_ptr())), *var = mean + columns();
    void* F = const_cast<void*>(features.const_data_ptr());
    PartialTransition& t = transition->transition;
    transition->statistics(mean + dense_columns(), var + dense_columns());
    transition->raw(pointer_or_null(raw_t), pointer_or_null(raw_u));
    if (pre) {
      DenseBlock& a = pre->block;
      a.features = F, a.z = z.data(), a.mean = mean, a.var = var, t.dense.x = F;
      if (arguments.collects()) t.dense_mean = mean, t.dense_var = var;
    } else {
      PostDenseBlock& a = post->block;
      post->statistics(mean, var);
      a.features = F, a.z = z.data(), a.middle = middle.data();
      t.grown.x = F;
    }
  }
  void bind_norms() {  // of the slices the transition reads, once complete
    if (post) transition->transition.grown_norms = post->norms(), transition->transition.grown_slices = post->block.slices();
  }
  void forward(bool inference) {
    if (post) isa().post_dense_block->forward(post->block);
    else if (inference) isa().dense_block->inference(pre->block);
    else isa().dense_block->forward(pre->block);
    isa().partial_transition->forward(transition->transition);
  }
  // dx: of all of x. G: of the features. owed: see PartialTransition.
  void backward(char* dx, size_t element, void* G, double* owed) {
    PartialTransition& t = transition->transition;
    char* dense_dx = dx + size_t(part) * element;
    t.part.dx = part ? dx : nullptr, t.part.dx_pitch = shape.C;
    if (pre) t.dense.dx = G, t.dense.dx_pitch = channels(), t.owed = owed;
    else t.dense.dx = dense_dx, t.dense.dx_pitch = shape.C, t.grown.dx = G, t.grown.dx_pitch = post->block.grown();
    isa().partial_transition->backward(t);
    if (pre) {
      DenseBlock& a = pre->block;
      a.grad_features = G, a.owed = owed, a.dx = dense_dx, a.dx_pitch = shape.C;
      isa().dense_block->backward(a);
    } else {
      PostDenseBlock& a = post->block;
      a.G = G, a.x.dx = dense_dx, a.x.dx_pitch = shape.C;
      isa().post_dense_block->backward(a);
    }
  }
};

using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor>;

Result csp_stage(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running, std::vector<int64_t> frozen, std::vector<double> eps,
                 int64_t part_channels, int64_t layer, int64_t fusion, bool pool, int64_t winograd, bool keep, bool keep_bottleneck) {
  StageCall call(x, params, running, frozen, eps, part_channels, layer, fusion, pool, winograd);
  const Shape& s = call.shape;
  TransitionCall& t = *call.transition;
  auto kept = [&](bool wanted, int64_t n) { return buffer(x, {wanted ? n : 0}); };
  Tensor features = buffer(x, {call.pixels(), call.feature_channels()});
  Kept z(x, keep_bottleneck ? call.num_layers() : 0, {call.pixels(), call.z_pitch()});
  Kept middle(x, keep_bottleneck && call.middle_pitch() ? call.num_layers() : 0, {call.pixels(), call.middle_pitch()});
  Tensor raw_t = kept(keep, t.raw_t_size()), raw_u = kept(keep, t.raw_u_size());
  Tensor stats = statistics(x, call.columns());
  Tensor y = channels_last(x, s.N, t.channels(), t.height(), t.width());
  call.bind(features, z, middle, raw_t, raw_u, stats);
  call.bind_norms();
  t.transition.y = {nullptr, 0, t.channels(), y.mutable_data_ptr(), t.channels()};
  if (y.numel() > 0) call.forward(call.arguments.all_frozen() && !call.arguments.collects() && !keep);
  return {y, features, z.tensors, middle.tensors, raw_t, raw_u, stats};
}

std::vector<Tensor> csp_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& features, std::vector<Tensor> kept_z, std::vector<Tensor> kept_middle,
                                       const Tensor& raw_t, const Tensor& raw_u, const Tensor& stats, std::vector<Tensor> params,
                                       std::vector<Tensor> running, std::vector<int64_t> frozen, std::vector<double> eps, int64_t part_channels,
                                       int64_t layer, int64_t fusion, bool pool, int64_t winograd) {
  StageCall call(x, params, running, frozen, eps, part_channels, layer, fusion, pool, winograd);
  const Shape& s = call.shape;
  TransitionCall& t = *call.transition;
  Shape grad(OP, grad_y);
  STD_TORCH_CHECK(grad.N == s.N && grad.C == t.channels() && grad.H == t.height() && grad.W == t.width() && grad_y.scalar_type() == x.scalar_type(),
                  OP, "_backward: grad_y must have the shape and dtype of y");
  Kept z(OP, kept_z, call.num_layers(), call.pixels() * call.z_pitch()), middle(OP, kept_middle, call.num_layers(), call.pixels() * call.middle_pitch());
  STD_TORCH_CHECK(features.numel() == call.pixels() * call.feature_channels() &&
                      raw_t.numel() == t.raw_t_size() && raw_u.numel() == t.raw_u_size() && stats.numel() == 2 * call.columns(),
                  OP, "_backward: what forward kept has the wrong size");
  bool empty = grad_y.numel() == 0;
  Tensor dx = channels_last(x, s.N, s.C, s.H, s.W);
  std::vector<Tensor> grads{dx};
  append_gradients(grads, params, empty);
  if (empty) return grads;
  call.bind(features, z, middle, raw_t, raw_u, stats);
  if (call.pre) call.pre->gradients(grads, 1);
  else call.post->gradients(grads, 1);
  t.gradients(grads, 1 + call.arguments.params.size());
  call.bind_norms();
  Tensor G = buffer(x, {call.pixels(), call.feature_channels()});
  std::vector<double> owed(size_t(2 * call.feature_channels()), 0.0);
  t.transition.y = {grad_y.const_data_ptr(), grad.pitch, grad.C, nullptr, 0};
  call.backward(static_cast<char*>(dx.mutable_data_ptr()), size_t(x.element_size()), G.mutable_data_ptr(), owed.data());
  return grads;
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("csp_stage(Tensor x, Tensor[] params, Tensor[] running, int[] frozen, float[] eps, int part_channels, int layer, int fusion, "
        "bool pool, int winograd, bool keep, bool keep_bottleneck) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor)");
  m.def("csp_stage_backward(Tensor grad_y, Tensor x, Tensor features, Tensor[] z, Tensor[] middle, Tensor raw_t, Tensor raw_u, Tensor stats, "
        "Tensor[] params, Tensor[] running, int[] frozen, float[] eps, int part_channels, int layer, int fusion, bool pool, int winograd) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("csp_stage", TORCH_BOX(&csp::csp_stage));
  m.impl("csp_stage_backward", TORCH_BOX(&csp::csp_stage_backward));
}
