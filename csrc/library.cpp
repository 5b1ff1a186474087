// Operator schemas and their CPU entry points, on the libtorch stable ABI: no Python, no pybind.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dense_block.h"
#include "cpu/isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace csp {
namespace {

void run_tasks(int tasks, void (*body)(void*, int), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) body(context, int(t));
  });
}

Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Storage::Float32;
    case ScalarType::BFloat16: return Storage::BFloat16;
    case ScalarType::Half: return Storage::Float16;
    case ScalarType::Double: return Storage::Float64;
    default: STD_TORCH_CHECK(false, "dense_block: x must be float32, bfloat16, float16 or float64"); return Storage::Float32;
  }
}
ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const Isa& isa() {
  const Isa* chosen = chosen_isa();
  STD_TORCH_CHECK(chosen, "csp_kernels: CSP_KERNELS_ISA must name an instruction set that is compiled in (", isas_compiled(), ") and runs on this machine; got ", std::getenv("CSP_KERNELS_ISA"));
  return *chosen;
}
const DenseBlockKernels& cpu_kernels() { return *isa().kernels; }

struct Shape {
  int64_t N, C, H, W;
  explicit Shape(const Tensor& x) : N(0), C(0), H(0), W(0) {
    STD_TORCH_CHECK(x.dim() == 4, "dense_block: expected a 4-D tensor [N, C, H, W], got ", x.dim(), "-D");
    N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
    const int64_t want[4] = {H * W * C, 1, W * C, C}, size[4] = {N, C, H, W};
    for (int i = 0; i < 4; i++)
      STD_TORCH_CHECK(size[i] <= 1 || N * C * H * W == 0 || x.stride(i) == want[i], "dense_block: tensor is not channels_last contiguous");
  }
};

// A fresh tensor on the CPU, by the C interface: boxed calls of the dispatcher would be most of a small block's overhead.
// In two steps, since this new_empty heeds torch.utils.deterministic.fill_uninitialized_memory and its empty_strided does not.
Tensor empty_strided(const Tensor& like, int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  int64_t numel = 1;
  for (int64_t n : size) numel *= n;
  AtenTensorHandle flat, made;
  int32_t layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), &numel, 1, &dtype, &layout, &device, 0, nullptr, &flat));
  Tensor owner(flat);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(flat, int64_t(size.size()), size.data(), stride.data(), 0, &made));
  return Tensor(made);
}
int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
Tensor contiguous(const Tensor& like, int32_t dtype, const std::vector<int64_t>& size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size() - 1; i > 0; i--) stride[i - 1] = stride[i] * size[i];
  return empty_strided(like, dtype, size, stride);
}
Tensor channels_last(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W) {
  return empty_strided(like, dtype_of(like), {N, C, H, W}, {H * W * C, 1, W * C, C});
}

// Asks for huge pages behind a fresh large tensor: a step touches it once, and page faults would cost as much as the work.
Tensor large(Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = uintptr_t(2) << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), end = begin + size_t(t.numel()) * t.element_size();
  begin = (begin + PAGE - 1) / PAGE * PAGE, end = end / PAGE * PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
  return t;
}

// The arguments that forward, backward and inference share, checked.
struct Call {
  DenseBlock block{};
  std::vector<DenseLayer> layers;

  Call(const Tensor& x, int64_t in_channels, const std::vector<Tensor>& params, const std::vector<Tensor>& running,
       const std::vector<int64_t>* frozen, const std::vector<double>& eps, int64_t winograd) {
    Shape s(x);
    STD_TORCH_CHECK(!params.empty() && params.size() % 6 == 0, "dense_block: params must hold 6 tensors a layer, got ", params.size());
    size_t L = params.size() / 6;
    STD_TORCH_CHECK(eps.size() == 2 * L, "dense_block: eps must hold 2 numbers a layer");
    STD_TORCH_CHECK(!frozen || frozen->size() == 2 * L, "dense_block: frozen must hold 2 flags a layer");
    STD_TORCH_CHECK(winograd == 2 || winograd == 4, "dense_block: winograd must be 2 or 4, got ", winograd);
    block.storage = storage_of(x);
    block.N = s.N, block.H = s.H, block.W = s.W, block.in_channels = in_channels;
    block.bottleneck = params[2].size(0), block.growth = params[5].size(0), block.num_layers = int64_t(L);
    STD_TORCH_CHECK(block.growth <= 4096, "dense_block: growth rate above 4096");
    block.winograd = int(winograd);
    block.parallel = {int(torch::stable::get_num_threads()), run_tasks};
    layers.resize(L);
    ScalarType acc = accumulation_type(x);
    auto pointer = [&](const Tensor& t, int64_t numel, const char* name, bool dense = false) -> const void* {
      STD_TORCH_CHECK(t.numel() == numel && (dense || t.is_contiguous()) && t.scalar_type() == acc && t.is_cpu(), "dense_block: ", name, " must be contiguous, in the accumulation type, with ", numel, " elements");
      return t.const_data_ptr();
    };
    size_t r = 0;
    for (size_t l = 0; l < L; l++) {
      DenseLayer& p = layers[l];
      int64_t K = block.prefix(int64_t(l)), b = block.bottleneck, g = block.growth;
      p.gamma1 = pointer(params[6 * l], K, "norm1.weight"), p.beta1 = pointer(params[6 * l + 1], K, "norm1.bias");
      p.w1 = pointer(params[6 * l + 2], b * K, "conv1.weight");
      p.gamma2 = pointer(params[6 * l + 3], b, "norm2.weight"), p.beta2 = pointer(params[6 * l + 4], b, "norm2.bias");
      const Tensor& w2 = params[6 * l + 5];
      p.w2_channels_last = !w2.is_contiguous() && w2.dim() == 4 && (g == 1 || w2.stride(0) == 9 * b) && w2.stride(1) == 1 &&
                           w2.stride(2) == 3 * b && w2.stride(3) == b;
      p.w2 = pointer(w2, 9 * g * b, "conv2.weight", p.w2_channels_last);
      p.eps1 = eps[2 * l], p.eps2 = eps[2 * l + 1];
      auto take = [&](int64_t n, const void*& mean, const void*& var) {
        STD_TORCH_CHECK(r + 2 <= running.size(), "dense_block: running lacks statistics of a frozen norm");
        mean = pointer(running[r], n, "running_mean"), var = pointer(running[r + 1], n, "running_var"), r += 2;
      };
      if (!frozen || (*frozen)[2 * l]) take(K, p.mean1, p.var1);
      if (!frozen || (*frozen)[2 * l + 1]) take(b, p.mean2, p.var2);
    }
    STD_TORCH_CHECK(r == running.size(), "dense_block: running holds more statistics than there are frozen norms");
    block.layers = layers.data();
  }
  bool empty() const { return block.pixels() == 0; }
  void dropout(double rate, const std::optional<Tensor>& seed) {
    STD_TORCH_CHECK(rate >= 0 && rate <= 1, "dense_block: drop_rate must be in [0, 1], got ", rate);
    STD_TORCH_CHECK(rate == 0 || seed.has_value(), "dense_block: drop_rate > 0 needs a seed");
    block.drop_rate = rate;
    if (rate > 0) block.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
};

std::tuple<Tensor, Tensor, Tensor> dense_block(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running,
                                               std::vector<int64_t> frozen, std::vector<double> eps, std::optional<Tensor> seed,
                                               double drop_rate, bool keep_bottleneck, int64_t winograd) {
  Call call(x, x.size(1), params, running, &frozen, eps, winograd);
  call.dropout(drop_rate, seed);
  DenseBlock& a = call.block;
  Tensor y = large(channels_last(x, a.N, a.channels(), a.H, a.W));
  Tensor stats = contiguous(x, aoti_torch_dtype_float64(), {2, a.channels() + a.num_layers * a.bottleneck});
  memset(stats.mutable_data_ptr(), 0, size_t(stats.numel()) * sizeof(double));
  Tensor z = keep_bottleneck ? large(contiguous(x, dtype_of(x), {a.num_layers, a.pixels(), a.z_pitch()})) : contiguous(x, dtype_of(x), {0});
  a.x = x.const_data_ptr(), a.features = y.mutable_data_ptr(), a.z = keep_bottleneck ? z.mutable_data_ptr() : nullptr;
  a.mean = static_cast<double*>(stats.mutable_data_ptr()), a.var = a.mean + a.channels() + a.num_layers * a.bottleneck;
  if (!call.empty()) cpu_kernels().forward(a);
  return {y, z, stats};
}

std::vector<Tensor> dense_block_backward(const Tensor& grad_y, const Tensor& y, const Tensor& z, const Tensor& stats,
                                         std::vector<Tensor> params, std::vector<Tensor> running, std::vector<int64_t> frozen,
                                         std::vector<double> eps, std::optional<Tensor> seed, double drop_rate,
                                         int64_t in_channels, int64_t winograd) {
  Call call(y, in_channels, params, running, &frozen, eps, winograd);
  call.dropout(drop_rate, seed);
  DenseBlock& a = call.block;
  Shape grad(grad_y);
  STD_TORCH_CHECK(grad.N == a.N && grad.C == a.channels() && grad.H == a.H && grad.W == a.W && grad_y.scalar_type() == y.scalar_type(),
                  "dense_block_backward: grad_y must have the shape and dtype of y");
  bool kept = z.numel() > 0;
  STD_TORCH_CHECK(!kept || z.numel() == a.num_layers * a.pixels() * a.z_pitch(), "dense_block_backward: z has the wrong size");
  std::vector<Tensor> grads{large(channels_last(y, a.N, in_channels, a.H, a.W))};
  for (const Tensor& p : params) {  // each as its parameter lies
    grads.push_back(empty_strided(p, dtype_of(p), {p.sizes().begin(), p.sizes().end()}, {p.strides().begin(), p.strides().end()}));
    if (call.empty()) memset(grads.back().mutable_data_ptr(), 0, size_t(p.numel()) * p.element_size());
  }
  if (call.empty()) return grads;
  for (size_t l = 0; l < call.layers.size(); l++) {
    DenseLayer& p = call.layers[l];
    void** slots[6] = {&p.dgamma1, &p.dbeta1, &p.dw1, &p.dgamma2, &p.dbeta2, &p.dw2};
    for (size_t i = 0; i < 6; i++) *slots[i] = grads[1 + 6 * l + i].mutable_data_ptr();
  }
  a.features = const_cast<void*>(y.const_data_ptr()), a.z = kept ? const_cast<void*>(z.const_data_ptr()) : nullptr;
  a.mean = const_cast<double*>(static_cast<const double*>(stats.const_data_ptr()));
  a.var = a.mean + a.channels() + a.num_layers * a.bottleneck;
  a.grad_features = grad_y.const_data_ptr();
  a.dx = grads[0].mutable_data_ptr();
  cpu_kernels().backward(a);
  return grads;
}

Tensor dense_block_inference(const Tensor& x, std::vector<Tensor> params, std::vector<Tensor> running, std::vector<double> eps,
                             int64_t winograd) {
  Call call(x, x.size(1), params, running, nullptr, eps, winograd);
  DenseBlock& a = call.block;
  Tensor y = large(channels_last(x, a.N, a.channels(), a.H, a.W));
  a.x = x.const_data_ptr(), a.features = y.mutable_data_ptr();
  if (!call.empty()) cpu_kernels().inference(a);
  return y;
}

std::string cpu_isa() { return isa().name; }
std::string cpu_isas() { return isas_compiled(); }

}  // namespace
}  // namespace csp

STABLE_TORCH_LIBRARY(csp_kernels, m) {
  m.def("dense_block(Tensor x, Tensor[] params, Tensor[] running, int[] frozen, float[] eps, Tensor? seed, float drop_rate, "
        "bool keep_bottleneck, int winograd) -> (Tensor, Tensor, Tensor)");
  m.def("dense_block_backward(Tensor grad_y, Tensor y, Tensor z, Tensor stats, Tensor[] params, Tensor[] running, int[] frozen, "
        "float[] eps, Tensor? seed, float drop_rate, int in_channels, int winograd) -> Tensor[]");
  m.def("dense_block_inference(Tensor x, Tensor[] params, Tensor[] running, float[] eps, int winograd) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CPU, m) {
  m.impl("dense_block", TORCH_BOX(&csp::dense_block));
  m.impl("dense_block_backward", TORCH_BOX(&csp::dense_block_backward));
  m.impl("dense_block_inference", TORCH_BOX(&csp::dense_block_inference));
}
STABLE_TORCH_LIBRARY_IMPL(csp_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&csp::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&csp::cpu_isas));
}
