// Scratch memory with stack discipline, and the loop over tasks.
#pragma once
#include <atomic>
#include <exception>
#include "../call.h"
#include "../scratch.h"
#include "vec.h"

namespace csp::CSP_ISA {

// What is taken from a frame is given back when it ends. Its contents are whatever was there before.
class Frame {
 public:
  Frame() {
    if (s_.frames++ == 0) enter_scratch(s_);
    block_ = s_.block, at_ = s_.at;
  }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;
  ~Frame() {
    if (s_.block) s_.peak = max64(s_.peak, s_.block->before + (s_.at - reinterpret_cast<char*>(s_.block)));
    s_.block = block_, s_.at = at_, s_.end = block_ ? reinterpret_cast<char*>(block_) + block_->bytes : nullptr;
    poison_free();
    if (--s_.frames == 0) leave_scratch(s_);
  }
  template <class T> T* take(int64_t n) {
    int64_t size = n * int64_t(sizeof(T)), bytes = round_up(size, 64) + RED_ZONE;
    if (s_.end - s_.at < bytes) grow_scratch(s_, bytes);
    char* p = s_.at + RED_ZONE - 64;
    s_.at += bytes;
#if defined(CSP_SANITIZE)  // nobody may count on what fresh memory holds
    CSP_UNPOISON(p, size);
    memset(p, 0xff, size_t(size));
#endif
    return reinterpret_cast<T*>(p);
  }
  template <class T> T* zeroed(int64_t n) {
    T* p = take<T>(n);
    memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T));
    return p;
  }

 private:
#if defined(CSP_SANITIZE)
  static constexpr int64_t RED_ZONE = 128;  // half before, half behind
#else
  static constexpr int64_t RED_ZONE = 64;   // behind: arrays of a power of two of bytes would share cache sets
#endif
  void poison_free() const {
#if defined(CSP_SANITIZE)
    if (block_) CSP_POISON(s_.at, s_.end - s_.at);
    for (ScratchBlock* b = block_ ? block_->next : s_.first; b; b = b->next) CSP_POISON(b + 1, b->bytes - int64_t(sizeof(*b)));
#endif
  }
  Scratch& s_ = scratch_of_thread();
  ScratchBlock* block_;
  char* at_;
};

// The first exception of the tasks, to be thrown where they were started: threads that run them know nothing of exceptions.
class TaskError {
 public:
  bool happened() const { return happened_.load(std::memory_order_relaxed); }
  void keep() noexcept {
    if (!happened_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
  }
  void rethrow() const { if (error_) std::rethrow_exception(error_); }

 private:
  std::atomic<bool> happened_{false};
  std::exception_ptr error_;
};

template <class F> inline void for_tasks(const Parallel& parallel, int tasks, F body) {
  if (tasks == 1) { body(0); return; }
  struct Call {
    F& body;
    TaskError error;
  } call{body, {}};
  parallel.run(tasks, [](void* c, int task) {
    Call& call = *static_cast<Call*>(c);
    if (call.error.happened()) return;
    try { call.body(task); } catch (...) { call.error.keep(); }
  }, &call);
  call.error.rethrow();
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

// What the tasks of a weight gradient share. Where its sums are larger than what it reads (many channels, few pixels), the input's
// channels and not the pixels: then there is one set of sums, each written by one task, instead of one for each task. sums: bytes of a
// set; reads: bytes.
inline bool shares_channels(int tasks, int64_t sums, int64_t reads) { return tasks > 1 && sums * tasks > reads; }

}  // namespace csp::CSP_ISA
