// The operators of a 1x1 convolution over a concatenation that is never built, on CPU tensors.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"

namespace csp {
namespace {

constexpr const char* OP = "concat_conv";

struct ConcatConvCall {
  ConcatConv conv{};
  std::vector<Slice> inputs, outputs;
  const std::vector<int64_t>& splits;
  int64_t channels = 0;  // of all outputs

  ConcatConvCall(const std::vector<Tensor>& in, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                 const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, double eps, int64_t act,
                 double negative_slope, const std::vector<int64_t>& splits)
      : splits(splits) {
    STD_TORCH_CHECK(!in.empty() && !splits.empty(), OP, ": needs at least one input and one output");
    STD_TORCH_CHECK(act >= 0 && act <= int64_t(Activation::Hardswish), OP, ": unknown activation ", act);
    const Tensor& x = in[0];
    Shape first(OP, x);
    int64_t K = 0;
    for (const Tensor& t : in) {
      Shape s(OP, t);
      s.same(OP, first);
      STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_cpu(), OP, ": inputs of different dtype or device");
      inputs.push_back({t.const_data_ptr(), s.pitch, s.C, nullptr, 0});
      K += s.C;
    }
    for (int64_t c : splits) {
      STD_TORCH_CHECK(c > 0, OP, ": every output needs a channel");
      channels += c;
    }
    conv.parallel = parallel(), conv.storage = storage_of(OP, x);
    conv.N = first.N, conv.H = first.H, conv.W = first.W;
    conv.inputs = inputs.data(), conv.count = int64_t(inputs.size());
    conv.weight = parameter(OP, x, weight, channels * K, "weight");
    conv.norm.gamma = parameter(OP, x, gamma, channels, "norm weight"), conv.norm.beta = parameter(OP, x, beta, channels, "norm bias");
    STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), OP, ": running mean without running variance");
    if (running_mean) {
      conv.norm.running_mean = parameter(OP, x, *running_mean, channels, "running_mean");
      conv.norm.running_var = parameter(OP, x, *running_var, channels, "running_var");
    }
    conv.norm.eps = eps, conv.activation = Activation(act), conv.negative_slope = negative_slope;
    conv.splits = splits.data(), conv.split_count = int64_t(splits.size());
  }
  int64_t pixels() const { return conv.N * conv.H * conv.W; }
  void statistics(const Tensor& stats) {
    conv.norm.mean = const_cast<double*>(static_cast<const double*>(stats.const_data_ptr())), conv.norm.var = conv.norm.mean + channels;
  }
  std::vector<Tensor> allocate_outputs(const Tensor& like) {
    std::vector<Tensor> y;
    for (int64_t c : splits) {
      y.push_back(channels_last(like, conv.N, c, conv.H, conv.W));
      outputs.push_back({nullptr, 0, c, y.back().mutable_data_ptr(), c});
    }
    conv.outputs = outputs.data();
    return y;
  }
};

std::tuple<std::vector<Tensor>, Tensor, Tensor> concat_conv(std::vector<Tensor> inputs, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                                                            std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double eps,
                                                            int64_t act, double negative_slope, std::vector<int64_t> splits) {
  ConcatConvCall call(inputs, weight, gamma, beta, running_mean, running_var, eps, act, negative_slope, splits);
  std::vector<Tensor> y = call.allocate_outputs(inputs[0]);
  Tensor raw = buffer(inputs[0], {call.pixels(), columns(splits.data(), int64_t(splits.size()))});
  Tensor stats = statistics(inputs[0], call.channels);
  call.statistics(stats);
  call.conv.raw = raw.mutable_data_ptr();
  if (call.pixels() > 0) isa().concat_conv->forward(call.conv);
  return {y, raw, stats};
}

// wanted: which inputs' gradients; an unwanted one comes back empty.
std::vector<Tensor> concat_conv_backward(std::vector<Tensor> grads, std::vector<Tensor> inputs, const Tensor& weight, const Tensor& gamma,
                                         const Tensor& beta, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                         const Tensor& raw, const Tensor& stats, double eps, int64_t act, double negative_slope,
                                         std::vector<int64_t> splits, std::vector<int64_t> wanted) {
  ConcatConvCall call(inputs, weight, gamma, beta, running_mean, running_var, eps, act, negative_slope, splits);
  STD_TORCH_CHECK(grads.size() == splits.size() && wanted.size() == inputs.size(), OP, "_backward: a gradient for each output, a flag for each input");
  ConcatConv& a = call.conv;
  Shape first(OP, inputs[0]);
  for (size_t i = 0; i < grads.size(); i++) {
    Shape s(OP, grads[i]);
    s.same(OP, first);
    STD_TORCH_CHECK(s.C == splits[i] && grads[i].scalar_type() == inputs[0].scalar_type(), OP, "_backward: gradients must have the shape and dtype of the outputs");
    call.outputs.push_back({grads[i].const_data_ptr(), s.pitch, s.C, nullptr, 0});
  }
  a.outputs = call.outputs.data();
  STD_TORCH_CHECK(raw.numel() == call.pixels() * columns(splits.data(), int64_t(splits.size())), OP, "_backward: raw has the wrong size");
  std::vector<Tensor> result;
  for (size_t i = 0; i < inputs.size(); i++) {
    int64_t C = call.inputs[i].channels;
    result.push_back(wanted[i] ? channels_last(inputs[i], a.N, C, a.H, a.W) : buffer(inputs[i], {0}));
    call.inputs[i].dx = wanted[i] ? result.back().mutable_data_ptr() : nullptr, call.inputs[i].dx_pitch = C;
  }
  bool empty = call.pixels() == 0;
  append_gradients(result, {weight, gamma, beta}, empty);
  size_t n = inputs.size();
  a.dweight = result[n].mutable_data_ptr(), a.norm.dgamma = result[n + 1].mutable_data_ptr(), a.norm.dbeta = result[n + 2].mutable_data_ptr();
  a.raw = const_cast<void*>(raw.const_data_ptr());
  call.statistics(stats);
  if (!empty) isa().concat_conv->backward(a);
  return result;
}

std::vector<Tensor> concat_conv_inference(std::vector<Tensor> inputs, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                                          const Tensor& running_mean, const Tensor& running_var, double eps, int64_t act,
                                          double negative_slope, std::vector<int64_t> splits) {
  ConcatConvCall call(inputs, weight, gamma, beta, running_mean, running_var, eps, act, negative_slope, splits);
  std::vector<Tensor> y = call.allocate_outputs(inputs[0]);
  if (call.pixels() > 0) isa().concat_conv->inference(call.conv);
  return y;
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("concat_conv(Tensor[] inputs, Tensor weight, Tensor gamma, Tensor beta, Tensor? running_mean, Tensor? running_var, float eps, "
        "int act, float negative_slope, int[] splits) -> (Tensor[], Tensor, Tensor)");
  m.def("concat_conv_backward(Tensor[] grads, Tensor[] inputs, Tensor weight, Tensor gamma, Tensor beta, Tensor? running_mean, "
        "Tensor? running_var, Tensor raw, Tensor stats, float eps, int act, float negative_slope, int[] splits, int[] wanted) -> Tensor[]");
  m.def("concat_conv_inference(Tensor[] inputs, Tensor weight, Tensor gamma, Tensor beta, Tensor running_mean, Tensor running_var, "
        "float eps, int act, float negative_slope, int[] splits) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("concat_conv", TORCH_BOX(&csp::concat_conv));
  m.impl("concat_conv_backward", TORCH_BOX(&csp::concat_conv_backward));
  m.impl("concat_conv_inference", TORCH_BOX(&csp::concat_conv_inference));
}
