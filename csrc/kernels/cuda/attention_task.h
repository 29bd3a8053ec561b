// What the tensor-core kernels of paged attention are launched with, and the sizes that host and
// device agree on. How a result is summed follows from kChunkKeys, kTileKeys and absolute positions
// alone (docs/adr/0013-attention-on-cuda.md); everything in AttentionPlan only says who computes
// what, and changes no bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "csrc/kernels/params.h"

namespace skv::cuda {

inline constexpr int32_t kTileKeys = 64;    // keys that one step of the online softmax takes
inline constexpr int32_t kChunkKeys = 512;  // keys that are reduced from a fresh state
inline constexpr int32_t kChunkTiles = kChunkKeys / kTileKeys;
inline constexpr int32_t kWarpRows = 16;  // query vectors of a warp: the rows of one matrix product
inline constexpr int32_t kMaxTileWarps = 8;  // of a block

// Chunks of a run are 2^run_log2. A row whose keys lie in at most 2^kMergeLevels runs can be
// merged.
inline constexpr int32_t kMergeLevels = 13;

// Neighbouring warps that share kWarpRows rows: all of them compute the same scores and weights,
// and each sums its part of the value columns. A warp has registers for the sums of 128 columns.
SKV_HOST_DEVICE constexpr int32_t row_warps(int64_t head_dim) { return head_dim > 128 ? 2 : 1; }
// Value columns that a warp sums.
SKV_HOST_DEVICE constexpr int64_t warp_columns(int64_t head_dim) {
  return head_dim / row_warps(head_dim);
}

// A row tile is kWarpRows query vectors of one KV head for each row_warps(D) warps of a block.
struct AttentionPlan {
  int32_t warps;           // of a block: 1, 2, 4 or 8, and row_warps(D) at least
  int32_t tile_rows;       // query vectors of a row tile
  int32_t blocks;          // of the grid; each takes every blocks-th piece of work
  int32_t first_run_log2;  // the runs are the shortest from here on that fit the two limits below
  int32_t last_run_log2;   // one run of this length holds every position
  int32_t stack_levels;    // of the binary counter in global memory
  bool has_warpgroups;     // products by whole warpgroups
  bool is_bottom_shared;   // the counter's lowest level is in shared memory and not one of these
  int64_t max_items;       // pieces of work (row tile x KV head x run)
  int64_t partial_rows;    // partial results that there is room for
};

// Partial results in memory: maximum and sum of row i at states[2i], its D columns at values[i *
// D].
struct AttentionPartials {
  float* states;
  float* values;
};

struct AttentionTask {
  PagedAttentionParams params;
  SharedPrefixes prefixes;
  AttentionPlan plan;
  AttentionPartials partials;
  float4* stacks;        // [blocks, stack_levels, warp_columns(D) / 8 + 1, threads]
  int32_t* run_log2;     // [1], what the first kernel chose, for the second
  bool is_query_paired;  // two neighbouring elements of the query may be loaded at once
};

// Bytes of dynamic shared memory that a block of `plan` needs.
int64_t attention_shared_bytes(DType kv_dtype, int64_t head_dim, const AttentionPlan& plan);

// Head dims with a kernel whose products are by warpgroups (AttentionTuning::use_warpgroups).
using WarpgroupHeadDims = std::integer_sequence<int, 64, 128>;

// The two kernels; preconditions: the task was planned for its params, 16-bit activations. That of
// each head dim is compiled in a source of its own, which cmake/Instantiate.cmake writes.
template <int kHeadDim, bool kByWarpgroup>
cudaError_t launch_tiles(const AttentionTask& task, cudaStream_t stream);
cudaError_t launch_merge(const AttentionTask& task, cudaStream_t stream);

// The kernel for all other dtypes, one (row, query head) a block.
cudaError_t scalar_attention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace skv::cuda
