// Rotates queries in place, and rotates and writes keys and values into their slots, in one pass.
// A run of lanes within a warp owns one vector: a head of one row. A lane owns both elements of a
// rotated pair, so the rotation in place needs no barrier.
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

// Eight pairs: columns i < D/2, and i + D/2.
struct Pairs {
  Eight low;
  Eight high;
};

// One vector on its way. target is null where nothing is written.
struct Vector {
  const void* source;
  int64_t from;  // element of source
  void* target;
  int64_t to;  // element of target
  DType target_dtype;
  const float* cosines;  // null: not rotated
  float* scale;          // of an int8 target, else null
};

__device__ __forceinline__ Vector query_vector(const RopeAppendKvParams& params, int64_t row,
                                               int32_t head, const float* cosines) {
  const int64_t at = row * params.query_row_stride + head * params.query_head_stride;
  return {params.query, at, params.query, at, params.activation_dtype, cosines, nullptr};
}

__device__ __forceinline__ Vector pool_vector(const RopeAppendKvParams& params, int64_t row,
                                              int64_t slot, int32_t head, bool is_value,
                                              const float* cosines) {
  const int64_t to = params.layout.slot_offset(slot, head);
  float* scale = is_value ? params.v_scales : params.k_scales;
  if (scale != nullptr) scale += params.layout.scale_offset(slot, head);
  if (is_value) {
    return {params.value,
            row * params.value_row_stride + head * params.value_head_stride,
            params.v_pool,
            to,
            params.kv_dtype,
            nullptr,
            scale};
  }
  return {params.key,
          row * params.key_row_stride + head * params.key_head_stride,
          params.k_pool,
          to,
          params.kv_dtype,
          cosines,
          scale};
}

// The vectors of a row: query heads, keys, values.
__device__ __forceinline__ Vector vector_of(const RopeAppendKvParams& params, int32_t number) {
  const int32_t num_heads = static_cast<int32_t>(params.num_heads);
  const int32_t num_kv_heads = static_cast<int32_t>(params.layout.num_kv_heads);
  const int32_t row_vectors = num_heads + 2 * num_kv_heads;
  const int64_t row = number / row_vectors;
  if (row >= params.num_rows) return {};
  SKV_DEVICE_ASSERT(params.positions[row] >= 0);
  const int32_t head = number % row_vectors;
  const float* cosines = params.cos_sin + int64_t{params.positions[row]} * params.layout.head_dim;
  if (head < num_heads) return query_vector(params, row, head, cosines);
  const int64_t slot = params.slots[row];
  if (slot < 0) return {};
  SKV_DEVICE_ASSERT(slot < params.layout.num_slots());
  const int32_t kv_head = head - num_heads;
  const bool is_value = kv_head >= num_kv_heads;
  return pool_vector(params, row, slot, is_value ? kv_head - num_kv_heads : kv_head, is_value,
                     cosines);
}

// The products are rounded before the sum, as on the CPU: left to itself the compiler fuses one of
// them or the other, and where a key is rotated for its scale and again for its bytes the two must
// agree.
__device__ __forceinline__ Pairs load_rotated(const Vector& vector, DType dtype, int64_t i,
                                              int64_t half, Extent extent) {
  Pairs pairs{load8(vector.source, dtype, vector.from + i, extent),
              load8(vector.source, dtype, vector.from + half + i, extent)};
  if (vector.cosines == nullptr) return pairs;
  const Eight cosines = load8_of(vector.cosines + i, extent);
  const Eight sines = load8_of(vector.cosines + half + i, extent);
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    const float low = pairs.low.values[j];
    const float high = pairs.high.values[j];
    pairs.low.values[j] =
        __fsub_rn(__fmul_rn(low, cosines.values[j]), __fmul_rn(high, sines.values[j]));
    pairs.high.values[j] =
        __fadd_rn(__fmul_rn(high, cosines.values[j]), __fmul_rn(low, sines.values[j]));
  }
  return pairs;
}

__global__ void __launch_bounds__(kThreads)
    rope_append_kv_kernel(const __grid_constant__ RopeAppendKvParams params, int num_lanes,
                          bool is_vector) {
  const int32_t thread = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Vector vector = vector_of(params, thread / num_lanes);
  const int64_t half = params.layout.head_dim / 2;
  const int64_t end = vector.target != nullptr ? half : 0;
  const int64_t first = thread % num_lanes * kEight;
  const int64_t step = num_lanes * kEight;
  float scale = 0.0f;
  if (params.kv_dtype == DType::kInt8) {  // the same for all threads: they meet in max_of_lanes
    uint32_t largest = 0;
    for (int64_t i = first; vector.scale != nullptr && i < end; i += step) {
      const Pairs pairs =
          load_rotated(vector, params.activation_dtype, i, half, extent_of(i, end, is_vector));
      largest = max(largest, max(magnitude_bits(pairs.low), magnitude_bits(pairs.high)));
    }
    scale = scale_of(max_of_lanes(largest, num_lanes));
    if (vector.scale != nullptr && first == 0) *vector.scale = scale;
  }
  for (int64_t i = first; i < end; i += step) {
    const Extent extent = extent_of(i, end, is_vector);
    const Pairs pairs = load_rotated(vector, params.activation_dtype, i, half, extent);
    if (vector.scale != nullptr) {
      auto* target = static_cast<int8_t*>(vector.target) + vector.to + i;
      store8_quantized(target, extent, pairs.low, scale);
      store8_quantized(target + half, extent, pairs.high, scale);
    } else {
      store8(vector.target, vector.target_dtype, vector.to + i, extent, pairs.low);
      store8(vector.target, vector.target_dtype, vector.to + half + i, extent, pairs.high);
    }
  }
}

bool is_vectorized(const RopeAppendKvParams& params) {
  const int64_t num_kv_heads = params.layout.num_kv_heads;
  const auto source_fits = [&](const void* base, int64_t row_stride, int64_t head_stride,
                               int64_t num_heads) {
    return rows_are_aligned(base, params.activation_dtype, row_stride, params.num_rows) &&
           rows_are_aligned(base, params.activation_dtype, head_stride, num_heads);
  };
  return params.layout.head_dim % (2 * kEight) == 0 && is_aligned(params.cos_sin, 16) &&
         is_aligned(params.k_pool, 16) && is_aligned(params.v_pool, 16) &&
         source_fits(params.query, params.query_row_stride, params.query_head_stride,
                     params.num_heads) &&
         source_fits(params.key, params.key_row_stride, params.key_head_stride, num_kv_heads) &&
         source_fits(params.value, params.value_row_stride, params.value_head_stride, num_kv_heads);
}

}  // namespace

cudaError_t rope_append_kv(const RopeAppendKvParams& params, cudaStream_t stream) {
  const KvLayout& layout = params.layout;
  if (params.num_rows < 0 || layout.page_size < 1 || layout.head_dim < 2 ||
      layout.head_dim % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  const int num_lanes = lanes_for(layout.head_dim / 2);
  const int64_t num_vectors = params.num_rows * (params.num_heads + 2 * layout.num_kv_heads);
  const int64_t num_threads = num_vectors * num_lanes;
  if (!fits_int32(num_threads + kThreads)) return cudaErrorInvalidValue;
  if (num_threads == 0) return cudaSuccess;
  return launch_kernel(rope_append_kv_kernel,
                       LaunchShape{ceil_div(num_threads, kThreads), kThreads}, stream, params,
                       num_lanes, is_vectorized(params));
}

}  // namespace skv::cuda
