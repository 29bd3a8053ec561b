// The largest value of each row and its lowest index; NaN wins over everything, as on the CPU. One
// thread block per row.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/eight.cuh"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGroupsInFlight = 4;  // loads of eight that a thread issues before it looks at one

// Value and index as one number, so that the maximum is the answer whatever the order: values by
// size with NaN on top and both zeros equal, then the lower index. 0 is below them all.
__device__ __forceinline__ unsigned long long rank_of(float value, uint32_t index) {
  const uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
  uint32_t order = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  if (value != value) order = 0xffffffffu;
  return static_cast<unsigned long long>(order) << 32 | ~index;
}

struct Best {
  float value;  // NaN before the first one
  unsigned long long rank;
};

// Most groups hold nothing larger than the best so far: that costs one comparison an element.
__device__ __forceinline__ void look_at(const Eight& eight, uint32_t index, int count, Best& best) {
  bool is_candidate = false;
#pragma unroll
  for (int i = 0; i < kEight; ++i) is_candidate |= !(eight.values[i] <= best.value);
  if (!is_candidate) return;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const unsigned long long rank = rank_of(eight.values[i], index + i);
    if (i < count && rank > best.rank) best = {eight.values[i], rank};
  }
}

__device__ __forceinline__ unsigned long long warp_max_rank(unsigned long long rank) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    rank = max(rank, __shfl_xor_sync(kFullWarp, rank, mask));
  }
  return rank;
}

__global__ void __launch_bounds__(kThreads)
    argmax_kernel(const __grid_constant__ ArgmaxParams params, bool is_vector) {
  const int64_t row = int64_t{blockIdx.x} * params.row_stride;
  const int64_t end = params.vocab_size;
  Best best{__uint_as_float(0x7fc00000u), 0};
  int64_t i = int64_t{threadIdx.x} * kEight;
  constexpr int64_t kStep = kThreads * kEight;
  for (; i + (kGroupsInFlight - 1) * kStep + kEight <= end; i += kGroupsInFlight * kStep) {
    Eight groups[kGroupsInFlight];
#pragma unroll
    for (int group = 0; group < kGroupsInFlight; ++group) {
      groups[group] = load8(params.logits, params.logits_dtype, row + i + group * kStep,
                            Extent{kEight, is_vector});
    }
#pragma unroll
    for (int group = 0; group < kGroupsInFlight; ++group) {
      look_at(groups[group], static_cast<uint32_t>(i + group * kStep), kEight, best);
    }
  }
  for (; i < end; i += kStep) {
    const Extent extent = extent_of(i, end, is_vector);
    look_at(load8(params.logits, params.logits_dtype, row + i, extent), static_cast<uint32_t>(i),
            extent.count, best);
  }

  __shared__ unsigned long long warp_ranks[kWarps];
  unsigned long long rank = warp_max_rank(best.rank);
  if (threadIdx.x % kWarpSize == 0) warp_ranks[threadIdx.x / kWarpSize] = rank;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  rank = warp_max_rank(warp_ranks[threadIdx.x]);
  if (threadIdx.x != 0) return;
  const uint32_t index = ~static_cast<uint32_t>(rank);
  params.ids[blockIdx.x] = index;
  params.values[blockIdx.x] = load_as_float(params.logits, params.logits_dtype, row + index);
}

}  // namespace

cudaError_t argmax(const ArgmaxParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_rows) || params.vocab_size < 1 || !fits_int32(params.vocab_size)) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0) return cudaSuccess;
  const bool is_vector =
      params.vocab_size % kEight == 0 &&
      rows_are_aligned(params.logits, params.logits_dtype, params.row_stride, params.num_rows);
  return launch_kernel(argmax_kernel, LaunchShape{params.num_rows, kThreads}, stream, params,
                       is_vector);
}

}  // namespace skv::cuda
