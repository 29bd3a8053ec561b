#include "tests/emulation/runtime/block.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <span>

#include "tests/emulation/include/vector_types.h"
#include "tests/emulation/runtime/order.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace skv::emulation {

BlockRunner& block_runner() {
  static BlockRunner runner;
  return runner;
}

bool BlockRunner::run(const Grid& grid, unsigned block) {
  grid_ = &grid;
  block_ = block;
  blockIdx = {block, 0, 0};
  blockDim = dim3(grid.num_threads);
  gridDim = dim3(grid.num_blocks);
  has_failed_ = false;
  message_.clear();
  shared_memory_.begin_block();

  const int num_threads = static_cast<int>(grid.num_threads);
  fibers_.reserve(grid.num_threads);
  threads_.resize(grid.num_threads);
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = threads_[static_cast<size_t>(i)];
    thread.state = State::kReady;
    thread.num_groups = 0;
    thread.copies.clear();
    fibers_[static_cast<size_t>(i)].start(&BlockRunner::thread_main);
  }
  const int num_warps = (num_threads + kWarpSize - 1) / kWarpSize;
  warps_.assign(static_cast<size_t>(num_warps), Warp{});
  for (int i = 0; i < num_warps; ++i) {
    const int lanes = std::min(kWarpSize, num_threads - i * kWarpSize);
    warps_[static_cast<size_t>(i)].lanes = static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
  }
  num_live_ = num_threads;
  barrier_ = {};

  RoundOrder order(block);
  std::vector<int> warp_order(static_cast<size_t>(num_warps));
  while (num_live_ > 0 && !has_failed_) {
    const int before = num_resumed_;
    const int barriers_before = num_barriers_;
    order.arrange(warp_order);
    for (int warp : warp_order) {
      // After a barrier all warps start over, in a new order.
      if (has_failed_ || num_barriers_ != barriers_before) break;
      run_warp(warp, order);
    }
    if (num_resumed_ == before) {
      message_ = describe_deadlock();
      return false;
    }
  }
  if (!has_failed_ && shared_memory_.is_guard_damaged()) {
    message_ =
        "wrote past its dynamic shared memory of " + std::to_string(grid.shared_bytes) + " bytes";
    return false;
  }
  return !has_failed_;
}

// Until no lane can go on without the other warps.
void BlockRunner::run_warp(int warp, RoundOrder& order) {
  const int barriers_before = num_barriers_;
  const int num_lanes = std::popcount(warps_[static_cast<size_t>(warp)].lanes);
  std::array<int, kWarpSize> lanes;
  bool is_moving = true;
  while (is_moving) {
    is_moving = false;
    order.arrange(std::span(lanes).first(static_cast<size_t>(num_lanes)));
    for (int i = 0; i < num_lanes; ++i) {
      const int thread = warp * kWarpSize + lanes[static_cast<size_t>(i)];
      if (threads_[static_cast<size_t>(thread)].state != State::kReady) continue;
      resume(thread);
      is_moving = true;
      if (has_failed_ || num_barriers_ != barriers_before) return;
    }
  }
}

void BlockRunner::resume(int thread) {
  ++num_resumed_;
  running_ = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  fibers_[static_cast<size_t>(thread)].resume();
  running_ = -1;
}

void BlockRunner::thread_main() {
  BlockRunner& runner = block_runner();
  runner.grid_->invoke(runner.grid_->arguments);
  --runner.num_live_;
  runner.release_barrier_if_complete();
  runner.wait(State::kEnded, nullptr);
  __builtin_unreachable();
}

void BlockRunner::wait(State state, const char* where) {
  const auto index = static_cast<size_t>(running_);
  threads_[index].state = state;
  threads_[index].where = where;
  fibers_[index].yield();
}

void BlockRunner::fail(const std::string& text) {
  message_ = "thread " + std::to_string(running_) + ": " + text;
  has_failed_ = true;
  wait(State::kEnded, nullptr);
  __builtin_unreachable();
}

void BlockRunner::warp_operation(const char* name, uint32_t mask, void* argument, Resolve resolve) {
  Warp& warp = warps_[static_cast<size_t>(running_ / kWarpSize)];
  if ((mask & warp.lanes) != warp.lanes) {
    char text[160];
    std::snprintf(text, sizeof text,
                  "%s with mask 0x%08x: expected every lane of the warp (0x%08x) to take part",
                  name, mask, warp.lanes);
    fail(text);
  }
  if (warp.arrived == 0) {
    warp.name = name;
    warp.resolve = resolve;
  } else if (warp.resolve != resolve || std::strcmp(warp.name, name) != 0) {
    fail(std::string("is at ") + name + " while lane " +
         std::to_string(std::countr_zero(warp.arrived)) + " of its warp is at " + warp.name);
  }
  warp.arguments[lane()] = argument;
  warp.arrived |= uint32_t{1} << lane();
  if (warp.arrived == warp.lanes) {
    if (resolve != nullptr) resolve(warp.arguments, warp.lanes);
    warp.arrived = 0;
    const int first = running_ - lane();
    for (int i = 0; i < std::popcount(warp.lanes); ++i) {
      threads_[static_cast<size_t>(first + i)].state = State::kReady;
    }
    // The lane that came last has no head start: the next round has its own order.
    wait(State::kReady, nullptr);
  } else {
    wait(State::kAtWarpOperation, name);
  }
}

BarrierResult BlockRunner::barrier(const char* name, int value) {
  if (barrier_.arrived == 0) {
    barrier_name_ = name;
  } else if (std::strcmp(barrier_name_, name) != 0) {
    fail(std::string("is at ") + name + " while other threads of its block are at " +
         barrier_name_);
  }
  ++barrier_.arrived;
  barrier_.count += value != 0 ? 1 : 0;
  threads_[static_cast<size_t>(running_)].state = State::kAtBarrier;
  release_barrier_if_complete();
  wait(threads_[static_cast<size_t>(running_)].state, name);
  return barrier_result_;
}

void BlockRunner::release_barrier_if_complete() {
  if (barrier_.arrived == 0 || barrier_.arrived != num_live_) return;
  barrier_result_ = barrier_;
  barrier_ = {};
  ++num_barriers_;
  for (Thread& thread : threads_) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
}

std::string BlockRunner::describe_deadlock() const {
  struct Group {
    std::string what;
    size_t first;
    int count;
  };
  std::vector<Group> groups;
  for (size_t i = 0; i < threads_.size(); ++i) {
    const Thread& thread = threads_[i];
    const std::string what =
        thread.state == State::kEnded ? "ended" : std::string("at ") + thread.where;
    const auto same = [&](const Group& group) { return group.what == what; };
    const auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end()) {
      groups.push_back({what, i, 1});
    } else {
      ++found->count;
    }
  }
  std::string text = "deadlock:";
  for (const Group& group : groups) {
    text += (&group == &groups.front() ? " " : ", ") + std::to_string(group.count) +
            (group.count == 1 ? " thread " : " threads ") + group.what + " (first: thread " +
            std::to_string(group.first) + ")";
  }
  return text;
}

void BlockRunner::copy_async(void* shared, const void* global, size_t bytes, bool is_valid) {
  const auto is_aligned = [&](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
  };
  if (!shared_memory_.contains(shared, bytes)) fail("cp.async: the target is not shared memory");
  if (!is_aligned(shared)) fail("cp.async: the target is not aligned");
  if (!is_aligned(global)) fail("cp.async: the source is not aligned");
  if (is_valid && shared_memory_.contains(global, 1)) {
    fail("cp.async: the source is not global memory");
  }
  Thread& thread = threads_[static_cast<size_t>(running_)];
  thread.copies.push_back({shared, is_valid ? global : nullptr, bytes, thread.num_groups});
  if (options().copies_early) wait_for_copies(-1);
}

void BlockRunner::commit_copies() { ++threads_[static_cast<size_t>(running_)].num_groups; }

void BlockRunner::wait_for_copies(int max_pending) {
  Thread& thread = threads_[static_cast<size_t>(running_)];
  size_t done = 0;
  for (const Copy& copy : thread.copies) {
    if (copy.group >= thread.num_groups - max_pending) break;
    if (copy.source != nullptr) {
      std::memcpy(copy.target, copy.source, copy.bytes);
    } else {
      std::memset(copy.target, 0, copy.bytes);
    }
    ++done;
  }
  thread.copies.erase(thread.copies.begin(),
                      thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace skv::emulation
