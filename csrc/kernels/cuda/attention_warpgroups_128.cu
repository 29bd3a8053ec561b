// Attention for head_dim 128 by the warpgroup products of Hopper: AttentionTuning::use_warpgroups.
#include "csrc/kernels/cuda/attention_tile.cuh"

namespace skv::cuda {

cudaError_t launch_warpgroups_128(const AttentionTask& task, cudaStream_t stream) {
  return launch_tiles<128, true>(task, stream);
}

}  // namespace skv::cuda
