// The host functions of the shadow runtime: a device like a small part of an A100.
#include <cstring>
#include <map>
#include <mutex>

#include "tests/emulation/include/cuda_runtime.h"

namespace {

constexpr int kMultiprocessors = 4;
constexpr int kMaxThreads = 1024;
constexpr int kMaxThreadsPerMultiprocessor = 2048;
constexpr int kMaxBlocksPerMultiprocessor = 32;
constexpr size_t kSharedBytesPerMultiprocessor = 228 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kReservedSharedBytes = 1024;  // of each block, by the system
constexpr size_t kDefaultMaxSharedBytes = 48 * 1024;

std::mutex guard;  // of what follows
std::map<const void*, size_t> max_shared_bytes;
cudaError_t last_error = cudaSuccess;
const char* failure = "";

cudaError_t remember(cudaError_t error) {
  const std::lock_guard lock(guard);
  if (error != cudaSuccess) last_error = error;
  return error;
}

size_t max_shared_bytes_of(const void* kernel) {
  const std::lock_guard lock(guard);
  const auto found = max_shared_bytes.find(kernel);
  return found == max_shared_bytes.end() ? kDefaultMaxSharedBytes : found->second;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = skv::emulation::kWarpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 40 * 1024 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kMaxThreadsPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;  // so that what only Hopper has is launched too
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(kSharedBytesPerMultiprocessor);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(kMaxSharedBytes);
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() {
  const std::lock_guard lock(guard);
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard lock(guard);
  return last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return failure;
  }
  return "unknown error";
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memmove(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxSharedBytes) {
    return remember(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(guard);
  max_shared_bytes[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void* kernel,
                                                          int block_threads, size_t shared_bytes) {
  if (block_threads < 1 || block_threads > kMaxThreads ||
      shared_bytes > max_shared_bytes_of(kernel)) {
    *num_blocks = 0;
    return remember(cudaErrorInvalidValue);
  }
  *num_blocks =
      min(min(kMaxBlocksPerMultiprocessor, kMaxThreadsPerMultiprocessor / block_threads),
          static_cast<int>(kSharedBytesPerMultiprocessor / (shared_bytes + kReservedSharedBytes)));
  return cudaSuccess;
}

namespace skv::emulation {

cudaError_t launch(const cudaLaunchConfig_t& config, Grid grid) {
  const dim3 blocks = config.gridDim;
  const dim3 threads = config.blockDim;
  if (blocks.x < 1 || blocks.y != 1 || blocks.z != 1 || threads.x < 1 ||
      threads.x > static_cast<unsigned>(kMaxThreads) || threads.y != 1 || threads.z != 1) {
    return remember(cudaErrorInvalidConfiguration);
  }
  if (config.dynamicSmemBytes > max_shared_bytes_of(grid.kernel)) {
    return remember(cudaErrorInvalidValue);
  }
  grid.num_blocks = blocks.x;
  grid.num_threads = threads.x;
  grid.shared_bytes = config.dynamicSmemBytes;
  const char* message = run_grid(grid);
  if (*message == '\0') return cudaSuccess;
  {
    const std::lock_guard lock(guard);
    failure = message;
  }
  return remember(cudaErrorLaunchFailure);
}

}  // namespace skv::emulation
