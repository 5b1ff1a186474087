// The operators of a 1x1 convolution over a concatenation that is never built, on CPU tensors.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"

namespace csp {
namespace {

struct ConcatConvCall {
  const char* op;
  ConcatConv conv{};
  Shape first{};
  std::vector<Slice> inputs, outputs;
  const std::vector<int64_t>& splits;
  int64_t channels = 0;  // of all outputs

  ConcatConvCall(const char* op, const std::vector<Tensor>& in, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                 const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, double eps, int64_t act,
                 double negative_slope, const std::vector<int64_t>& splits)
      : op(op), splits(splits) {
    require(!in.empty(), {op, "inputs"}, "got no tensor, expected at least one");
    check_range({op, "act"}, act, 0, int64_t(Activation::Hardswish));
    require(std::isfinite(negative_slope), {op, "negative_slope"}, "got ", negative_slope, ", expected a finite number");
    first = first_image({op, "inputs", 0}, in[0]);
    int64_t K = 0;
    for (size_t i = 0; i < in.size(); i++) {
      inputs.push_back(slice_of(image({op, "inputs", int64_t(i)}, in[i], first.dtype, {first.N, ANY, first.H, first.W})));
      K += inputs.back().channels;
    }
    const int32_t dtype = CODES.accumulation(first.dtype);
    conv.weight = checked({op, "weight"}, weight, dtype, {ANY, K, 1, 1});
    channels = weight.size(0);
    check_splits();
    auto vector = [&](const char* name, const Tensor& t) { return checked({op, name}, t, dtype, {channels}); };
    conv.norm.gamma = vector("gamma", gamma), conv.norm.beta = vector("beta", beta);
    require(running_mean.has_value() == running_var.has_value(), {op, running_mean ? "running_var" : "running_mean"}, "got none, expected the mean and the variance, or neither");
    if (running_mean) conv.norm.running_mean = vector("running_mean", *running_mean), conv.norm.running_var = vector("running_var", *running_var);
    check_eps({op, "eps"}, eps, running_mean.has_value());
    conv.parallel = parallel(), conv.storage = storage_of(first.dtype);
    conv.N = first.N, conv.H = first.H, conv.W = first.W;
    conv.inputs = inputs.data(), conv.count = int64_t(inputs.size());
    conv.norm.eps = eps, conv.activation = Activation(act), conv.negative_slope = negative_slope;
    conv.splits = splits.data(), conv.split_count = int64_t(splits.size());
  }
  void check_splits() const {
    int64_t left = channels;
    bool fits = true;
    for (int64_t c : splits) fits = fits && c > 0 && c <= left, left -= fits ? c : 0;
    require(fits && left == 0 && channels > 0, {op, "splits"}, "got ", list(splits), ", expected sizes of at least 1 that add up to ", channels, ", the rows of weight");
  }
  int64_t pixels() const { return conv.N * conv.H * conv.W; }
  int64_t raw_columns() const { return columns(splits.data(), int64_t(splits.size())); }
  void statistics(double* mean) { conv.norm.mean = mean, conv.norm.var = mean + channels; }
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
  ConcatConvCall call("concat_conv", inputs, weight, gamma, beta, running_mean, running_var, eps, act, negative_slope, splits);
  std::vector<Tensor> y = call.allocate_outputs(inputs[0]);
  Tensor raw = buffer(inputs[0], {call.pixels(), call.raw_columns()});
  Tensor stats = statistics(inputs[0], call.channels);
  call.statistics(static_cast<double*>(stats.mutable_data_ptr()));
  call.conv.raw = raw.mutable_data_ptr();
  if (call.pixels() > 0) isa().concat_conv->forward(call.conv);
  return {y, raw, stats};
}

// wanted: which inputs' gradients; an unwanted one comes back empty.
std::vector<Tensor> concat_conv_backward(std::vector<Tensor> grads, std::vector<Tensor> inputs, const Tensor& weight, const Tensor& gamma,
                                         const Tensor& beta, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                         const Tensor& raw, const Tensor& stats, double eps, int64_t act, double negative_slope,
                                         std::vector<int64_t> splits, std::vector<int64_t> wanted) {
  constexpr const char* OP = "concat_conv_backward";
  ConcatConvCall call(OP, inputs, weight, gamma, beta, running_mean, running_var, eps, act, negative_slope, splits);
  check_count({OP, "grads"}, grads.size(), splits.size(), "a gradient for each output");
  check_flags(OP, "wanted", wanted, inputs.size(), "a flag for each input");
  ConcatConv& a = call.conv;
  const Shape& first = call.first;
  for (size_t i = 0; i < grads.size(); i++)
    call.outputs.push_back(slice_of(image({OP, "grads", int64_t(i)}, grads[i], first.dtype, {first.N, splits[i], first.H, first.W})));
  a.outputs = call.outputs.data();
  a.raw = kept({OP, "raw"}, raw, first.dtype, {call.pixels(), call.raw_columns()});
  call.statistics(statistics_of(OP, stats, call.channels));
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
  if (!empty) isa().concat_conv->backward(a);
  return result;
}

std::vector<Tensor> concat_conv_inference(std::vector<Tensor> inputs, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                                          const Tensor& running_mean, const Tensor& running_var, double eps, int64_t act,
                                          double negative_slope, std::vector<int64_t> splits) {
  ConcatConvCall call("concat_conv_inference", inputs, weight, gamma, beta, running_mean, running_var, eps, act, negative_slope, splits);
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
