// Fibers: functions that run on a stack of their own and give way when they choose to, all on the
// OS thread that resumes them.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace skv::emulation {

// One stack and the place where its function stopped. There is one scheduler: only code that runs
// on an ordinary stack may call resume, and only one fiber runs at a time.
class Fiber {
 public:
  using Entry = void (*)();  // must end with yield(), and never returns

  explicit Fiber(void* stack, size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins with entry; whatever ran here before is forgotten.
  void start(Entry entry);
  // Runs until the fiber yields.
  void resume();
  // Called on a fiber: back to the resume() that runs it.
  void yield();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Fibers that are kept for later blocks, with a page below each stack that faults on overflow.
class FiberPool {
 public:
  ~FiberPool();
  // Makes sure of `count` fibers, numbered from 0.
  void reserve(size_t count);
  Fiber& operator[](size_t index) { return *fibers_[index]; }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<void*> mappings_;
};

}  // namespace skv::emulation
