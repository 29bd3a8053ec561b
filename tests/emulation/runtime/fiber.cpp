#include "tests/emulation/runtime/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

namespace skv::emulation {

namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 256 * 1024;  // of address space; memory is taken as it is touched

}  // namespace

#if defined(__x86_64__)

// swapcontext costs a system call for the signal mask; this is the part of it that is needed: the
// registers that a callee must keep, and the stack.
extern "C" void skv_emulation_switch(void** saved_stack, void* next_stack);
asm(R"(
.text
.p2align 4
.hidden skv_emulation_switch
.globl skv_emulation_switch
.type skv_emulation_switch, @function
skv_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size skv_emulation_switch, .-skv_emulation_switch
)");

struct Fiber::State {
  char* stack_end;
  void* stack_pointer = nullptr;
  void* scheduler = nullptr;
};

Fiber::Fiber(void* stack, size_t stack_bytes)
    : state_(new State{.stack_end = static_cast<char*>(stack) + stack_bytes}) {}

void Fiber::start(Entry entry) {
  // What skv_emulation_switch pops: six registers, then the address it returns to. A function
  // expects its stack 8 bytes below a multiple of 16, as a call leaves it.
  void** top = reinterpret_cast<void**>(state_->stack_end);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  state_->stack_pointer = top;
}

void Fiber::resume() { skv_emulation_switch(&state_->scheduler, state_->stack_pointer); }
void Fiber::yield() { skv_emulation_switch(&state_->stack_pointer, state_->scheduler); }

#else

struct Fiber::State {
  void* stack;
  size_t stack_bytes;
  ucontext_t context{};
  ucontext_t scheduler{};
};

Fiber::Fiber(void* stack, size_t stack_bytes)
    : state_(new State{.stack = stack, .stack_bytes = stack_bytes}) {}

void Fiber::start(Entry entry) {
  getcontext(&state_->context);
  state_->context.uc_stack.ss_sp = state_->stack;
  state_->context.uc_stack.ss_size = state_->stack_bytes;
  state_->context.uc_link = nullptr;
  makecontext(&state_->context, entry, 0);
}

void Fiber::resume() { swapcontext(&state_->scheduler, &state_->context); }
void Fiber::yield() { swapcontext(&state_->context, &state_->scheduler); }

#endif

Fiber::~Fiber() = default;

FiberPool::~FiberPool() {
  fibers_.clear();
  for (void* mapping : mappings_) munmap(mapping, kStackBytes);
}

void FiberPool::reserve(size_t count) {
  while (fibers_.size() < count) {
    void* mapping = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mappings_.push_back(mapping);
    if (mprotect(mapping, kPageBytes, PROT_NONE) != 0) throw std::bad_alloc();
    fibers_.push_back(std::make_unique<Fiber>(static_cast<char*>(mapping) + kPageBytes,
                                              kStackBytes - kPageBytes));
  }
}

}  // namespace skv::emulation
