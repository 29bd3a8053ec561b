// The end of a step of sequences whose tokens lie in device memory: one warp per sequence, a lane
// for each of its rows, 32 at a time. The first row that ends the run decides.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/loop_rule.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

// What one row says; a lane past the last row says that the run is over.
struct Verdict {
  int32_t token = 0;
  bool is_bad = false;
  bool agrees = false;
  bool stops = false;
};

__device__ Verdict judge(const AdvanceSequencesParams& params, int64_t sequence, int64_t row,
                         int64_t end) {
  Verdict verdict;
  if (row >= end) return verdict;
  verdict.token = static_cast<int32_t>(params.target_ids[row]);
  verdict.is_bad = !isfinite(params.target_values[row]);
  verdict.agrees = row + 1 < end && params.token_ids[row + 1] == verdict.token;
  const int32_t* stops = params.stop_ids + sequence * params.num_stop_ids;
  for (int64_t i = 0; i < params.num_stop_ids; ++i) {
    verdict.stops = verdict.stops || stops[i] == verdict.token;
  }
  return verdict;
}

__global__ void __launch_bounds__(kThreads)
    advance_sequences_kernel(const __grid_constant__ AdvanceSequencesParams params) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t sequence =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int64_t>(threadIdx.x) / kWarpSize;
  if (sequence >= params.num_sequences) return;  // whole warps
  const int64_t begin = params.query_offsets[sequence];
  const int64_t end = params.query_offsets[sequence + 1];
  if (begin == end) return;
  const int64_t length = params.lengths[sequence];
  const int64_t num_left = params.num_left[sequence];
  int32_t* history = params.history + sequence * params.capacity + length;
  SKV_DEVICE_ASSERT(num_left >= 1 && length >= 0 &&
                    length + min(num_left, end - begin) <= params.capacity);

  int64_t base = 0;  // rows of the sequence before this round, all of which agreed
  while (true) {
    const int64_t index = base + lane;
    const Verdict verdict = judge(params, sequence, begin + index, end);
    const bool is_last =
        verdict.is_bad || verdict.stops || !verdict.agrees || index + 1 >= num_left;
    const unsigned lasts = __ballot_sync(kFullWarp, is_last);
    const int decider = lasts != 0 ? __ffs(static_cast<int>(lasts)) - 1 : kWarpSize;
    if (lane < decider || (lane == decider && !verdict.is_bad)) history[index] = verdict.token;
    if (lane == decider) {
      const int64_t taken = index + (verdict.is_bad ? 0 : 1);
      params.lengths[sequence] = static_cast<int32_t>(length + taken);
      params.num_left[sequence] = verdict.is_bad
                                      ? kStoppedByBadLogits
                                      : static_cast<int32_t>(verdict.stops ? 0 : num_left - taken);
      int32_t* counts = params.counts + 3 * sequence;
      counts[0] = add_to_count(counts[0], 1);
      counts[1] = add_to_count(counts[1], end - begin - 1);
      counts[2] = add_to_count(counts[2], index + (!verdict.is_bad && verdict.agrees ? 1 : 0));
    }
    if (decider < kWarpSize) return;
    base += kWarpSize;
  }
}

}  // namespace

cudaError_t advance_sequences(const AdvanceSequencesParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_sequences) || params.num_stop_ids < 0) return cudaErrorInvalidValue;
  if (params.num_sequences == 0) return cudaSuccess;
  const LaunchShape shape{ceil_div(params.num_sequences, kWarps), kThreads};
  return launch_kernel(advance_sequences_kernel, shape, stream, params);
}

}  // namespace skv::cuda
