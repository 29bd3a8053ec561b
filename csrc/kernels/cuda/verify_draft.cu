// Compares drafts with the model's choices: one warp per sequence, 32 tokens at a time.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

template <typename Id>
__global__ void __launch_bounds__(kThreads)
    verify_draft_kernel(const __grid_constant__ VerifyDraftParams params) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t sequence =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int64_t>(threadIdx.x) / kWarpSize;
  if (sequence >= params.num_sequences) return;  // whole warps
  const int64_t start = params.draft_offsets[sequence];
  const int64_t length = params.draft_offsets[sequence + 1] - start;
  const Id* draft = static_cast<const Id*>(params.draft_ids) + start;
  const Id* target = static_cast<const Id*>(params.target_ids) + start + sequence;
  int64_t accepted = 0;
  while (true) {
    const int64_t i = accepted + lane;
    const bool ends = i >= length || draft[i] != target[i];
    const unsigned enders = __ballot_sync(kFullWarp, ends);
    if (enders != 0) {
      accepted += __ffs(static_cast<int>(enders)) - 1;
      break;
    }
    accepted += kWarpSize;
  }
  if (lane == 0) {
    params.num_accepted[sequence] = static_cast<int32_t>(accepted);
    static_cast<Id*>(params.bonus_ids)[sequence] = target[accepted];
  }
}

}  // namespace

cudaError_t verify_draft(const VerifyDraftParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_sequences)) return cudaErrorInvalidValue;
  if (params.num_sequences == 0) return cudaSuccess;
  const LaunchShape shape{ceil_div(params.num_sequences, kWarps), kThreads};
  return params.ids_are_int64 ? launch_kernel(verify_draft_kernel<int64_t>, shape, stream, params)
                              : launch_kernel(verify_draft_kernel<int32_t>, shape, stream, params);
}

}  // namespace skv::cuda
