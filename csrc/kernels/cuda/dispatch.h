// Run-time values -> compile-time values for the launchers, and their shared host checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "csrc/kernels/cuda/kernels.h"

namespace skv::cuda {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<element type>{}) and returns its status.
template <typename Body>
cudaError_t dispatch_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kInt8:  // refused by the ops
      break;
  }
  return cudaErrorInvalidValue;
}

template <typename Body, int... kDims>
cudaError_t dispatch_head_dim(int64_t head_dim, Body body, std::integer_sequence<int, kDims...>) {
  cudaError_t status = cudaErrorInvalidValue;
  // The fold stops at the first match; no match leaves the error.
  static_cast<void>(
      ((head_dim == kDims && (status = body(std::integral_constant<int, kDims>{}), true)) || ...));
  return status;
}

inline bool is_aligned(const void* pointer, uintptr_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

inline int64_t bytes_of(DType dtype) {
  if (dtype == DType::kInt8) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Whether every row begins at a multiple of 16 bytes. The stride, in elements, counts where there
// is more than one row.
inline bool rows_are_aligned(const void* base, DType dtype, int64_t stride, int64_t num_rows) {
  return is_aligned(base, 16) && (num_rows <= 1 || stride * bytes_of(dtype) % 16 == 0);
}

// The least power of two of lanes, up to a warp, that walk `count` elements eight at a time.
inline int lanes_for(int64_t count) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < count) lanes *= 2;
  return lanes;
}

inline bool fits_int32(int64_t value) {
  return value >= 0 && value <= std::numeric_limits<int32_t>::max();
}

// Blocks go along x only: y and z end at 65535, and a prefill may have more rows than that.
inline bool fits_grid(int64_t num_blocks) { return fits_int32(num_blocks); }

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace skv::cuda
