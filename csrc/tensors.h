// Tensors at the operators' door: what kernels need to know of them, checked.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

inline Tensor channels_last(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W) {
  Tensor flat = large(torch::stable::new_empty(like, {N, H, W, C}));
  return torch::stable::transpose(torch::stable::transpose(flat, 2, 3), 1, 2);
}

// A parameter or statistic: contiguous, in the accumulation type of x, with numel elements.
inline const void* parameter(const char* op, const Tensor& x, const Tensor& t, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous() && t.scalar_type() == accumulation_type(x) && t.is_cpu(), op, ": ", name, " must be contiguous, in the accumulation type, with ", numel, " elements");
  return t.const_data_ptr();
}

}  // namespace csp
