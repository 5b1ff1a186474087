// Where scratch memory comes from and when it goes back to the system; see cpu/scratch.h.
#include "cpu/scratch.h"

#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>

namespace csp {
namespace {

constexpr int64_t PAGE = int64_t(2) << 20;  // a huge page
constexpr int64_t HEADER = int64_t(sizeof(ScratchBlock));
constexpr int64_t PERIOD = 5'000'000'000;   // nanoseconds between looks at what lies idle

struct NoMemory : std::bad_alloc {
  std::string text;
  explicit NoMemory(int64_t bytes)
      : text("csp_kernels: no memory for " + std::to_string((bytes >> 20) + 1) +
             " MiB of scratch; the call has changed nothing and can be repeated (smaller batches or fewer threads need less)") {}
  const char* what() const noexcept override { return text.c_str(); }
};

int64_t whole_pages(int64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Straight from the system, so that it goes straight back: an allocator would keep what is freed.
void* from_system(int64_t bytes) {
#if defined(__linux__)
  void* mapped = mmap(nullptr, size_t(bytes + PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  int64_t skip = (PAGE - int64_t(reinterpret_cast<uintptr_t>(begin) % uintptr_t(PAGE))) % PAGE;
  if (skip) munmap(begin, size_t(skip));
  munmap(begin + skip + bytes, size_t(PAGE - skip));
  madvise(begin + skip, size_t(bytes), MADV_HUGEPAGE);  // advice: failure changes nothing
  return begin + skip;
#else
  return std::aligned_alloc(64, size_t(bytes));
#endif
}
void to_system(ScratchBlock* block) {
  CSP_UNPOISON(block, block->bytes);
#if defined(__linux__)
  munmap(block, size_t(block->bytes));
#else
  std::free(block);
#endif
}

char* begin_of(ScratchBlock* block) { return reinterpret_cast<char*>(block) + HEADER; }

int64_t release(Scratch& s) {  // none of it may be in use
  for (ScratchBlock *block = s.first, *next; block; block = next) next = block->next, to_system(block);
  s.first = s.block = nullptr, s.at = s.end = nullptr;
  return s.held.exchange(0, std::memory_order_relaxed);
}

// The stores of all threads. Never destroyed: threads may outlive static objects.
struct Threads {
  std::mutex mutex;  // guards the list
  Scratch* first = nullptr;
  std::atomic<int64_t> next_look{0};

  static Threads& all() {
    static Threads* const threads = [] {
      pthread_atfork([] { all().mutex.lock(); }, [] { all().mutex.unlock(); }, [] { all().after_fork(); });
      return new Threads;
    }();
    return *threads;
  }
  void add(Scratch* s) {
    std::lock_guard<std::mutex> lock(mutex);
    s->next = first;
    if (first) first->previous = s;
    first = s;
  }
  void remove(Scratch* s) {  // the mutex is held
    (s->previous ? s->previous->next : first) = s->next;
    if (s->next) s->next->previous = s->previous;
    release(*s);
    delete s;
  }
  // Gives back what idle threads hold; only_unused: where it was more than twice what they used lately.
  int64_t give_back(bool only_unused) {  // the mutex is held
    int64_t bytes = 0;
    for (Scratch* s = first; s; s = s->next) {
      if (s->busy.exchange(true, std::memory_order_acquire)) continue;
      int64_t held = s->held.load(std::memory_order_relaxed);
      if (!only_unused || held > 2 * whole_pages(s->peak)) bytes += release(*s);
      else if (held) s->peak = 0;  // until the next look
      s->busy.store(false, std::memory_order_release);
    }
    return bytes;
  }
  void look() {
    int64_t now = std::chrono::steady_clock::now().time_since_epoch().count();
    int64_t due = next_look.load(std::memory_order_relaxed);
    if (now < due || !next_look.compare_exchange_strong(due, now + PERIOD, std::memory_order_relaxed)) return;
    std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock.owns_lock()) give_back(true);
  }
  void after_fork();  // in the child
};

// The store of this thread, until it ends.
struct Own {
  Scratch* scratch = nullptr;
  ~Own() {
    if (!scratch) return;
    std::lock_guard<std::mutex> lock(Threads::all().mutex);
    Threads::all().remove(scratch);
  }
};
thread_local Own own;

void Threads::after_fork() {  // the other threads do not exist in the child
  for (Scratch *s = first, *next; s; s = next) {
    next = s->next;
    if (s != own.scratch) remove(s);
  }
  mutex.unlock();
}

}  // namespace

Scratch& scratch_of_thread() {
  if (!own.scratch) {
    Scratch* made = new Scratch;
    Threads::all().add(made);
    own.scratch = made;
  }
  return *own.scratch;
}

void enter_scratch(Scratch& s) {
  while (s.busy.exchange(true, std::memory_order_acquire)) sched_yield();  // another thread is giving its memory back
}

void leave_scratch(Scratch& s) {
  if (s.first && s.first->next) release(s);  // the next call takes one block, as large as all of them were used
  s.busy.store(false, std::memory_order_release);
  Threads::all().look();
}

void grow_scratch(Scratch& s, int64_t bytes) {
  int64_t before = s.block ? s.block->before + (s.at - begin_of(s.block)) : 0, need = bytes + HEADER;
  ScratchBlock** slot = s.block ? &s.block->next : &s.first;
  while (*slot && (*slot)->bytes < need) slot = &(*slot)->next;
  if (!*slot) {
    int64_t held = s.held.load(std::memory_order_relaxed);
    int64_t size = whole_pages(std::max(need, held ? held : s.peak + HEADER));  // doubles: a chain stays short
    void* memory = from_system(size);
    if (!memory) give_back_scratch(), memory = from_system(size = whole_pages(need));
    if (!memory) throw NoMemory(bytes);
    *slot = new (memory) ScratchBlock{nullptr, size, 0};
    s.held.store(held + size, std::memory_order_relaxed);
    CSP_POISON(begin_of(*slot), size - HEADER);
  }
  s.block = *slot;
  s.block->before = before;
  s.at = begin_of(s.block), s.end = reinterpret_cast<char*>(s.block) + s.block->bytes;
}

int64_t scratch_bytes() {
  Threads& threads = Threads::all();
  std::lock_guard<std::mutex> lock(threads.mutex);
  int64_t bytes = 0;
  for (const Scratch* s = threads.first; s; s = s->next) bytes += s->held.load(std::memory_order_relaxed);
  return bytes;
}

int64_t give_back_scratch() {
  std::lock_guard<std::mutex> lock(Threads::all().mutex);
  return Threads::all().give_back(false);
}

}  // namespace csp
