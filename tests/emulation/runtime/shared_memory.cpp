#include "tests/emulation/runtime/shared_memory.h"

#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>

// Of the C library: where a thread has its copy of a thread-local variable of a library.
extern "C" void* __tls_get_addr(size_t module_and_offset[2]);

namespace skv::emulation {

namespace {

constexpr size_t kGuardBytes = 256;
constexpr size_t kAlignment = 1024;
constexpr unsigned char kGuard = 0xA5;
constexpr unsigned char kPoison = 0xFF;  // NaN in every float type, -1 in every integer

struct Segment {
  const void* kernel;
  unsigned char* begin;
  size_t bytes;
};

// Called for each library of the process, until it returns 1.
int find_segment(dl_phdr_info* library, size_t, void* result) {
  Segment& segment = *static_cast<Segment*>(result);
  const std::span headers(library->dlpi_phdr, library->dlpi_phnum);
  const auto kernel = reinterpret_cast<uintptr_t>(segment.kernel);
  const auto holds_kernel = [&](const ElfW(Phdr) & header) {
    const uintptr_t begin = library->dlpi_addr + header.p_vaddr;
    return header.p_type == PT_LOAD && kernel >= begin && kernel - begin < header.p_memsz;
  };
  if (std::none_of(headers.begin(), headers.end(), holds_kernel)) return 0;
  for (const ElfW(Phdr) & header : headers) {
    if (header.p_type != PT_TLS) continue;
    size_t first[2] = {library->dlpi_tls_modid, 0};
    segment.begin = static_cast<unsigned char*>(__tls_get_addr(first));
    segment.bytes = header.p_memsz;
  }
  return 1;
}

bool is_filled(const unsigned char* bytes, size_t count, unsigned char value) {
  return std::all_of(bytes, bytes + count, [&](unsigned char byte) { return byte == value; });
}

}  // namespace

void SharedMemory::AlignedDelete::operator()(unsigned char* bytes) const {
  operator delete[](bytes, std::align_val_t{kAlignment});
}

void SharedMemory::begin_kernel(const void* kernel, size_t dynamic_bytes) {
  const size_t buffer_bytes = kAlignment + dynamic_bytes + kGuardBytes;
  if (buffer_bytes > buffer_bytes_) {
    buffer_.reset(new (std::align_val_t{kAlignment}) unsigned char[buffer_bytes]);
    buffer_bytes_ = buffer_bytes;
  }
  dynamic_ = buffer_.get() + kAlignment;
  dynamic_bytes_ = dynamic_bytes;
  Segment segment{kernel, nullptr, 0};
  dl_iterate_phdr(find_segment, &segment);
  static_ = segment.begin;
  static_bytes_ = segment.bytes;
}

void SharedMemory::begin_block() {
  std::memset(dynamic_ - kGuardBytes, kGuard, kGuardBytes);
  std::memset(dynamic_, kPoison, dynamic_bytes_);
  std::memset(dynamic_ + dynamic_bytes_, kGuard, kGuardBytes);
  if (static_bytes_ > 0) std::memset(static_, kPoison, static_bytes_);
}

bool SharedMemory::is_guard_damaged() const {
  return !is_filled(dynamic_ - kGuardBytes, kGuardBytes, kGuard) ||
         !is_filled(dynamic_ + dynamic_bytes_, kGuardBytes, kGuard);
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
  const auto inside = [&](const unsigned char* begin, size_t size) {
    const auto first = reinterpret_cast<uintptr_t>(address);
    const auto start = reinterpret_cast<uintptr_t>(begin);
    return first >= start && first - start <= size && bytes <= size - (first - start);
  };
  return inside(dynamic_, dynamic_bytes_) || inside(static_, static_bytes_);
}

}  // namespace skv::emulation
