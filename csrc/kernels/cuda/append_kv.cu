// Writes new keys and values into their slots. One thread block per row.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams params) {
  const int64_t row = blockIdx.x;
  const int64_t slot = params.slots[row];
  if (slot < 0) return;
  SKV_DEVICE_ASSERT(slot < params.layout.num_slots());
  const int64_t page = slot / params.layout.page_size;
  const int64_t offset = slot % params.layout.page_size;
  const int32_t head_dim = static_cast<int32_t>(params.layout.head_dim);
  const int32_t num_elements = static_cast<int32_t>(params.layout.num_kv_heads) * head_dim;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_elements; i += kThreads) {
    const int32_t head = i / head_dim;
    const int32_t column = i % head_dim;
    const int64_t target = params.layout.vector_offset(page, head, offset) + column;
    const int64_t key = row * params.key_row_stride + head * params.key_head_stride + column;
    const int64_t value = row * params.value_row_stride + head * params.value_head_stride + column;
    store_from_float(params.k_pool, params.kv_dtype, target,
                     load_as_float(params.key, params.source_dtype, key));
    store_from_float(params.v_pool, params.kv_dtype, target,
                     load_as_float(params.value, params.source_dtype, value));
  }
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_rows) || params.layout.page_size < 1 ||
      !fits_int32(params.layout.num_kv_heads * params.layout.head_dim + kThreads)) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0) return cudaSuccess;
  return launch_kernel(append_kv_kernel, {params.num_rows, kThreads}, stream, params);
}

}  // namespace skv::cuda
