// Tensor-core attention for head_dim 96. A source for each: they
// compile at the same time.
#include "csrc/kernels/cuda/attention_tile.cuh"

namespace skv::cuda {

cudaError_t launch_tiles_96(const AttentionTask& task, cudaStream_t stream) {
  return launch_tiles<96>(task, stream);
}

}  // namespace skv::cuda
