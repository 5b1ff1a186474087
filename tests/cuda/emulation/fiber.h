// Fibers: one stack each, switched by hand. ThreadSanitizer sees every fiber as a thread.
#pragma once
#include <sys/mman.h>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATION_INTERNAL __attribute__((no_sanitize("thread"), noinline))  // of the emulation itself: no race of the kernel
#else
#define EMULATION_INTERNAL
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

inline constexpr size_t STACK = 1 << 16;

#if defined(__x86_64__)
extern "C" void emulation_switch(void** from, void* to);
__asm__(
    ".pushsection .text\n.weak emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.popsection\n");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, void (*entry)()) {  // as the switch leaves it: six registers, then where to return to
    void** top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack_pointer = top;
  }
  EMULATION_INTERNAL void switch_to(Context& to) { emulation_switch(&stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {};
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  EMULATION_INTERNAL void switch_to(Context& to) { swapcontext(&context, &to.context); }
};
#endif

// What orders one thread's accesses after another's.
struct Token {
  char byte = 0;
#if defined(__SANITIZE_THREAD__)
  void release() { __tsan_release(&byte); }
  void acquire() { __tsan_acquire(&byte); }
#else
  void release() {}
  void acquire() {}
#endif
};

// The scheduler's side and a thread's side of a switch.
struct Fiber {
  Context context;
  void* shadow = nullptr;
#if defined(__SANITIZE_THREAD__)
  void create() { shadow = __tsan_create_fiber(0); }
  void adopt() { shadow = __tsan_get_current_fiber(); }
  void destroy() { __tsan_destroy_fiber(shadow); }
  EMULATION_INTERNAL void switch_to(Fiber& to) {
    __tsan_switch_to_fiber(to.shadow, __tsan_switch_to_fiber_no_sync);
    context.switch_to(to.context);
  }
#else
  void create() {}
  void adopt() {}
  void destroy() {}
  void switch_to(Fiber& to) { context.switch_to(to.context); }
#endif
};

// Stacks of n fibers.
class Stacks {
 public:
  explicit Stacks(int n) : size_(STACK * size_t(n)) {
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) perror("mmap"), abort();
  }
  ~Stacks() { munmap(base_, size_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  char* operator[](int i) const { return base_ + STACK * size_t(i); }

 private:
  size_t size_;
  char* base_;
};

}  // namespace emulation
