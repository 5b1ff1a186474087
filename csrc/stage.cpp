// The operators of a stage on CPU tensors: what a program (program.h) reads, writes and keeps.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "program.h"
#include "tensors.h"

namespace csp {
namespace {

struct Call {
  const char* const op;
  const std::shared_ptr<const stage::Program> program;
  const stage::Program& p;
  StageCall call{};
  Shape first{};
  int32_t dtype = 0;  // of parameters
  std::vector<bool> read;  // buffers whose values count: of the others backward takes anything of their size
  std::vector<StageBuffer> buffers;
  std::vector<StageWeight> weights;
  std::vector<BatchNorm> norms;

  Call(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& params, const std::vector<Tensor>& running,
       const std::optional<Tensor>& seed, const std::string& text, const std::vector<double>& eps, int64_t winograd, bool backward)
      : op(op), program(stage::program_of(op, text)), p(*program), read(p.buffers.size(), !backward), buffers(p.buffers.size()), weights(p.weights.size()), norms(p.norms.size()) {
    if (backward)
      for (const stage::Instruction& i : p.backward)
        stage::values_read(i, [&](const stage::Place& place) { read[size_t(place.buffer)] = true; });
    check_winograd(op, winograd), count_parameters(params, running);
    read_inputs(inputs), read_weights(params), read_norms(params, running, eps), read_seed(seed);
    call.parallel = parallel(), call.storage = storage_of(first.dtype), call.program = &p;
    call.N = first.N, call.H = first.H, call.W = first.W, call.winograd = int(winograd);
    call.buffers = buffers.data(), call.weights = weights.data(), call.norms = norms.data();
    for (size_t i = 0; i < buffers.size(); i++)
      if (p.buffers[i].kind != stage::Kind::Input) buffers[i].pitch = pitch(p.buffers[i]);
    for (const stage::Buffer& b : p.buffers)
      require(empty() || (b.side(first.H) > 0 && b.side(first.W) > 0), {op, "inputs"}, "got ", first.H, " x ", first.W, " pixels, expected more: nothing is left of them after pooling");
  }
  bool empty() const { return first.pixels() == 0; }
  // Outputs are packed; what the kernels alone see has rows of whole vectors.
  static int64_t pitch(const stage::Buffer& b) { return b.kind == stage::Kind::Output ? b.channels : padded_channels(b.channels); }
  int64_t pixels(const stage::Buffer& b) const { return first.N * b.side(first.H) * b.side(first.W); }

  void read_inputs(const std::vector<Tensor>& inputs) {
    check_count({op, "inputs"}, inputs.size(), size_t(p.count(stage::Kind::Input)), "one for each input of the program");
    first = first_image({op, "inputs", 0}, inputs[0], lies(0, Lies::Image));
    dtype = CODES.accumulation(first.dtype);
    for (size_t i = 0; i < inputs.size(); i++) {
      const Shape s = image({op, "inputs", int64_t(i)}, inputs[i], first.dtype, {first.N, p.buffers[i].channels, first.H, first.W}, lies(i, Lies::Image));
      buffers[i].x = read[i] ? const_cast<void*>(s.data) : nullptr, buffers[i].pitch = read[i] ? s.pitch : s.C;
    }
  }
  Lies lies(size_t buffer, Lies how) const { return read[buffer] ? how : Lies::Anyhow; }
  void count_parameters(const std::vector<Tensor>& params, const std::vector<Tensor>& running) const {
    int64_t weights = 0, moments = 0;
    auto reaches = [](int64_t& count, int64_t end) { count = count > end ? count : end; };
    for (const stage::Weight& w : p.weights) if (w.position >= 0) reaches(weights, w.position + 1 + w.bias);
    for (const stage::Norm& n : p.norms) reaches(weights, n.position + 2), reaches(moments, n.running + 2 * (n.running >= 0));
    check_count({op, "params"}, params.size(), size_t(weights), "the parameters of the program");
    check_count({op, "running"}, running.size(), size_t(moments > 0 ? moments : 0), "mean and variance of each frozen norm");
  }
  const void* vector(const char* name, const std::vector<Tensor>& from, int64_t i, int64_t channels, const char* role) const {
    return checked({op, name, i, role}, from[size_t(i)], dtype, {channels});
  }
  void read_weights(const std::vector<Tensor>& params) {
    for (size_t i = 0; i < weights.size(); i++) {
      const stage::Weight& w = p.weights[i];
      if (w.position < 0) continue;
      const Tensor& t = params[size_t(w.position)];
      weights[i].weight = checked({op, "params", w.position, "weight"}, t, dtype, {w.out_channels, w.in_channels, w.kernel, w.kernel}, w.kernel > 1 ? Lies::Either : Lies::Contiguous);
      weights[i].channels_last = w.kernel > 1 && !Extent(t).contiguous();
    }
  }
  void read_norms(const std::vector<Tensor>& params, const std::vector<Tensor>& running, const std::vector<double>& eps) {
    check_count({op, "eps"}, eps.size(), norms.size(), "a number for each norm");
    for (size_t i = 0; i < norms.size(); i++) {
      const stage::Norm& n = p.norms[i];
      check_eps({op, "eps", int64_t(i)}, eps[i], n.running >= 0);
      norms[i].eps = eps[i];
      norms[i].gamma = vector("params", params, n.position, n.channels, "norm.weight"), norms[i].beta = vector("params", params, n.position + 1, n.channels, "norm.bias");
      if (n.running >= 0) norms[i].running_mean = vector("running", running, n.running, n.channels, "mean"), norms[i].running_var = vector("running", running, n.running + 1, n.channels, "variance");
    }
  }
  void read_seed(const std::optional<Tensor>& seed) {
    bool drops = false;
    for (const stage::Instruction& i : p.forward)
      if (const auto* product = std::get_if<stage::Product>(&i)) drops = drops || product->drop >= 0;
    require(!drops || seed.has_value(), {op, "seed"}, "got none, expected int64 [1]: the program drops values");
    if (!seed) return;
    const void* data = checked({op, "seed"}, *seed, CODES.int64, {1});
    call.seed = uint64_t(*static_cast<const int64_t*>(data));
  }
  void statistics(double* mean) { call.mean = mean, call.var = mean + p.statistics; }
  template <class F> void each(stage::Kind kind, F f) {  // f(buffer of the program, memory)
    for (size_t i = 0; i < buffers.size(); i++)
      if (p.buffers[i].kind == kind) f(p.buffers[i], buffers[i]);
  }
};

// Memory for the outputs; returns that of the statistics.
Tensor outputs_of(Call& c, const std::vector<Tensor>& inputs, std::vector<Tensor>& outputs) {
  c.each(stage::Kind::Output, [&](const stage::Buffer& b, StageBuffer& memory) {
    outputs.push_back(channels_last(inputs[0], c.first.N, b.channels, b.side(c.first.H), b.side(c.first.W)));
    memory.x = outputs.back().mutable_data_ptr();
  });
  Tensor stats = statistics(inputs[0], c.p.statistics);
  c.statistics(static_cast<double*>(stats.mutable_data_ptr()));
  return stats;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> stage_forward(std::vector<Tensor> inputs, std::vector<Tensor> params, std::vector<Tensor> running,
                                                                           std::optional<Tensor> seed, std::string program, std::vector<double> eps, int64_t winograd) {
  Call c("stage", inputs, params, running, seed, program, eps, winograd, false);
  std::vector<Tensor> outputs, kept;
  c.each(stage::Kind::Kept, [&](const stage::Buffer& b, StageBuffer& memory) {
    kept.push_back(buffer(inputs[0], {c.pixels(b), memory.pitch}));
    memory.x = kept.back().mutable_data_ptr();
  });
  freed_behind_backward(0);
  Tensor stats = outputs_of(c, inputs, outputs);
  if (!c.empty()) isa().stage->forward(c.call);
  return {outputs, kept, stats};
}

// Forward of a program that keeps nothing, with packed weights that calls share: those that an earlier call returned, or none,
// then they are made and returned. Parameters need not be those of then: weights are packed again where they seem to differ.
std::tuple<std::vector<Tensor>, Tensor, std::vector<Tensor>> stage_inference(std::vector<Tensor> inputs, std::vector<Tensor> params, std::vector<Tensor> running,
                                                                             std::vector<Tensor> packed, std::string program, std::vector<double> eps, int64_t winograd) {
  constexpr const char* OP = "stage_inference";
  Call c(OP, inputs, params, running, std::nullopt, program, eps, winograd, false);
  require(c.p.count(stage::Kind::Kept) == 0, {OP, "program"}, "got one that keeps something for backward, expected one of inference");
  std::vector<PackedWeights> shared;
  for (size_t i = 0; i < packed.size(); i++)
    shared.push_back({checked({OP, "packed", int64_t(i)}, packed[i], CODES.int64, {ANY}), packed[i].numel() * int64_t(sizeof(int64_t))});
  std::vector<Tensor> outputs, made;
  struct Keep {
    const Tensor& like;
    std::vector<Tensor>& made;
  } keep{inputs[0], made};
  if (shared.empty()) {
    c.call.keep_context = &keep;
    c.call.keep = [](void* context, int64_t bytes) -> void* {
      Keep& keep = *static_cast<Keep*>(context);
      keep.made.push_back(large(contiguous(keep.like, CODES.int64, {bytes / int64_t(sizeof(int64_t))})));
      return keep.made.back().mutable_data_ptr();
    };
  }
  c.call.packed = shared.data(), c.call.packed_count = int64_t(shared.size());
  Tensor stats = outputs_of(c, inputs, outputs);
  if (!c.empty()) isa().stage->forward(c.call);
  return {outputs, stats, made};
}

// Of what the program says is wanted: inputs, then weights (and biases) of nodes, then weights and biases of norms.
std::vector<Tensor> stage_backward(std::vector<Tensor> grads, std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::vector<Tensor> kept, const Tensor& stats,
                                   std::vector<Tensor> params, std::vector<Tensor> running, std::optional<Tensor> seed, std::string program, std::vector<double> eps,
                                   int64_t winograd) {
  constexpr const char* OP = "stage_backward";
  Call c(OP, inputs, params, running, seed, program, eps, winograd, true);
  const stage::Program& p = c.p;
  check_count({OP, "grads"}, grads.size(), size_t(p.count(stage::Kind::Output)), "a gradient for each output");
  check_count({OP, "outputs"}, outputs.size(), grads.size(), "as many as forward returned");
  check_count({OP, "kept"}, kept.size(), size_t(p.count(stage::Kind::Kept)), "as many as forward returned");
  c.each(stage::Kind::Output, [&](const stage::Buffer& b, StageBuffer& memory) {
    const bool read = c.read[size_t(&b - p.buffers.data())];
    auto memory_of = [&](const char* name, const std::vector<Tensor>& all, Lies how) {
      return image({OP, name, b.index}, all[size_t(b.index)], c.first.dtype, {c.first.N, b.channels, b.side(c.first.H), b.side(c.first.W)}, how).data;
    };
    const void* values = memory_of("outputs", outputs, read ? Lies::Packed : Lies::Anyhow);
    memory.x = read ? const_cast<void*>(values) : nullptr, memory.gradient = memory_of("grads", grads, Lies::Packed);
  });
  int64_t bytes = 0;
  c.each(stage::Kind::Kept, [&](const stage::Buffer& b, StageBuffer& memory) {
    memory.x = csp::kept({OP, "kept", b.index}, kept[size_t(b.index)], c.first.dtype, {c.pixels(b), memory.pitch});
    bytes += kept[size_t(b.index)].numel() * int64_t(kept[size_t(b.index)].element_size());
  });
  freed_behind_backward(bytes);
  c.statistics(statistics_of(OP, stats, p.statistics));
  std::vector<Tensor> result;
  for (int64_t i : p.wanted.inputs) {
    result.push_back(channels_last(inputs[size_t(i)], c.first.N, p.buffers[size_t(i)].channels, c.first.H, c.first.W));
    c.buffers[size_t(i)].dx = result.back().mutable_data_ptr();
  }
  auto gradient = [&](int64_t position) {
    append_gradients(result, {params[size_t(position)]}, c.empty());
    return result.back().mutable_data_ptr();
  };
  for (int64_t node : p.wanted.nodes) c.weights[size_t(node)].dweight = gradient(p.weights[size_t(node)].position);
  for (int64_t norm : p.wanted.norms) {
    c.norms[size_t(norm)].dgamma = gradient(p.norms[size_t(norm)].position);
    c.norms[size_t(norm)].dbeta = gradient(p.norms[size_t(norm)].position + 1);
  }
  if (!c.empty()) isa().stage->backward(c.call);
  return result;
}

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY_FRAGMENT(csp_kernels, m) {
  m.def("stage(Tensor[] inputs, Tensor[] params, Tensor[] running, Tensor? seed, str program, float[] eps, int winograd) "
        "-> (Tensor[] outputs, Tensor[] kept, Tensor stats)");
  m.def("stage_inference(Tensor[] inputs, Tensor[] params, Tensor[] running, Tensor[] packed, str program, float[] eps, int winograd) "
        "-> (Tensor[] outputs, Tensor stats, Tensor[] packed)");
  m.def("stage_backward(Tensor[] grads, Tensor[] inputs, Tensor[] outputs, Tensor[] kept, Tensor stats, Tensor[] params, Tensor[] running, "
        "Tensor? seed, str program, float[] eps, int winograd) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("stage", TORCH_BOX(&csp::stage_forward));
  m.impl("stage_inference", TORCH_BOX(&csp::stage_inference));
  m.impl("stage_backward", TORCH_BOX(&csp::stage_backward));
}
