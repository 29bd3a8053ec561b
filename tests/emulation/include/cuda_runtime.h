// Shadow of cuda_runtime.h: the words of device code as plain C++.
#pragma once

// Before the macros below, which these headers must not see.
#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "tests/emulation/runtime/emulator.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// One copy for each OS thread, and the threads of a block share one. See runtime/shared_memory.h.
#define __shared__ static thread_local
#define SKV_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(skv::emulation::dynamic_shared())
#define SKV_DEVICE_ASSERT(condition) \
  ((condition) ? void() : skv::emulation::fail("%s:%d: %s", __FILE__, __LINE__, #condition))

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = skv::emulation::kWarpSize;

namespace skv::emulation {

cudaError_t launch(const cudaLaunchConfig_t& config, Grid grid);

}  // namespace skv::emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;
  };
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  skv::emulation::Grid grid{};
  grid.kernel = reinterpret_cast<const void*>(kernel);
  grid.arguments = &call;
  grid.invoke = [](const void* pointer) {
    const Call& bound = *static_cast<const Call*>(pointer);
    std::apply(bound.kernel, bound.values);
  };
  return skv::emulation::launch(*config, grid);
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks,
                                                          void (*kernel)(Parameters...),
                                                          int block_threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      num_blocks, reinterpret_cast<const void*>(kernel), block_threads, shared_bytes);
}

#include "device_math.h"
#include "device_threads.h"
