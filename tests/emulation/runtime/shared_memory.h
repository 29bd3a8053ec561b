// The shared memory of the block that runs.
//
// Static: `__shared__` is `static thread_local`, so all of it is the thread-local segment of the
// library that holds the kernel. That library must have no other thread-local variables: the whole
// segment is poisoned when a block begins.
// Dynamic: a buffer exactly as large as asked for, between two guards.
#pragma once

#include <cstddef>
#include <memory>

namespace skv::emulation {

class SharedMemory {
 public:
  void begin_kernel(const void* kernel, size_t dynamic_bytes);
  void begin_block();
  // Whether somebody wrote just before or just behind the dynamic memory.
  bool is_guard_damaged() const;
  void* dynamic() const { return dynamic_; }
  bool contains(const void* address, size_t bytes) const;

 private:
  struct AlignedDelete {
    void operator()(unsigned char* bytes) const;
  };
  std::unique_ptr<unsigned char, AlignedDelete> buffer_;
  size_t buffer_bytes_ = 0;
  unsigned char* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0;
  unsigned char* static_ = nullptr;
  size_t static_bytes_ = 0;
};

}  // namespace skv::emulation
