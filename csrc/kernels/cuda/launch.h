// The one way to launch a kernel: no <<<>>>, so that the same source also compiles as plain C++
// for the emulator of tests/emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace skv::cuda {

// Blocks go along x only. Precondition: fits_grid(blocks), blocks >= 1.
struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  // From sm_90 on the kernel may begin while the one before it in the stream ends. Then it must
  // call grid_dependency_wait() before it touches memory that the other one writes or reads.
  bool overlaps_previous = false;
};

// More dynamic shared memory than this has to be allowed for each kernel first.
inline constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

// Whether grid_dependency_wait() waits in this kernel. The code that runs decides, not the device:
// a newer one may run code for sm_80, in which there is no such instruction.
template <typename... Parameters>
bool waits_for_previous(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// The status is the launch's own, and is not left behind as the last error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape,
                          cudaStream_t stream, Arguments&&... arguments) {
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > kSharedBytesWithoutAsking) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = shape.overlaps_previous && waits_for_previous(kernel) ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status;
}

}  // namespace skv::cuda

// Inside a kernel: `type* name` is its dynamic shared memory, aligned for 16-byte vectors and for
// rows of 128 bytes. The emulator brings its own.
#if !defined(SKV_DYNAMIC_SHARED)
#define SKV_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(128) unsigned char skv_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(skv_shared_bytes)
#endif
