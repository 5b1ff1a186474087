// What all operators on the CPU share: arguments, checked (checks.h), and fresh tensors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

namespace csp {

// Of an image's dtype, which was checked.
inline Storage storage_of(int32_t dtype) {
  return dtype == CODES.float32 ? Storage::Float32 : dtype == CODES.bfloat16 ? Storage::BFloat16 : dtype == CODES.float16 ? Storage::Float16 : Storage::Float64;
}
inline Slice slice_of(const Shape& s) { return {s.data, s.pitch, s.C, nullptr, 0}; }

inline const Isa& isa() {
  const Isa* chosen = chosen_isa();
  if (!chosen) {
    const char* named = std::getenv("CSP_KERNELS_ISA");
    refuse({"csp_kernels", "CSP_KERNELS_ISA"}, "got ", named ? named : "nothing", ", expected an instruction set that is compiled in (", isas_compiled(), ") and runs on this machine");
  }
  return *chosen;
}

inline Parallel parallel() {
  return {int(torch::stable::get_num_threads()), [](int tasks, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t t = begin; t < end; t++) body(context, int(t));
            });
          }};
}

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
  // What forward kept, `count` tensors; optional: or none.
  Kept(const Argument& a, const std::vector<Tensor>& given, int32_t dtype, int64_t count, Sizes size, bool optional = false) : tensors(given) {
    const bool none = optional && given.empty();
    if (!none) check_count(a, given.size(), size_t(count), optional ? "one a layer, or none at all" : "as many as forward returned");
    for (size_t i = 0; i < given.size(); i++) pointers.push_back(const_cast<void*>(checked({a.op, a.name, int64_t(i)}, given[i], dtype, size)));
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
// [2, columns] of a forward.
inline double* statistics_of(const char* op, const Tensor& stats, int64_t columns) {
  return const_cast<double*>(static_cast<const double*>(checked({op, "stats"}, stats, CODES.float64, {2, columns})));
}
// Something a forward kept for its backward.
inline void* kept(const Argument& a, const Tensor& t, int32_t dtype, Sizes size) { return const_cast<void*>(checked(a, t, dtype, size)); }
// Gradients of parameters, each as its parameter lies.
inline void append_gradients(std::vector<Tensor>& grads, const std::vector<Tensor>& params, bool zero) {
  for (const Tensor& p : params) {
    grads.push_back(empty_strided(p, dtype_of(p), {p.sizes().begin(), p.sizes().end()}, {p.strides().begin(), p.strides().end()}));
    if (zero) memset(grads.back().mutable_data_ptr(), 0, size_t(p.numel()) * p.element_size());
  }
}

// The parameters and the norms of a call, in order, each checked when it is taken.
class Parameters {
  const int32_t dtype;
  const std::vector<Tensor>&params, &running;
  const std::vector<int64_t>* frozen;  // null: all are
  const std::vector<double>& eps;
  size_t at = 0, norm = 0, statistic = 0;

  const Tensor& take(const char* name, const std::vector<Tensor>& from, size_t i, const char* what) const {
    require(i < from.size(), {op, name}, "got ", from.size(), " tensors, expected more: ", what);
    return from[i];
  }
  const void* running_statistic(int64_t channels, const char* role) {
    const Tensor& t = take("running", running, statistic, "mean and variance of each frozen norm");
    return checked({op, "running", int64_t(statistic++), role}, t, dtype, {channels});
  }

 public:
  const char* const op;

  size_t layers;

  // image_dtype: of what they are applied to. each: tensors a layer, in front of `last` others.
  Parameters(const char* op, int32_t image_dtype, const std::vector<Tensor>& params, const std::vector<Tensor>& running,
             const std::vector<int64_t>* frozen, const std::vector<double>& eps, size_t each, size_t last = 0)
      : dtype(CODES.accumulation(image_dtype)), params(params), running(running), frozen(frozen), eps(eps), op(op) {
    const bool whole = params.size() > last && (params.size() - last) % each == 0;
    if (last) require(whole, {op, "params"}, "got ", params.size(), " tensors, expected ", each, " a layer, at least one layer, and ", last, " for the transition");
    require(whole, {op, "params"}, "got ", params.size(), " tensors, expected ", each, " a layer, at least one layer");
    layers = (params.size() - last) / each;
    const size_t norms = params.size() / 3;  // of 3 tensors each
    if (frozen) check_flags(op, "frozen", *frozen, norms, "a flag for each norm");
    check_count({op, "eps"}, eps.size(), norms, "a number for each norm");
    for (size_t i = 0; i < norms; i++) check_eps({op, "eps", int64_t(i)}, eps[i], fixed(i));
  }
  bool fixed(size_t i) const { return !frozen || (*frozen)[i]; }

  // The output channels of the convolution whose weight is `ahead` of the next parameter.
  int64_t rows(size_t ahead, const char* role, int64_t in, int64_t taps) const {
    const Argument a{op, "params", int64_t(at + ahead), role};
    const Tensor& t = take("params", params, at + ahead, role);
    checked(a, t, dtype, {ANY, in, taps, taps}, taps > 1 ? Lies::Either : Lies::Contiguous);
    require(t.size(0) > 0, a, "got ", Shown{t}, ", expected at least one output channel");
    return t.size(0);
  }
  const void* next(const char* role, Sizes size, Lies how = Lies::Contiguous) {
    const void* data = checked({op, "params", int64_t(at), role}, take("params", params, at, role), dtype, size, how);
    at++;
    return data;
  }
  // A 3x3 weight, and whether it lies as [out, 3, 3, in] and not as contiguous too.
  const void* next(const char* role, int64_t out, int64_t in, bool& channels_last) {
    const void* data = next(role, {out, in, 3, 3}, Lies::Either);
    channels_last = !Extent(params[at - 1]).contiguous();
    return data;
  }
  // The eps of the next norm, and its running statistics if it is frozen, else null.
  void next_norm(int64_t channels, double& epsilon, const void*& mean, const void*& var) {
    epsilon = eps[norm], mean = var = nullptr;
    if (fixed(norm++)) mean = running_statistic(channels, "mean"), var = running_statistic(channels, "variance");
  }
  void end() const {
    check_count({op, "running"}, running.size(), statistic, "mean and variance of each frozen norm");
  }
};

}  // namespace csp
