// The threads of one block, their warps and their barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/emulation/runtime/emulator.h"
#include "tests/emulation/runtime/fiber.h"
#include "tests/emulation/runtime/shared_memory.h"

namespace skv::emulation {

class RoundOrder;

// Runs the blocks of grids, one after the other. What the free functions of emulator.h do for the
// thread that runs now, these methods do; they are called on its fiber.
class BlockRunner {
 public:
  // False if the block failed; message() then says why.
  bool run(const Grid& grid, unsigned block);
  const std::string& message() const { return message_; }
  SharedMemory& shared_memory() { return shared_memory_; }

  bool is_running() const { return running_ >= 0; }
  int lane() const { return running_ % kWarpSize; }
  [[noreturn]] void fail(const std::string& text);
  void warp_operation(const char* name, uint32_t mask, void* argument, Resolve resolve);
  BarrierResult barrier(const char* name, int value);
  void copy_async(void* shared, const void* global, size_t bytes, bool is_valid);
  void commit_copies();
  void wait_for_copies(int max_pending);

 private:
  enum class State { kReady, kAtWarpOperation, kAtBarrier, kEnded };

  struct Copy {
    void* target;
    const void* source;  // null: zeros
    size_t bytes;
    int group;
  };
  struct Thread {
    State state;
    const char* where;         // name of what it waits for
    int num_groups;            // committed groups of copies
    std::vector<Copy> copies;  // not yet done, oldest first
  };
  struct Warp {
    uint32_t lanes;    // that exist
    uint32_t arrived;  // at the operation under way
    const char* name;
    Resolve resolve;
    void* arguments[kWarpSize];
  };

  static void thread_main();
  void run_warp(int warp, RoundOrder& order);
  void resume(int thread);
  void wait(State state, const char* where);
  void release_barrier_if_complete();
  std::string describe_deadlock() const;

  FiberPool fibers_;
  SharedMemory shared_memory_;
  const Grid* grid_ = nullptr;
  unsigned block_ = 0;
  int running_ = -1;  // thread, or -1 outside fibers
  std::string message_;
  bool has_failed_ = false;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  int num_live_ = 0;
  int num_resumed_ = 0;  // since the block began
  const char* barrier_name_ = nullptr;
  BarrierResult barrier_{};         // of the barrier under way
  BarrierResult barrier_result_{};  // of the last one that was completed
  int num_barriers_ = 0;            // completed
};

// The one of this process.
BlockRunner& block_runner();

}  // namespace skv::emulation
