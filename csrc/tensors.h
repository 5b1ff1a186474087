// Tensors at the operators' door: what kernels need to know of them, checked.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <vector>

#include "cpu/isa.h"

namespace csp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Storage::Float32;
    case ScalarType::BFloat16: return Storage::BFloat16;
    case ScalarType::Half: return Storage::Float16;
    case ScalarType::Double: return Storage::Float64;
    default: STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16, float16 or float64"); return Storage::Float32;
  }
}
inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const Isa& isa() {
  const Isa* chosen = chosen_isa();
  STD_TORCH_CHECK(chosen, "csp_kernels: CSP_KERNELS_ISA must name an instruction set that is compiled in (", isas_compiled(), ") and runs on this machine; got ", std::getenv("CSP_KERNELS_ISA"));
  return *chosen;
}

inline Parallel parallel() {
  return {int(torch::stable::get_num_threads()), [](int tasks, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t t = begin; t < end; t++) body(context, int(t));
            });
          }};
}

// [N, C, H, W] in channels_last order; pixels may lie further apart than C elements (a channel slice of a larger tensor).
struct Shape {
  int64_t N, C, H, W, pitch;
  Shape(const char* op, const Tensor& x) : N(0), C(0), H(0), W(0), pitch(0) {
    STD_TORCH_CHECK(x.dim() == 4, op, ": expected a 4-D tensor [N, C, H, W], got ", x.dim(), "-D");
    N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
    pitch = W > 1 ? x.stride(3) : H > 1 ? x.stride(2) : N > 1 ? x.stride(0) : C;
    if (N * C * H * W == 0) pitch = C;
    const int64_t want[4] = {H * W * pitch, 1, W * pitch, pitch}, size[4] = {N, C, H, W};
    for (int i = 0; i < 4; i++)
      STD_TORCH_CHECK(size[i] <= 1 || N * C * H * W == 0 || x.stride(i) == want[i], op, ": tensor is not channels_last, nor a channel slice of one");
    STD_TORCH_CHECK(pitch >= C, op, ": pixels overlap");
  }
  int64_t pixels() const { return N * H * W; }
  void dense(const char* op) const { STD_TORCH_CHECK(pitch == C, op, ": tensor is not channels_last contiguous"); }
  void same(const char* op, const Shape& s) const { STD_TORCH_CHECK(N == s.N && H == s.H && W == s.W, op, ": inputs of different size"); }
};

// Asks for huge pages behind a fresh large tensor: a step touches it once, and page faults would cost as much as the work.
inline Tensor large(Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = uintptr_t(2) << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), end = begin + size_t(t.numel()) * t.element_size();
  begin = (begin + PAGE - 1) / PAGE * PAGE, end = end / PAGE * PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
  return t;
}

// A fresh tensor on the CPU, by the C interface: boxed calls of the dispatcher would be most of a small block's overhead.
// In two steps, since this new_empty heeds torch.utils.deterministic.fill_uninitialized_memory and its empty_strided does not.
inline Tensor empty_strided(const Tensor& like, int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  int64_t numel = 1;
  for (int64_t n : size) numel *= n;
  AtenTensorHandle flat, made;
  int32_t layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), &numel, 1, &dtype, &layout, &device, 0, nullptr, &flat));
  Tensor owner(flat);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(flat, int64_t(size.size()), size.data(), stride.data(), 0, &made));
  return large(Tensor(made));
}
inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
inline Tensor contiguous(const Tensor& like, int32_t dtype, const std::vector<int64_t>& size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size() - 1; i > 0; i--) stride[i - 1] = stride[i] * size[i];
  return empty_strided(like, dtype, size, stride);
}
// In the dtype of `like`.
inline Tensor buffer(const Tensor& like, const std::vector<int64_t>& size) { return contiguous(like, dtype_of(like), size); }
inline Tensor channels_last(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W) {
  return empty_strided(like, dtype_of(like), {N, C, H, W}, {H * W * C, 1, W * C, C});
}
// What layers keep, a tensor each: large allocations go back to the system and come back as page faults, smaller ones do not.
struct Kept {
  std::vector<Tensor> tensors;
  std::vector<void*> pointers;
  Kept() = default;
  Kept(const Tensor& like, int64_t count, const std::vector<int64_t>& size) {
    for (int64_t i = 0; i < count; i++) tensors.push_back(buffer(like, size));
    point();
  }
  Kept(const char* op, const std::vector<Tensor>& given, int64_t count, int64_t numel) : tensors(given) {  // none or all
    STD_TORCH_CHECK(given.empty() || int64_t(given.size()) == count, op, "_backward: what forward kept has the wrong number of tensors");
    for (const Tensor& t : given) STD_TORCH_CHECK(t.numel() == numel, op, "_backward: what forward kept has the wrong size");
    point();
  }
  void* const* data() const { return pointers.empty() ? nullptr : pointers.data(); }

 private:
  void point() { for (const Tensor& t : tensors) pointers.push_back(const_cast<void*>(t.const_data_ptr())); }
};
inline Tensor statistics(const Tensor& like, int64_t columns) {
  Tensor stats = contiguous(like, aoti_torch_dtype_float64(), {2, columns});
  memset(stats.mutable_data_ptr(), 0, size_t(stats.numel()) * sizeof(double));
  return stats;
}
// Gradients of parameters, each as its parameter lies.
inline void append_gradients(std::vector<Tensor>& grads, const std::vector<Tensor>& params, bool zero) {
  for (const Tensor& p : params) {
    grads.push_back(empty_strided(p, dtype_of(p), {p.sizes().begin(), p.sizes().end()}, {p.strides().begin(), p.strides().end()}));
    if (zero) memset(grads.back().mutable_data_ptr(), 0, size_t(p.numel()) * p.element_size());
  }
}

// [g, b, 3, 3] that lies as [g, 3, 3, b] and not as contiguous too.
inline bool is_channels_last(const Tensor& w) {
  if (w.is_contiguous() || w.dim() != 4) return false;
  int64_t b = w.size(1);
  return (w.size(0) == 1 || w.stride(0) == 9 * b) && w.stride(1) == 1 && w.stride(2) == 3 * b && w.stride(3) == b;
}
// A parameter or statistic: contiguous (or known to be channels_last), in the accumulation type of x, with numel elements.
inline const void* parameter(const char* op, const Tensor& x, const Tensor& t, int64_t numel, const char* name, bool channels_last = false) {
  STD_TORCH_CHECK(t.numel() == numel && (channels_last || t.is_contiguous()) && t.scalar_type() == accumulation_type(x) && t.is_cpu(), op, ": ", name, " must be contiguous, in the accumulation type, with ", numel, " elements");
  return t.const_data_ptr();
}

}  // namespace csp
