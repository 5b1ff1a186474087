// What all operators on the CPU share: arguments, checked (checks.h), and fresh tensors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

namespace csp {

// Of an image's dtype, which was checked.
inline Storage storage_of(int32_t dtype) {
  return dtype == CODES.float32 ? Storage::Float32 : dtype == CODES.bfloat16 ? Storage::BFloat16 : dtype == CODES.float16 ? Storage::Float16 : Storage::Float64;
}

inline const Isa& isa() {
  const Isa* chosen = chosen_isa();
  if (!chosen) {
    const char* named = std::getenv("CSP_KERNELS_ISA");
    refuse({"csp_kernels", "CSP_KERNELS_ISA"}, "got ", named ? named : "nothing", ", expected an instruction set that is compiled in (", isas_compiled(), ") and runs on this machine");
  }
  return *chosen;
}

// The tasks of one thread that nobody has begun, from `begin` to `end`, in one word: it takes the first, others that have none left
// take the last. None: -1.
class alignas(64) TaskShare {
 public:
  void set(int64_t begin, int64_t end) { left_.store(uint64_t(begin) << 32 | uint64_t(end), std::memory_order_relaxed); }
  int take_first() { return take(uint64_t(1) << 32, [](uint64_t left) { return int(left >> 32); }); }
  int take_last() { return take(~uint64_t(0), [](uint64_t left) { return int(uint32_t(left)) - 1; }); }

 private:
  template <class Task> int take(uint64_t change, Task task) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    while ((left >> 32) < uint32_t(left))
      if (left_.compare_exchange_weak(left, left + change, std::memory_order_relaxed)) return task(left);
    return -1;
  }
  std::atomic<uint64_t> left_{0};
};

// A thread begins with its share of the tasks, in order, and then helps the others: cores are not equally fast, nor are tasks equally
// large. As what a task writes is mostly read by the same task of the next loop, most of it stays in the caches of one core; where
// cores do not share their last cache, whatever crosses comes half as fast.
inline Parallel parallel() {
  return {int(torch::stable::get_num_threads()), [](int tasks, void (*body)(void*, int), void* context) {
            const int64_t threads = std::min(tasks, int(torch::stable::get_num_threads()));
            std::vector<TaskShare> shares(static_cast<size_t>(threads));
            for (int64_t t = 0; t < threads; t++) shares[size_t(t)].set(tasks * t / threads, tasks * (t + 1) / threads);
            torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
              for (int task; (task = shares[size_t(thread)].take_first()) >= 0;) body(context, task);
              for (int64_t other = 1; other < threads; other++)
                for (int task; (task = shares[size_t((thread + other) % threads)].take_last()) >= 0;) body(context, task);
            });
          }};
}

#if defined(__GLIBC__)
// glibc gives the end of its heap back to the system when more of it is free than twice the largest block it has seen freed, up to
// 32 MiB: gradients and outputs of a step would be page faults of the next one. A block of that size, never touched, says so at once
// what a larger batch would have said later. Thresholds that its owner has set stay as they are.
inline bool keep_freed_heap() {
  void* volatile block = std::malloc((size_t(32) << 20) - 8192);
  std::free(block);
  return true;
}
// What calls kept is freed behind backward, all in a moment: a heap that is given back then would be page faults of the next step. So
// twice as much stays with the process as the backward calls that followed each other without a forward were given (bytes: by one of
// them; 0: a forward call).
inline void freed_behind_backward(int64_t bytes) {
  static const bool owned = std::getenv("MALLOC_TRIM_THRESHOLD_") || std::getenv("MALLOC_MMAP_THRESHOLD_") || std::getenv("GLIBC_TUNABLES");
  static std::atomic<int64_t> in_a_row{0}, most{int64_t(64) << 20};
  if (!bytes) return in_a_row.store(0, std::memory_order_relaxed);
  const int64_t given = in_a_row.fetch_add(bytes, std::memory_order_relaxed) + bytes, wanted = std::min<int64_t>(2 * given, std::numeric_limits<int>::max());
  int64_t now = most.load(std::memory_order_relaxed);
  while (!owned && wanted > now)
    if (most.compare_exchange_weak(now, wanted, std::memory_order_relaxed)) return void(mallopt(M_TRIM_THRESHOLD, int(wanted)));
}
#else
inline bool keep_freed_heap() { return true; }
inline void freed_behind_backward(int64_t) {}
#endif

// Asks for huge pages behind a fresh large tensor: a step touches it once, and page faults would cost as much as the work.
inline Tensor large(Tensor t) {
#if defined(__linux__)
  static const bool kept = keep_freed_heap();
  (void)kept;
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

}  // namespace csp
