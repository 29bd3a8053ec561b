// Vectors of an int8 pool: the rule of QuantizedVector in csrc/kernels/cpu/isa/kv_store.h, with the
// same bits. scale = max |x| / 127, element = round(x / scale), halves to even.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/eight.cuh"
#include "csrc/kernels/cuda/element.cuh"

namespace skv::cuda {

inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr uint32_t kQuietNanBits = 0x7fc00000u;

// The largest |x| as bits. Their order is that of the values, and an infinity or a NaN is above
// every number, so one maximum also finds what must not be quantised.
__device__ __forceinline__ uint32_t magnitude_bits(const Eight& eight) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    largest = max(largest, __float_as_uint(eight.values[i]) & 0x7fffffffu);
  }
  return largest;
}

// The maximum over runs of `num_lanes` neighbouring lanes, a power of two. All lanes of a warp
// call.
__device__ __forceinline__ uint32_t max_of_lanes(uint32_t value, int num_lanes) {
  for (int mask = num_lanes / 2; mask > 0; mask /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, mask));
  }
  return value;
}

// NaN for a vector with an infinity or a NaN: whoever reads it gets NaN.
__device__ __forceinline__ float scale_of(uint32_t largest) {
  return __uint_as_float(largest) < __uint_as_float(kInfinityBits)
             ? __uint_as_float(largest) / 127.0f
             : __uint_as_float(kQuietNanBits);
}

// The bound is for subnormal scales: they are coarse, and a quotient could leave the range.
__device__ __forceinline__ int8_t quantized(float value, float scale) {
  if (!(scale > 0.0f)) return 0;
  return static_cast<int8_t>(fmaxf(fminf(rintf(value / scale), 127.0f), -127.0f));
}

__device__ __forceinline__ void store8_quantized(int8_t* target, Extent extent, const Eight& eight,
                                                 float scale) {
  struct alignas(kEight) Packed {
    int8_t values[kEight];
  };
  Packed packed;
#pragma unroll
  for (int i = 0; i < kEight; ++i) packed.values[i] = quantized(eight.values[i], scale);
  if (extent.is_vector) {
    *reinterpret_cast<Packed*>(target) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < extent.count) target[i] = packed.values[i];
    }
  }
}

}  // namespace skv::cuda
