// Eight neighbouring elements at a time: one access of 16 bytes for a 16-bit type, two for fp32.
// Where the addresses do not allow that, the same eight one by one, so the bits are the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/ptx.cuh"
#include "csrc/kernels/params.h"

namespace skv::cuda {

inline constexpr int kEight = 8;

struct Eight {
  float values[kEight];
};

// Which of eight elements from some index on are there. is_vector: all of them, at an address that
// is a multiple of 16 bytes (of 8 for int8); decided on the host for a whole launch.
struct Extent {
  int count;
  bool is_vector;
};

// The elements [begin, end) of a vector, of which `begin` starts a group of eight.
__device__ __forceinline__ Extent extent_of(int64_t begin, int64_t end, bool is_vector) {
  return {end - begin < kEight ? static_cast<int>(end - begin) : kEight, is_vector};
}

// 16 bytes of elements.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T values[kCount];
};

template <typename T>
__device__ __forceinline__ Eight load8_of(const T* source, Extent extent) {
  Eight result;
  if (extent.is_vector) {
#pragma unroll
    for (int pack = 0; pack < kEight / Pack<T>::kCount; ++pack) {
      const Pack<T> loaded = reinterpret_cast<const Pack<T>*>(source)[pack];
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) {
        result.values[pack * Pack<T>::kCount + i] = to_float(loaded.values[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      result.values[i] = i < extent.count ? to_float(source[i]) : 0.0f;
    }
  }
  return result;
}

template <typename T>
__device__ __forceinline__ void store8_to(T* target, Extent extent, const Eight& eight) {
  const float* values = eight.values;
  if (!extent.is_vector) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < extent.count) target[i] = from_float<T>(values[i]);
    }
  } else if constexpr (sizeof(T) == 2) {
    // __stcg is one instruction; a plain assignment the compiler may take apart.
    __stcg(reinterpret_cast<uint4*>(target),
           make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                      pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7])));
  } else {
    auto* quads = reinterpret_cast<float4*>(target);
    __stcg(quads, make_float4(values[0], values[1], values[2], values[3]));
    __stcg(quads + 1, make_float4(values[4], values[5], values[6], values[7]));
  }
}

// base[index ...] as floats, 0 past the extent. The dtype stays a run-time value, see element.cuh.
__device__ __forceinline__ Eight load8(const void* base, DType dtype, int64_t index,
                                       Extent extent) {
  switch (dtype) {
    case DType::kFloat16:
      return load8_of(static_cast<const __half*>(base) + index, extent);
    case DType::kBFloat16:
      return load8_of(static_cast<const __nv_bfloat16*>(base) + index, extent);
    default:
      return load8_of(static_cast<const float*>(base) + index, extent);
  }
}

__device__ __forceinline__ void store8(void* base, DType dtype, int64_t index, Extent extent,
                                       const Eight& eight) {
  switch (dtype) {
    case DType::kFloat16:
      store8_to(static_cast<__half*>(base) + index, extent, eight);
      break;
    case DType::kBFloat16:
      store8_to(static_cast<__nv_bfloat16*>(base) + index, extent, eight);
      break;
    default:
      store8_to(static_cast<float*>(base) + index, extent, eight);
  }
}

}  // namespace skv::cuda
