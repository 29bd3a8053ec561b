// What the shadow headers call: the CUDA thread that runs now, its block, its warp.
//
// A block's threads are fibers on the OS thread that launched the kernel; blocks run one after the
// other, a kernel is over when its launch returns. One kernel at a time in the whole process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace skv::emulation {

inline constexpr int kWarpSize = 32;

// A mistake of the running kernel. Ends the kernel; its launch returns an error whose text is this
// message with the kernel's name, block and thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// How the threads of a warp work together: each lane brings `argument`; when all lanes of the warp
// are here, resolve(arguments, lanes) runs once, then all go on. `name` tells operations apart and
// stands in messages. Lanes that do not exist (a last warp that is not full) are not in `lanes`.
using Resolve = void (*)(void* const* arguments, uint32_t lanes);
void warp_operation(const char* name, uint32_t mask, void* argument, Resolve resolve);

// All threads of the block that have not ended. `value` is counted (not 0) and joined by or.
struct BarrierResult {
  int count;
  int arrived;
};
BarrierResult block_barrier(const char* name, int value);

int current_lane();

// Exactly LaunchShape::shared_bytes, filled with 0xff when a block begins.
void* dynamic_shared();
// Whether [address, address + bytes) lies inside this block's dynamic or static shared memory.
bool is_shared(const void* address, size_t bytes);

// cp.async of the running thread. A copy is done as late as its wait allows, or, with
// SKV_EMULATION_COPIES=early, at once: too little waiting shows in the first order of events,
// overwriting what others still read in the second.
void copy_async(void* shared, const void* global, size_t bytes, bool is_valid);
void commit_copies();
void wait_for_copies(int max_pending);

// A launch, with the arguments bound.
struct Grid {
  const void* kernel;
  unsigned num_blocks;
  unsigned num_threads;
  size_t shared_bytes;
  void (*invoke)(const void* arguments);
  const void* arguments;
};
// Empty if the kernel ran to its end, else what went wrong.
const char* run_grid(const Grid& grid);

}  // namespace skv::emulation
