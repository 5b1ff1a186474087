// A grid on the host: blocks one after another, a fiber for each thread of a block, in an order to choose.
#pragma once
#include <unistd.h>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include "fiber.h"

#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace emulation {

// The order in which threads go on. The last two let each warp run alone to its next barrier: what one that is far ahead writes, or one
// that is far behind has yet to read, is otherwise hidden by instructions that keep warps in step.
enum class Schedule : int { InOrder, Reversed, Permuted, FirstWarpAhead, LastWarpAhead };
inline constexpr int SCHEDULES = 5;
inline Schedule schedule = Schedule::InOrder;

enum class Wait : int { Nothing, Barrier, Warp, Done };

struct Copy {
  uint32_t to;
  const void* from;
  unsigned group;
};

struct Thread {
  Fiber fiber;
  Wait wait;
  unsigned barriers, exchanges;
  Copy copies[256];  // issued and not yet waited for, a ring
  unsigned copies_begin, copies_end, group;
};

struct Slot {
  int operation;
  unsigned exchange;
  uint32_t words[6];
};

struct Block {
  Thread* threads;
  int count;
  Slot* slots[2];  // what lanes show each other, by turns
  unsigned char* shared;
  size_t shared_bytes;
  std::function<void()> body;
  Fiber scheduler;
  Token begin, end, barrier[2];
};
inline Block* block = nullptr;
inline int running = 0;

EMULATION_INTERNAL inline Thread& self() { return block->threads[running]; }
EMULATION_INTERNAL inline unsigned char* shared_memory() { return block->shared; }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s (block %u %u %u, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, running);
  _exit(3);
}

EMULATION_INTERNAL inline void yield(Wait wait) {
  Thread& thread = self();
  thread.wait = wait;
  thread.fiber.switch_to(block->scheduler);
}

EMULATION_INTERNAL inline Token* next_barrier() { return &block->barrier[self().barriers++ & 1]; }

inline void barrier() {
  Token* token = next_barrier();
  token->release();
  yield(Wait::Barrier);
  token->acquire();
}

EMULATION_INTERNAL inline void run_body() { block->body(); }
EMULATION_INTERNAL inline Token* token_of(bool end) { return end ? &block->end : &block->begin; }

inline void thread_main() {
  token_of(false)->acquire();
  run_body();
  token_of(true)->release();
  yield(Wait::Done);
  abort();
}

EMULATION_INTERNAL inline void resume(int i) {
  running = i;
  threadIdx = dim3(unsigned(i), 0, 0);
  block->scheduler.switch_to(block->threads[i].fiber);
}

EMULATION_INTERNAL inline bool can_run(int i) {
  Wait wait = block->threads[i].wait;
  return wait == Wait::Nothing || wait == Wait::Warp;
}

// Each thread to its next wait, once.
EMULATION_INTERNAL inline void round_of_all(int n) {
  for (int k = 0; k < n; k++) {
    int i = schedule == Schedule::InOrder ? k : schedule == Schedule::Reversed ? n - 1 - k : (k * 37 + 11) % n;
    if (can_run(i)) resume(i);
  }
}

// Each warp to its next barrier.
EMULATION_INTERNAL inline void round_of_warps(int n) {
  for (int k = 0; k < n / 32; k++) {
    int first = 32 * (schedule == Schedule::FirstWarpAhead ? k : n / 32 - 1 - k);
    for (bool any = true; any;) {
      any = false;
      for (int i = first; i < first + 32; i++)
        if (can_run(i)) any = true, resume(i);
    }
  }
}

EMULATION_INTERNAL inline void prepare_threads(const Stacks& stacks) {
  for (int i = 0; i < block->count; i++) {
    Thread& thread = block->threads[i];
    thread.fiber.context.prepare(stacks[i], thread_main);
    thread.wait = Wait::Nothing;
    thread.barriers = thread.exchanges = thread.copies_begin = thread.copies_end = thread.group = 0;
    block->slots[0][i] = block->slots[1][i] = Slot{};
  }
}

EMULATION_INTERNAL inline int count_waiting(Wait wait) {
  int n = 0;
  for (int i = 0; i < block->count; i++) n += block->threads[i].wait == wait;
  return n;
}

EMULATION_INTERNAL inline void run_block(const Stacks& stacks) {
  const int n = block->count;
  memset(block->shared, 0xff, block->shared_bytes);  // NaN in every type
  prepare_threads(stacks);
  block->begin.release();
  for (;;) {
    if (schedule >= Schedule::FirstWarpAhead) round_of_warps(n);
    else round_of_all(n);
    const int done = count_waiting(Wait::Done), waiting = count_waiting(Wait::Barrier);
    if (done == n) break;
    if (done && waiting && done + waiting == n) fail("threads wait at a barrier that others have left without");
    if (waiting == n)
      for (int i = 0; i < n; i++) block->threads[i].wait = Wait::Nothing;
  }
  block->end.acquire();
}

template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, int count, size_t shared_bytes, A... arguments) {
  if (count % 32) fail("the emulation runs whole warps");
  const Stacks stacks(count);
  std::vector<Thread> threads(static_cast<size_t>(count));
  std::vector<Slot> slots(2 * size_t(count));
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);  // exact: a sanitizer sees one byte too far
  Block b{};
  b.threads = threads.data(), b.count = count, b.slots[0] = slots.data(), b.slots[1] = slots.data() + count;
  b.shared = shared.get(), b.shared_bytes = shared_bytes, b.body = [=] { kernel(arguments...); };
  b.scheduler.adopt();
  for (Thread& thread : threads) thread.fiber.create();
  block = &b, gridDim = grid, blockDim = dim3(unsigned(count));
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned k = 0; k < blocks; k++) {
    const unsigned i = int(schedule) % 2 ? blocks - 1 - k : k;
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(stacks);
  }
  for (Thread& thread : threads) thread.fiber.destroy();
  block = nullptr;
}

}  // namespace emulation
