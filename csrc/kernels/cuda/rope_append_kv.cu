// Rotates queries in place, and rotates and writes keys and values into their slots, in one pass.
// One thread block per row; the two halves of a rotated pair belong to one thread, so the rotation
// in place needs no barrier.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;

struct Pair {
  float low;   // column i < D/2
  float high;  // column i + D/2
};

__device__ __forceinline__ Pair rotate(Pair pair, float cosine, float sine) {
  return {pair.low * cosine - pair.high * sine, pair.high * cosine + pair.low * sine};
}

__device__ __forceinline__ Pair load_pair(const void* base, DType dtype, int64_t index,
                                          int32_t half) {
  return {load_as_float(base, dtype, index), load_as_float(base, dtype, index + half)};
}

__device__ __forceinline__ void store_pair(void* base, DType dtype, int64_t index, int32_t half,
                                           Pair pair) {
  store_from_float(base, dtype, index, pair.low);
  store_from_float(base, dtype, index + half, pair.high);
}

__global__ void __launch_bounds__(kThreads)
    rope_append_kv_kernel(const __grid_constant__ RopeAppendKvParams params) {
  const int64_t row = blockIdx.x;
  const int64_t slot = params.slots[row];
  SKV_DEVICE_ASSERT(slot < params.layout.num_slots());
  SKV_DEVICE_ASSERT(params.positions[row] >= 0);
  const int32_t head_dim = static_cast<int32_t>(params.layout.head_dim);
  const int32_t half = head_dim / 2;
  const float* cosines = params.cos_sin + int64_t{params.positions[row]} * head_dim;
  const float* sines = cosines + half;

  const int32_t query_pairs = static_cast<int32_t>(params.num_heads) * half;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < query_pairs; i += kThreads) {
    const int32_t column = i % half;
    const int64_t index =
        row * params.query_row_stride + (i / half) * params.query_head_stride + column;
    const Pair pair = load_pair(params.query, params.activation_dtype, index, half);
    store_pair(params.query, params.activation_dtype, index, half,
               rotate(pair, cosines[column], sines[column]));
  }

  if (slot < 0) return;
  const int64_t page = slot / params.layout.page_size;
  const int64_t offset = slot % params.layout.page_size;
  const int32_t kv_pairs = static_cast<int32_t>(params.layout.num_kv_heads) * half;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kv_pairs; i += kThreads) {
    const int32_t head = i / half;
    const int32_t column = i % half;
    const int64_t target = params.layout.vector_offset(page, head, offset) + column;
    const int64_t key = row * params.key_row_stride + head * params.key_head_stride + column;
    const int64_t value = row * params.value_row_stride + head * params.value_head_stride + column;
    const Pair pair = load_pair(params.key, params.activation_dtype, key, half);
    store_pair(params.k_pool, params.kv_dtype, target, half,
               rotate(pair, cosines[column], sines[column]));
    store_pair(params.v_pool, params.kv_dtype, target, half,
               load_pair(params.value, params.activation_dtype, value, half));
  }
}

}  // namespace

cudaError_t rope_append_kv(const RopeAppendKvParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_rows) || params.layout.page_size < 1 ||
      params.layout.head_dim % 2 != 0 ||
      !fits_int32(params.num_heads * params.layout.head_dim + kThreads) ||
      !fits_int32(params.layout.num_kv_heads * params.layout.head_dim + kThreads)) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0) return cudaSuccess;
  return launch_kernel(rope_append_kv_kernel, {params.num_rows, kThreads}, stream, params);
}

}  // namespace skv::cuda
