// Scratch memory of the kernels, one store a thread, kept between calls. What the threads share is in csrc/scratch.cpp, compiled
// once; what runs often is in tile/scratch.h, compiled per instruction set.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(CSP_SANITIZE) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define CSP_POISON(p, bytes) ASAN_POISON_MEMORY_REGION(p, size_t(bytes))
#define CSP_UNPOISON(p, bytes) ASAN_UNPOISON_MEMORY_REGION(p, size_t(bytes))
#else
#define CSP_POISON(p, bytes) ((void)(p), (void)(bytes))
#define CSP_UNPOISON(p, bytes) ((void)(p), (void)(bytes))
#endif

namespace csp {

// Memory of the system; this header lies at its beginning.
struct alignas(64) ScratchBlock {
  ScratchBlock* next;
  int64_t bytes;   // with the header
  int64_t before;  // in use in the blocks before, while this one is
};

// A chain of blocks, taken from as from a stack. All but `busy` and `held` belong to whoever set `busy`: the thread itself for the
// time of a call, or another one that gives idle memory back.
struct Scratch {
  char *at = nullptr, *end = nullptr;  // what is free of the current block
  ScratchBlock* block = nullptr;       // the current one, null: nothing is in use
  int64_t frames = 0, peak = 0;        // peak: most bytes in use at a time, lately
  ScratchBlock* first = nullptr;
  std::atomic<bool> busy{false};
  std::atomic<int64_t> held{0};        // bytes of all blocks
  Scratch *previous = nullptr, *next = nullptr;  // of all threads
};

Scratch& scratch_of_thread();
void enter_scratch(Scratch& s);                // the thread's first frame begins
void leave_scratch(Scratch& s);                // its last one has ended
void grow_scratch(Scratch& s, int64_t bytes);  // makes a block with room for `bytes` the current one; throws std::bad_alloc
int64_t scratch_bytes();                       // that all threads hold
int64_t give_back_scratch();                   // gives back what idle threads hold: how many bytes

}  // namespace csp
