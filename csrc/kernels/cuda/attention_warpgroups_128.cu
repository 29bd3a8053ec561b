// Attention for head_dim 128 by the warpgroup products of Hopper: the same tiles, softmax and tree
// as attention_tiles_128.cu. See AttentionTuning::use_warpgroups for when it runs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/kernels/cuda/attention_tile.cuh"

namespace skv::cuda {
namespace {

[[maybe_unused]] constexpr int kHeadDim = 128;  // not by code for sm_80
constexpr int kThreads = kWarpSize * kMaxTileWarps;

template <typename T, typename Kv>
__global__ void __launch_bounds__(kThreads)
    attention_warpgroups_128_kernel([[maybe_unused]] const __grid_constant__ AttentionTask task) {
#if defined(SKV_HAS_WGMMA)
  attend_tiles<T, Kv, kHeadDim, true>(task);
#else
  unreachable_kernel();  // not built for sm_90a: an error of the launch, never a wrong result
#endif
}

}  // namespace

cudaError_t launch_warpgroups_128(const AttentionTask& task, cudaStream_t stream) {
  constexpr TileKernels kKernels{attention_warpgroups_128_kernel<__nv_bfloat16, __nv_bfloat16>,
                                 attention_warpgroups_128_kernel<__nv_bfloat16, int8_t>,
                                 attention_warpgroups_128_kernel<__half, __half>,
                                 attention_warpgroups_128_kernel<__half, int8_t>};
  return launch_tiles(kKernels, task, stream);
}

}  // namespace skv::cuda
