// Tensor-core attention for head_dim 256, where two warps share sixteen rows (row_warps). A source
// for each: they compile at the same time.
#include "csrc/kernels/cuda/attention_tile.cuh"

namespace skv::cuda {

cudaError_t launch_tiles_256(const AttentionTask& task, cudaStream_t stream) {
  return launch_tiles<256>(task, stream);
}

}  // namespace skv::cuda
