// Tensor-core attention for head_dim 256, where two warps share sixteen rows (row_warps). One
// source for each head dim: they compile at the same time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/kernels/cuda/attention_tile.cuh"

namespace skv::cuda {
namespace {

constexpr int kHeadDim = 256;
constexpr int kThreads = kWarpSize * kMaxTileWarps;

template <typename T, typename Kv>
__global__ void __launch_bounds__(kThreads)
    attention_tiles_256_kernel(const __grid_constant__ AttentionTask task) {
  attend_tiles<T, Kv, kHeadDim>(task);
}

}  // namespace

cudaError_t launch_tiles_256(const AttentionTask& task, cudaStream_t stream) {
  constexpr TileKernels kKernels{attention_tiles_256_kernel<__nv_bfloat16, __nv_bfloat16>,
                                 attention_tiles_256_kernel<__nv_bfloat16, int8_t>,
                                 attention_tiles_256_kernel<__half, __half>,
                                 attention_tiles_256_kernel<__half, int8_t>};
  return launch_tiles(kKernels, task, stream);
}

}  // namespace skv::cuda
