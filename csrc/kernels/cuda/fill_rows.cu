// The rows of the next step of sequences whose tokens lie in device memory. One thread block: where
// a sequence's rows begin is a prefix sum over those before it, and there are few of them.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/loop_rule.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kMaxSequences == kThreads, "one thread counts the rows of one sequence");
static_assert(kWarps == kWarpSize, "one lane adds up one warp");

__device__ __forceinline__ int32_t warp_inclusive_sum(int32_t value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// The sum of `value` over the threads before this one.
__device__ int32_t block_exclusive_sum(int32_t value) {
  __shared__ int32_t warp_sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int32_t inclusive = warp_inclusive_sum(value, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  const int32_t warps_inclusive = warp_inclusive_sum(warp_sums[lane], lane);
  const int32_t warps_before = __shfl_sync(kFullWarp, warps_inclusive, warp > 0 ? warp - 1 : 0);
  return inclusive - value + (warp > 0 ? warps_before : 0);
}

__device__ void write_row(const FillRowsParams& params, int64_t sequence, int64_t index,
                          int64_t row) {
  const int64_t length = params.lengths[sequence];
  const int64_t position = length - 1 + index;
  SKV_DEVICE_ASSERT(length >= 1 && length <= params.capacity);
  SKV_DEVICE_ASSERT(position < params.max_pages * params.page_size);
  const int64_t page = params.page_table[sequence * params.max_pages + position / params.page_size];
  params.token_ids[row] = index == 0 ? params.history[sequence * params.capacity + length - 1]
                                     : params.draft_ids[sequence * params.max_draft + index - 1];
  params.positions[row] = static_cast<int32_t>(position);
  params.slots[row] = page * params.page_size + position % params.page_size;
  params.row_sequences[row] = sequence;
}

__global__ void __launch_bounds__(kThreads)
    fill_rows_kernel(const __grid_constant__ FillRowsParams params) {
  __shared__ int32_t offsets[kMaxSequences + 1];
  const int64_t thread = threadIdx.x;
  // All rows of all sequences are fewer than 2^31: the launcher asks for that.
  const auto num_rows =
      static_cast<int32_t>(thread < params.num_sequences ? num_step_rows(params, thread) : 0);
  const int32_t before = block_exclusive_sum(num_rows);
  offsets[thread] = before;
  if (thread == kThreads - 1) offsets[kThreads] = before + num_rows;
  if (thread < params.num_sequences) {
    const int64_t seq_len = num_rows == 0 ? 0 : int64_t{params.lengths[thread]} - 1 + num_rows;
    params.seq_lens[thread] = static_cast<int32_t>(seq_len);
    params.query_offsets[thread + 1] = before + num_rows;
  }
  if (thread == 0) params.query_offsets[0] = 0;
  __syncthreads();

  const int64_t most_rows = params.max_draft + 1;
  const int64_t total = params.num_sequences * most_rows;
  for (int64_t i = thread; i < total; i += kThreads) {
    const int64_t sequence = i / most_rows;
    const int64_t index = i % most_rows;
    const int32_t row = offsets[sequence] + static_cast<int32_t>(index);
    if (row < offsets[sequence + 1]) write_row(params, sequence, index, row);
  }
  for (int64_t row = offsets[params.num_sequences] + thread; row < total; row += kThreads) {
    params.token_ids[row] = 0;
    params.positions[row] = 0;
    params.slots[row] = -1;
    params.row_sequences[row] = 0;
  }
}

}  // namespace

cudaError_t fill_rows(const FillRowsParams& params, cudaStream_t stream) {
  if (params.num_sequences < 0 || params.num_sequences > kMaxSequences || params.page_size < 1 ||
      !fits_int32(params.max_draft) || !fits_int32(params.num_sequences * (params.max_draft + 1))) {
    return cudaErrorInvalidValue;
  }
  return launch_kernel(fill_rows_kernel, {1, kThreads}, stream, params);
}

}  // namespace skv::cuda
