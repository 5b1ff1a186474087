// The operators of a whole CSP stage on CPU tensors: the bypass is read where it lies in x. Pre-activation layers copy the
// rest once, into the feature buffer that they extend and the transition reads; post-activation layers read it in place.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense_block.h"
#include "partial_transition.h"
#include "post_dense_block.h"

namespace csp {
namespace {

enum class Layer : int { Pre, Post, TwoWay };

struct StageCall {
  Shape shape;
  int64_t part;
  Slice dense;  // what enters the layers, in x
  bool collects = true;  // pre-activation layers take the features' statistics, for themselves or for the transition
  bool all_frozen = true;  // the norms of the layers
  std::optional<DenseBlockCall> pre;
  std::optional<PostDenseBlockCall> post;
  std::optional<TransitionCall> transition;

  StageCall(const char* op, const Tensor& x, const std::vector<Tensor>& params, const std::vector<Tensor>& running, const std::vector<int64_t>& frozen,
            const std::vector<double>& eps, int64_t part_channels, int64_t layer, int64_t fusion, bool pool, int64_t winograd)
      : shape(first_image({op, "x"}, x)), part(part_channels) {
    check_range({op, "part_channels"}, part, 0, shape.C - 1);
    check_range({op, "layer"}, layer, 0, 2);
    check_fusion(op, fusion);
    const bool two_way = Layer(layer) == Layer::TwoWay;
    const size_t last = transition_params(fusion), each = Layer(layer) == Layer::Pre ? 6 : PostDenseBlockCall::params(two_way);
    Parameters p(op, shape.dtype, params, running, &frozen, eps, each, last);
    read_flags(frozen, frozen.size() - last / 3);
    const char* begin = static_cast<const char*>(shape.data);
    if (begin) begin += part * CODES.bytes(shape.dtype);
    dense = {begin, shape.pitch, shape.C - part, nullptr, 0};
    Slice bypass{shape.data, shape.pitch, part, nullptr, 0}, features;
    if (Layer(layer) == Layer::Pre) {
      pre.emplace(shape, dense.channels, p, winograd);
      pre->block.x = dense.x, pre->block.features_read = collects;
      features = {nullptr, channels(), channels(), nullptr, 0};
    } else {
      post.emplace(shape, dense, p, two_way, winograd);
      features = dense;
    }
    Slice grown = post ? Slice{nullptr, post->block.grown(), post->block.grown(), nullptr, 0} : Slice{};
    transition.emplace(bypass, features, shape, p, fusion, post.has_value(), pool, grown);
    transition->link();
  }
  void read_flags(const std::vector<int64_t>& frozen, size_t norms) {
    collects = !frozen[norms];  // the transition's first
    for (size_t i = 0; i < norms; i++) {
      if (!frozen[i]) all_frozen = false;
      if (!frozen[i] && i % 2 == 0) collects = true;
    }
  }
  int64_t pixels() const { return shape.pixels(); }
  int64_t channels() const { return pre->block.channels(); }
  int64_t feature_channels() const { return pre ? channels() : post->block.grown(); }
  int64_t dense_columns() const { return pre ? channels() + pre->block.num_layers * pre->block.bottleneck : post->statistics_size; }
  int64_t columns() const { return dense_columns() + transition->statistics_size; }
  int64_t num_layers() const { return pre ? pre->block.num_layers : post->block.num_layers; }
  int64_t z_pitch() const { return pre ? pre->block.z_pitch() : post->block.z_pitch(); }
  int64_t middle_pitch() const { return post ? post->block.middle_pitch() : 0; }

  void bind(void* F, const Kept& z, const Kept& middle, void* raw_t, void* raw_u, double* mean) {
    double* var = mean + columns();
    PartialTransition& t = transition->transition;
    transition->statistics(mean + dense_columns(), var + dense_columns());
    transition->raw(raw_t, raw_u);
    if (pre) {
      DenseBlock& a = pre->block;
      a.features = F, a.z = z.data(), a.mean = mean, a.var = var, t.dense.x = F;
      if (collects) t.dense_mean = mean, t.dense_var = var;
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
  StageCall call("csp_stage", x, params, running, frozen, eps, part_channels, layer, fusion, pool, winograd);
  const Shape& s = call.shape;
  TransitionCall& t = *call.transition;
  auto kept = [&](bool wanted, int64_t n) { return buffer(x, {wanted ? n : 0}); };
  Tensor features = buffer(x, {call.pixels(), call.feature_channels()});
  Kept z(x, keep_bottleneck ? call.num_layers() : 0, {call.pixels(), call.z_pitch()});
  Kept middle(x, keep_bottleneck && call.middle_pitch() ? call.num_layers() : 0, {call.pixels(), call.middle_pitch()});
  Tensor raw_t = kept(keep, t.raw_t_size()), raw_u = kept(keep, t.raw_u_size());
  Tensor stats = statistics(x, call.columns());
  Tensor y = channels_last(x, s.N, t.channels(), t.height(), t.width());
  call.bind(features.mutable_data_ptr(), z, middle, pointer_or_null(raw_t), pointer_or_null(raw_u), static_cast<double*>(stats.mutable_data_ptr()));
  call.bind_norms();
  t.transition.y = {nullptr, 0, t.channels(), y.mutable_data_ptr(), t.channels()};
  if (y.numel() > 0) call.forward(call.all_frozen && !call.collects && !keep);
  return {y, features, z.tensors, middle.tensors, raw_t, raw_u, stats};
}

std::vector<Tensor> csp_stage_backward(const Tensor& grad_y, const Tensor& x, const Tensor& features, std::vector<Tensor> kept_z, std::vector<Tensor> kept_middle,
                                       const Tensor& raw_t, const Tensor& raw_u, const Tensor& stats, std::vector<Tensor> params,
                                       std::vector<Tensor> running, std::vector<int64_t> frozen, std::vector<double> eps, int64_t part_channels,
                                       int64_t layer, int64_t fusion, bool pool, int64_t winograd) {
  constexpr const char* OP = "csp_stage_backward";
  StageCall call(OP, x, params, running, frozen, eps, part_channels, layer, fusion, pool, winograd);
  const Shape& s = call.shape;
  TransitionCall& t = *call.transition;
  const Shape grad = image({OP, "grad_y"}, grad_y, s.dtype, {s.N, t.channels(), t.height(), t.width()});
  void* F = kept({OP, "features"}, features, s.dtype, {call.pixels(), call.feature_channels()});
  const Kept z({OP, "z"}, kept_z, s.dtype, call.num_layers(), {call.pixels(), call.z_pitch()}, true);
  const int64_t middles = call.middle_pitch() ? int64_t(kept_z.size()) : 0;
  const Kept middle({OP, "middle"}, kept_middle, s.dtype, middles, {call.pixels(), call.middle_pitch()});
  void* T = kept({OP, "raw_t"}, raw_t, s.dtype, {t.raw_t_size()});
  void* U = kept({OP, "raw_u"}, raw_u, s.dtype, {t.raw_u_size()});
  double* mean = statistics_of(OP, stats, call.columns());
  bool empty = grad_y.numel() == 0;
  Tensor dx = channels_last(x, s.N, s.C, s.H, s.W);
  std::vector<Tensor> grads{dx};
  append_gradients(grads, params, empty);
  if (empty) return grads;
  call.bind(F, z, middle, T, U, mean);
  if (call.pre) call.pre->gradients(grads, 1);
  else call.post->gradients(grads, 1);
  t.gradients(grads, 1 + params.size() - transition_params(fusion));
  call.bind_norms();
  Tensor G = buffer(x, {call.pixels(), call.feature_channels()});
  std::vector<double> owed(size_t(2 * call.feature_channels()), 0.0);
  t.transition.y = slice_of(grad);
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
