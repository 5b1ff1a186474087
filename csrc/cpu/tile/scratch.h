// Per-thread scratch memory with stack discipline, kept between calls; and the loop over tasks.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <cstdlib>
#include <new>
#include "../dense_block.h"
#include "vec.h"

namespace csp::CSP_ISA {

// A chain of blocks; a Frame gives back what was taken since it began. Once nothing is in use, a chain becomes one block.
class Arena {
 public:
  ~Arena() { release(); }
  template <class T> T* take(int64_t n) {
    int64_t bytes = round_up(n * int64_t(sizeof(T)) + 64, 64);
    while (block_ < blocks_ && used_ + bytes > size_[block_]) block_++, used_ = 0;
    if (block_ == blocks_) grow(bytes);
    char* p = base_[block_] + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(p);
  }
  void rewind(int block, int64_t used) {
    block_ = block, used_ = used;
    if (block == 0 && used == 0 && blocks_ > 1) release();
  }
  int block_ = 0;
  int64_t used_ = 0;

 private:
  static constexpr int MAX = 40;
  static constexpr int64_t PAGE = int64_t(2) << 20;  // a huge page
  int blocks_ = 0;
  int64_t reserve_ = PAGE;
  char* base_[MAX];
  int64_t size_[MAX];

  void grow(int64_t bytes) {
    int64_t size = round_up(max64(bytes, blocks_ ? PAGE : reserve_), PAGE);
    void* p = blocks_ < MAX ? aligned_alloc(size_t(PAGE), size_t(size)) : nullptr;
    if (!p) throw std::bad_alloc();
#if defined(__linux__)
    madvise(p, size_t(size), MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
    base_[blocks_] = static_cast<char*>(p), size_[blocks_] = size, blocks_++;
    used_ = 0;
  }
  void release() {
    reserve_ = 0;
    for (int i = 0; i < blocks_; i++) reserve_ += size_[i], free(base_[i]);
    blocks_ = 0;
  }
};

inline Arena& arena() { static thread_local Arena a; return a; }

struct Frame {
  Arena& a = arena();
  int block = a.block_;
  int64_t used = a.used_;
  template <class T> T* take(int64_t n) { return a.take<T>(n); }
  template <class T> T* zeroed(int64_t n) {
    T* p = a.take<T>(n);
    memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T));
    return p;
  }
  ~Frame() { a.rewind(block, used); }
};

template <class F> inline void for_tasks(const Parallel& parallel, int tasks, F body) {
  if (tasks == 1) { body(0); return; }
  parallel.run(tasks, [](void* f, int task) { (*static_cast<F*>(f))(task); }, &body);
}
// As many tasks as threads, but each worth starting: about 20 microseconds of products.
inline int choose_tasks(const Parallel& parallel, int64_t items, double flops) {
  int64_t worth = int64_t(flops / 3e6) + 1;
  return int(max64(1, min64(min64(items, parallel.threads), worth)));
}
struct Range { int64_t begin, end; };
inline Range share(int64_t n, int task, int tasks) { return {n * task / tasks, n * (task + 1) / tasks}; }

// What one task adds up in a backward pass: a weight gradient and two sums a channel.
template <class T> struct PartialSums {
  T *weight, *sum, *sum_x;
  static PartialSums* take(Frame& frame, int tasks, int64_t weights, int64_t channels) {
    PartialSums* parts = frame.take<PartialSums>(tasks);
    for (int t = 0; t < tasks; t++) parts[t] = {frame.take<T>(weights), frame.take<T>(channels), frame.take<T>(channels)};
    return parts;
  }
  void clear(int64_t weights, int64_t channels) const {
    memset(weight, 0, size_t(weights) * sizeof(T));
    memset(sum, 0, size_t(channels) * sizeof(T)), memset(sum_x, 0, size_t(channels) * sizeof(T));
  }
};

}  // namespace csp::CSP_ISA
