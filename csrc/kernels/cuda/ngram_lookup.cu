// Prompt lookup: one thread block per sequence. Its threads share the ends where an earlier
// occurrence of the text's own ending may lie, and the best of them wins by an integer maximum, so
// the answer is the one of the CPU kernel whatever the order.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;

// An occurrence as one number: the longer match is larger, of equal ones the more recent. 0 = none.
using Occurrence = unsigned long long;

__device__ __forceinline__ Occurrence make_occurrence(int64_t length, int64_t end) {
  return static_cast<Occurrence>(length) << 32 | static_cast<Occurrence>(end);
}

// Number of equal tokens, at most `limit`, walking back from the ends of [0, end) and [0, length).
template <typename Token>
__device__ __forceinline__ int64_t common_ending(const Token* text, int64_t end, int64_t length,
                                                 int64_t limit) {
  int64_t matched = 0;
  while (matched < limit && text[end - 1 - matched] == text[length - 1 - matched]) ++matched;
  return matched;
}

// The largest of the block, in every thread.
__device__ Occurrence block_max(Occurrence value) {
  __shared__ Occurrence warp_best[kWarps];
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, mask));
  }
  if (threadIdx.x % kWarpSize == 0) warp_best[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = warp_best[threadIdx.x % kWarps];
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, mask));
  }
  return value;
}
static_assert(kWarps == kWarpSize, "one lane reads one warp's best");

template <typename Token>
__global__ void __launch_bounds__(kThreads)
    ngram_lookup_kernel(const __grid_constant__ NgramLookupParams params) {
  const int64_t sequence = blockIdx.x;
  const int64_t start = params.offsets[sequence];
  const int64_t length =
      params.lengths != nullptr ? params.lengths[sequence] : params.offsets[sequence + 1] - start;
  const Token* text = static_cast<const Token*>(params.tokens) + start;

  Occurrence best = 0;
  const Token last = length > 0 ? text[length - 1] : Token{0};
#pragma unroll 4
  for (int64_t end = threadIdx.x + 1; end < length; end += kThreads) {
    if (text[end - 1] != last) continue;
    const int64_t limit = end < params.max_n ? end : params.max_n;
    const int64_t matched = common_ending(text, end, length, limit);
    if (matched >= params.min_n) best = max(best, make_occurrence(matched, end));
  }
  best = block_max(best);

  const auto matched = static_cast<int64_t>(best >> 32);
  const auto end = static_cast<int64_t>(best & 0xffffffffu);
  const int64_t period = length - end;
  int64_t num_draft = 0;
  if (matched > 0) {
    const bool overlaps = period < matched;
    num_draft = overlaps || params.max_draft < period ? params.max_draft : period;
  }
  int32_t* draft = params.draft_ids + sequence * params.max_draft;
  for (int64_t i = threadIdx.x; i < params.max_draft; i += kThreads) {
    draft[i] = i < num_draft ? static_cast<int32_t>(text[end + i % period]) : -1;
  }
  if (threadIdx.x == 0) params.num_draft[sequence] = static_cast<int32_t>(num_draft);
}

}  // namespace

cudaError_t ngram_lookup(const NgramLookupParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_sequences) || params.min_n < 1 || params.max_n < params.min_n ||
      params.max_draft < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.num_sequences == 0) return cudaSuccess;
  const LaunchShape shape{params.num_sequences, kThreads};
  return params.tokens_are_int64
             ? launch_kernel(ngram_lookup_kernel<int64_t>, shape, stream, params)
             : launch_kernel(ngram_lookup_kernel<int32_t>, shape, stream, params);
}

}  // namespace skv::cuda
