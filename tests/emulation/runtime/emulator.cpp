#include "tests/emulation/runtime/emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "tests/emulation/runtime/block.h"
#include "tests/emulation/runtime/kernel_name.h"

namespace skv::emulation {

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (block_runner().is_running()) block_runner().fail(text);
  std::fprintf(stderr, "CUDA emulator, outside a kernel: %s\n", text);
  std::abort();
}

void warp_operation(const char* name, uint32_t mask, void* argument, Resolve resolve) {
  block_runner().warp_operation(name, mask, argument, resolve);
}

BarrierResult block_barrier(const char* name, int value) {
  return block_runner().barrier(name, value);
}

int current_lane() { return block_runner().lane(); }

void* dynamic_shared() { return block_runner().shared_memory().dynamic(); }

bool is_shared(const void* address, size_t bytes) {
  return block_runner().shared_memory().contains(address, bytes);
}

void copy_async(void* shared, const void* global, size_t bytes, bool is_valid) {
  block_runner().copy_async(shared, global, bytes, is_valid);
}
void commit_copies() { block_runner().commit_copies(); }
void wait_for_copies(int max_pending) { block_runner().wait_for_copies(max_pending); }

const char* run_grid(const Grid& grid) {
  static std::mutex one_at_a_time;
  static std::string message;  // of the last kernel that failed
  const std::lock_guard lock(one_at_a_time);
  BlockRunner& runner = block_runner();
  runner.shared_memory().begin_kernel(grid.kernel, grid.shared_bytes);
  for (unsigned block = 0; block < grid.num_blocks; ++block) {
    if (runner.run(grid, block)) continue;
    message = "CUDA emulator: kernel " + kernel_name(grid.kernel) + ", block " +
              std::to_string(block) + ", " + runner.message();
    return message.c_str();
  }
  return "";
}

}  // namespace skv::emulation
