// Launcher of paged attention on CUDA; the contract is that of kernels.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "csrc/kernels/params.h"

namespace skv::cuda {

// For tests: results do not depend on it. -1 = chosen from the sizes.
struct AttentionTuning {
  int32_t run_log2 = -1;  // shortest run of chunks that a block may take
  int32_t warps = -1;     // of a block: 1, 2, 4 or 8; with a head dim of 256 at least 2
  // Tiles of four warps and more multiply by wgmma, where the device is of compute capability 9.0,
  // the head dim 64 or 128 and the code built for sm_90a. The one field that may change bits: that
  // both kinds of product round alike is for a device to show, so it is off unless asked for.
  bool use_warpgroups = false;
};

struct PagedAttentionCall {
  PagedAttentionParams params;
  SharedPrefixes prefixes;
  AttentionTuning tuning;
  void* scratch = nullptr;  // scratch_bytes(call) bytes, aligned to kScratchAlignment
  int64_t scratch_bytes = 0;
};

inline constexpr int64_t kScratchAlignment = 256;

// Bytes of scratch that paged_attention needs on the current device, which may be none. They depend
// on sizes, dtypes and the device alone, and are bounded (attention_launch.cu).
cudaError_t paged_attention_scratch(const PagedAttentionCall& call, int64_t* bytes);
// cudaErrorInvalidValue also where the scratch is smaller than that.
cudaError_t paged_attention(const PagedAttentionCall& call, cudaStream_t stream);

}  // namespace skv::cuda
