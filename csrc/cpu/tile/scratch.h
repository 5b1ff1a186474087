// Scratch memory with stack discipline, and the loop over tasks.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
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

// The last three rows of a map that a loop over rows made, each `length` values.
template <class T> class LastRows {
  int64_t length, held[3];
  T* memory;

 public:
  LastRows(Frame& frame, int64_t length) : length(length), memory(frame.take<T>(3 * length)) { forget(); }
  void forget() { held[0] = held[1] = held[2] = -1; }
  // Row `at`, which make(memory) makes unless it is there.
  template <class Make> const T* row(int64_t at, const Make& make) {
    T* to = memory + at % 3 * length;
    if (held[at % 3] != at) held[at % 3] = at, make(to);
    return to;
  }
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
constexpr double WORTH = 3e6;  // FLOPs for which a task is started: about 20 microseconds of products
// As many tasks as threads, but each worth starting.
inline int choose_tasks(const Parallel& parallel, int64_t items, double flops) {
  int64_t worth = int64_t(flops / WORTH) + 1;
  return int(max64(1, min64(min64(items, parallel.threads), worth)));
}
constexpr int PIECES = 4;  // of a thread
inline int most_pieces(const Parallel& parallel) { return PIECES * parallel.threads; }
// More tasks than threads, for the faster thread to take more of them, where a task leaves little behind: what all leave behind
// (sums: bytes of one task's) is to be small beside what they read. Each is worth starting, and threads have as many.
inline int choose_pieces(const Parallel& parallel, int64_t items, double flops, double sums = 0, double reads = 0) {
  const int tasks = choose_tasks(parallel, items, flops);
  if (tasks < parallel.threads || tasks == 1) return tasks;
  double pieces = std::min({double(PIECES), double(items) / tasks, flops / WORTH / tasks});
  if (sums > 0) pieces = std::min(pieces, reads / (8 * sums * tasks));
  return tasks * std::max(1, int(pieces));
}
struct Range { int64_t begin, end; };
inline Range share(int64_t n, int task, int tasks) { return {n * task / tasks, n * (task + 1) / tasks}; }

// How tasks share a product's output: its rows (pixels) in so many parts, its panels of channels in so many.
struct Shares {
  int rows, panels;
  int tasks() const { return rows * panels; }
  int row(int task) const { return task / panels; }
  Range rows_of(int64_t n, int task) const { return share(n, row(task), rows); }
  Range panels_of(int64_t n, int task) const { return share(n, task % panels, panels); }
  bool first_panel(int task) const { return task % panels == 0; }
};
// A task reads the weights of its panels and the input of its rows: the least in all where both are cut so that a part of the weights
// is as large as one of the input, i.e. panels : rows = channels : pixels. group: panels that a task has at least, or its share of
// what is done with the input for all of them would be large.
inline Shares choose_shares(const Parallel& parallel, int64_t rows, int64_t panels, int64_t group, double channels_to_pixels, double flops) {
  const int most = int(rows * (panels / group) < parallel.threads ? panels : panels / group), tasks = choose_pieces(parallel, rows * most, flops);
  Shares best{1, 1};
  double least = std::numeric_limits<double>::infinity();
  for (int columns = 1; columns <= std::min(most, tasks); columns++) {
    const Shares s{int(min64(rows, tasks / columns)), columns};
    const int rounds = (s.tasks() + parallel.threads - 1) / parallel.threads;  // of all threads
    const double idle = double(rounds) * std::min(tasks, parallel.threads) / s.tasks(), cost = (s.rows * channels_to_pixels + columns) * idle * idle;
    if (cost < least) best = s, least = cost;
  }
  return best;
}

// What one task adds up in a backward pass: a weight gradient and two sums a channel.
template <class T> struct PartialSums {
  T *weight, *sum, *sum_x;
  static PartialSums* take(Frame& frame, int tasks, int64_t weights, int64_t channels) { return take(frame, tasks, tasks, weights, channels); }
  // sets: of weight gradients, those of the first tasks
  static PartialSums* take(Frame& frame, int tasks, int sets, int64_t weights, int64_t channels) {
    PartialSums* parts = frame.take<PartialSums>(tasks);
    for (int t = 0; t < tasks; t++) parts[t] = {t < sets ? frame.take<T>(weights) : nullptr, frame.take<T>(channels), frame.take<T>(channels)};
    return parts;
  }
  void clear(int64_t weights, int64_t channels) const {
    if (weights) memset(weight, 0, size_t(weights) * sizeof(T));
    memset(sum, 0, size_t(channels) * sizeof(T)), memset(sum_x, 0, size_t(channels) * sizeof(T));
  }
};

// What the tasks of a weight gradient share. Where its sums are larger than what it reads (many channels, few pixels), the input's
// channels and not the pixels: then there is one set of sums, each written by one task, instead of one for each task. sums: bytes of a
// set; reads: bytes.
inline bool shares_channels(int tasks, int64_t sums, int64_t reads) { return tasks > 1 && sums * tasks > reads; }

}  // namespace csp::CSP_ISA
