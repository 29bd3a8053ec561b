// Element types on the device: all arithmetic is fp32, other types only load and store.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/params.h"

// Device asserts cost registers and a printf buffer, so they are a build option of their own. The
// emulator of tests/emulation brings its own, always on.
#if defined(SKV_DEVICE_ASSERT)
#elif defined(SKV_DEVICE_ASSERTS)
#include <cassert>
#define SKV_DEVICE_ASSERT(condition) assert(condition)
#else
#define SKV_DEVICE_ASSERT(condition) static_cast<void>(0)
#endif

namespace skv::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest even, like the CPU kernels and torch.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Four neighbours by one 16-byte (fp32) or 8-byte (fp16, bf16) load; `source` must be that aligned.
__device__ __forceinline__ float4 load4(const float* source) {
  return *reinterpret_cast<const float4*>(source);
}
__device__ __forceinline__ float4 load4(const int8_t* source) {
  const char4 packed = *reinterpret_cast<const char4*>(source);
  return make_float4(packed.x, packed.y, packed.z, packed.w);
}
template <typename T>
__device__ __forceinline__ float4 load4(const T* source) {
  static_assert(sizeof(T) == 2);
  struct alignas(8) Packed {
    T values[4];
  };
  const Packed packed = *reinterpret_cast<const Packed*>(source);
  return make_float4(to_float(packed.values[0]), to_float(packed.values[1]),
                     to_float(packed.values[2]), to_float(packed.values[3]));
}

// Activations are touched once a row, so their dtype stays a run-time value: it would triple the
// number of kernels for one predictable branch.
__device__ __forceinline__ float load_as_float(const void* base, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(base)[index]);
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(base)[index]);
    default:
      return static_cast<const float*>(base)[index];
  }
}
__device__ __forceinline__ void store_from_float(void* base, DType dtype, int64_t index,
                                                 float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(base)[index] = from_float<__half>(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(base)[index] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(base)[index] = value;
  }
}

// What an element of that dtype keeps of a value.
__device__ __forceinline__ float rounded(float value, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(from_float<__half>(value));
    case DType::kBFloat16:
      return to_float(from_float<__nv_bfloat16>(value));
    default:
      return value;
  }
}

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// Butterfly reductions: every lane ends with the same bits, in an order fixed by the lane number.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, mask);
  }
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, mask));
  }
  return value;
}

}  // namespace skv::cuda
