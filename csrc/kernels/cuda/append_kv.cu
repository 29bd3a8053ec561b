// Writes new keys and values into their slots. A run of lanes within a warp, as many as a vector
// has groups of eight elements, owns one vector: the key or the value of one head in one row.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/eight.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/cuda/quantize.cuh"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;

// One vector on its way. target is null for a skipped row.
struct Vector {
  const void* source;
  int64_t from;  // element of source
  void* target;
  int64_t to;  // element of target
  float* scale;
};

__device__ __forceinline__ Vector vector_of(const AppendKvParams& params, int32_t number) {
  const int32_t num_heads = static_cast<int32_t>(params.layout.num_kv_heads);
  const int32_t head = number % num_heads;
  const bool is_value = number / num_heads % 2 != 0;
  const int64_t row = number / num_heads / 2;
  const int64_t slot = row < params.num_rows ? params.slots[row] : -1;
  if (slot < 0) return {};
  SKV_DEVICE_ASSERT(slot < params.layout.num_slots());
  const int64_t to = params.layout.slot_offset(slot, head);
  float* scales = is_value ? params.v_scales : params.k_scales;
  if (scales != nullptr) scales += params.layout.scale_offset(slot, head);
  if (is_value) {
    return {params.value, row * params.value_row_stride + head * params.value_head_stride,
            params.v_pool, to, scales};
  }
  return {params.key, row * params.key_row_stride + head * params.key_head_stride, params.k_pool,
          to, scales};
}

// 16-bit elements as they are, signalling NaN too.
__device__ __forceinline__ void copy8_of_16_bits(const Vector& vector, int64_t at, Extent extent) {
  const auto* source = static_cast<const uint16_t*>(vector.source) + vector.from + at;
  auto* target = static_cast<uint16_t*>(vector.target) + vector.to + at;
  if (extent.is_vector) {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
  } else {
    for (int i = 0; i < extent.count; ++i) target[i] = source[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams params, int num_lanes, bool is_vector) {
  const int32_t thread = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Vector vector = vector_of(params, thread / num_lanes);
  const int64_t end = vector.target != nullptr ? params.layout.head_dim : 0;
  const int64_t first = thread % num_lanes * kEight;
  const int64_t step = num_lanes * kEight;
  if (params.kv_dtype == DType::kInt8) {
    uint32_t largest = 0;
    for (int64_t i = first; i < end; i += step) {
      const Eight eight =
          load8(vector.source, params.source_dtype, vector.from + i, extent_of(i, end, is_vector));
      largest = max(largest, magnitude_bits(eight));
    }
    const float scale = scale_of(max_of_lanes(largest, num_lanes));
    for (int64_t i = first; i < end; i += step) {
      const Extent extent = extent_of(i, end, is_vector);
      const Eight eight = load8(vector.source, params.source_dtype, vector.from + i, extent);
      store8_quantized(static_cast<int8_t*>(vector.target) + vector.to + i, extent, eight, scale);
    }
    if (first == 0 && end > 0) *vector.scale = scale;
    return;
  }
  const bool is_copied = params.source_dtype == params.kv_dtype;
  for (int64_t i = first; i < end; i += step) {
    const Extent extent = extent_of(i, end, is_vector);
    if (is_copied && params.kv_dtype != DType::kFloat32) {
      copy8_of_16_bits(vector, i, extent);
    } else {
      store8(vector.target, params.kv_dtype, vector.to + i, extent,
             load8(vector.source, params.source_dtype, vector.from + i, extent));
    }
  }
}

bool is_vectorized(const AppendKvParams& params) {
  const KvLayout& layout = params.layout;
  const auto source_fits = [&](const void* base, int64_t row_stride, int64_t head_stride) {
    return rows_are_aligned(base, params.source_dtype, row_stride, params.num_rows) &&
           rows_are_aligned(base, params.source_dtype, head_stride, layout.num_kv_heads);
  };
  return layout.head_dim % kEight == 0 && is_aligned(params.k_pool, 16) &&
         is_aligned(params.v_pool, 16) &&
         source_fits(params.key, params.key_row_stride, params.key_head_stride) &&
         source_fits(params.value, params.value_row_stride, params.value_head_stride);
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream) {
  const KvLayout& layout = params.layout;
  if (params.num_rows < 0 || layout.page_size < 1 || layout.head_dim < 1) {
    return cudaErrorInvalidValue;
  }
  const int num_lanes = lanes_for(layout.head_dim);
  const int64_t num_threads = params.num_rows * 2 * layout.num_kv_heads * num_lanes;
  if (!fits_int32(num_threads + kThreads)) return cudaErrorInvalidValue;
  if (num_threads == 0) return cudaSuccess;
  return launch_kernel(append_kv_kernel, LaunchShape{ceil_div(num_threads, kThreads), kThreads},
                       stream, params, num_lanes, is_vectorized(params));
}

}  // namespace skv::cuda
