// The second kernel of tensor-core attention: merges the partial results of a row's runs by the
// same tree of absolute chunk numbers that the first one follows inside a run (partial_tree.cuh).
//
// One block a (row, query head). The smallest aligned node over all runs of the row is cut into
// kWarps nodes, one for each warp, which merges its runs kBatch at a time; then they are merged.
//
//   runs          3  4  5 | 6  7 |          16 runs: node (4, 0) holds them, warp 1 has 4 to 7
//   warp          0 | 1  1  1  1 | ...
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "csrc/kernels/cuda/attention_task.h"
#include "csrc/kernels/cuda/attention_work.cuh"
#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/cuda/partial_tree.cuh"

namespace skv::cuda {
namespace {

constexpr int kWarpsLog2 = 2;
constexpr int kWarps = 1 << kWarpsLog2;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBatchLog2 = 2;
constexpr int kBatch = 1 << kBatchLog2;
// Waiting nodes of a warp: levels above those of a batch, below its own node.
constexpr int kLevels = kMergeLevels + 1 - kWarpsLog2 - kBatchLog2;

// A partial result; lane l of a warp holds the columns l, l + 32 and so on.
template <int kHeadDim>
struct Node {
  static constexpr int kColumns = kHeadDim / kWarpSize;
  float maximum;
  float sum;
  float values[kColumns];

  __device__ __forceinline__ void clear() {
    maximum = -INFINITY;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = 0.0f;
  }
  __device__ __forceinline__ void load(const AttentionPartials& partials, int64_t row, int lane) {
    const float2 state = reinterpret_cast<const float2*>(partials.states)[row];
    maximum = state.x;
    sum = state.y;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      values[i] = partials.values[row * kHeadDim + i * kWarpSize + lane];
    }
  }
  // This node becomes the one above `left` and itself.
  __device__ __forceinline__ void join_left(const Node& left) {
    const RowMerge merge(left.maximum, left.sum, maximum, sum);
    maximum = merge.maximum;
    sum = merge.sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = merge.join(left.values[i], values[i]);
  }
};

// Where the partial results of a row are.
struct RowRuns {
  int32_t begin;  // runs [begin, end)
  int32_t end;
  int32_t prefix_end;    // runs before it are those of the group
  int32_t own_begin;     // first run of the sequence's own
  int64_t group_first;   // partial row of run 0
  int64_t group_stride;  // from run to run
  int64_t own_first;     // of run own_begin
  int64_t own_stride;

  __device__ __forceinline__ int64_t partial_row(int32_t run) const {
    return run < prefix_end ? group_first + run * group_stride
                            : own_first + (run - own_begin) * own_stride;
  }
};

// False if the row has no partial results. All lanes of a warp; they get the same.
__device__ bool find_runs(const AttentionTask& task, int32_t row, int32_t head, RowRuns* runs) {
  const PagedAttentionParams& params = task.params;
  const int32_t num_sequences = static_cast<int32_t>(params.num_sequences);
  const int32_t run_log2 = *task.run_log2;
  if (num_sequences == 0 || row >= params.query_offsets[num_sequences]) return false;
  const int32_t sequence = last_at_most(params.query_offsets, 0, num_sequences, row);
  const SequenceWork work = sequence_work(task, sequence, run_log2);
  if (work.is_direct()) return false;
  const int32_t group = group_size(task);
  const int32_t kv_head = head / group;
  const int32_t position = work.first_position + row - work.first_row;
  runs->begin = (first_visible(task, max(position, 0)) / kChunkKeys) >> run_log2;
  runs->end = ((max(position, 0) / kChunkKeys) >> run_log2) + 1;
  runs->prefix_end = work.prefix_end;
  runs->own_begin = work.own_begin;
  const int64_t own_rows = static_cast<int64_t>(work.num_rows) * group;
  runs->own_stride = own_rows * kv_heads(task);
  runs->own_first = count_sequences(task, sequence, run_log2).partial_rows + kv_head * own_rows +
                    static_cast<int64_t>(row - work.first_row) * group + head % group;
  if (work.prefix_end == 0) return true;
  const int32_t group_index = last_at_most(
      task.prefixes.group_offsets, 0, static_cast<int32_t>(task.prefixes.num_groups), sequence);
  const int32_t first = task.prefixes.group_offsets[group_index];
  const SequenceWork first_work = sequence_work(task, first, run_log2);
  const int64_t group_rows = static_cast<int64_t>(first_work.group_rows) * group;
  runs->group_stride = group_rows * kv_heads(task);
  runs->group_first =
      count_sequences(task, first, run_log2).partial_rows +
      params.num_heads * static_cast<int64_t>(first_work.num_rows) * first_work.own_runs() +
      kv_head * group_rows + static_cast<int64_t>(row - first_work.group_first_row) * group +
      head % group;
  return true;
}

// Loads runs [first, first + kBatch) and merges them; those outside of [begin, end) are empty.
template <int kHeadDim>
__device__ __forceinline__ void merge_batch(const AttentionTask& task, const RowRuns& runs,
                                            int32_t first, int32_t begin, int32_t end, int lane,
                                            Node<kHeadDim>& result) {
  Node<kHeadDim> nodes[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int32_t run = first + i;
    nodes[i].clear();
    if (run >= begin && run < end) nodes[i].load(task.partials, runs.partial_row(run), lane);
  }
#pragma unroll
  for (int step = 1; step < kBatch; step *= 2) {
#pragma unroll
    for (int i = 0; i < kBatch; i += 2 * step) nodes[i + step].join_left(nodes[i]);
#pragma unroll
    for (int i = 0; i < kBatch; i += 2 * step) nodes[i] = nodes[i + step];
  }
  result = nodes[0];
}

// The node over runs [first, first + count), count a power of two, by the counter of
// partial_tree.cuh whose digits are batches.
template <int kHeadDim>
__device__ __forceinline__ void merge_runs(const AttentionTask& task, const RowRuns& runs,
                                           int32_t first, int32_t count, int lane,
                                           Node<kHeadDim>& result) {
  Node<kHeadDim> waiting[kLevels];
  const int32_t begin = max(first, runs.begin);
  const int32_t end = min(first + count, runs.end);
  uint32_t has_node = 0;
  result.clear();
  for (int32_t batch = (max(begin, first) - first) / kBatch; first + batch * kBatch < end;
       ++batch) {
    merge_batch<kHeadDim>(task, runs, first + batch * kBatch, begin, end, lane, result);
    const bool is_last = first + (batch + 1) * kBatch >= end;
    const int level = __ffs(~batch) - 1;  // so many nodes end with this batch
#pragma unroll
    for (int i = 0; i < kLevels; ++i) {
      const bool ends = (has_node >> i & 1) != 0 && (is_last || i < level);
      if (ends) result.join_left(waiting[i]);
      if (ends) has_node ^= 1u << i;
      if (!is_last && i == level) waiting[i] = result;
      if (!is_last && i == level) has_node |= 1u << i;
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_merge_kernel(const __grid_constant__ AttentionTask task) {
  constexpr int kColumns = Node<kHeadDim>::kColumns;
  __shared__ float states[kWarps][2];
  __shared__ float values[kWarps][kHeadDim];
  grid_dependency_wait();
  const PagedAttentionParams& params = task.params;
  const int32_t row = static_cast<int32_t>(blockIdx.x / params.num_heads);
  const int32_t head = static_cast<int32_t>(blockIdx.x % params.num_heads);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  RowRuns runs;
  if (!find_runs(task, row, head, &runs)) return;

  // The lowest level, but no less than the warps' own, on which one node holds all runs.
  int level = kWarpsLog2;
  while (runs.begin >> level != (runs.end - 1) >> level) ++level;
  const int32_t count = 1 << (level - kWarpsLog2);  // runs of a warp
  const int32_t first = (runs.begin >> level << level) + warp * count;
  Node<kHeadDim> node;
  merge_runs<kHeadDim>(task, runs, first, count, lane, node);
  if (lane == 0) {
    states[warp][0] = node.maximum;
    states[warp][1] = node.sum;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) values[warp][i * kWarpSize + lane] = node.values[i];
  __syncthreads();
  if (warp != 0) return;

  Node<kHeadDim> nodes[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    nodes[w].maximum = states[w][0];
    nodes[w].sum = states[w][1];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) nodes[w].values[i] = values[w][i * kWarpSize + lane];
  }
  static_assert(kWarps == 4);
  nodes[1].join_left(nodes[0]);
  nodes[3].join_left(nodes[2]);
  nodes[3].join_left(nodes[1]);
  const float inverse = inverse_sum(nodes[3].sum);
  const int64_t output = (static_cast<int64_t>(row) * params.num_heads + head) * kHeadDim;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    store_from_float(params.output, params.activation_dtype, output + i * kWarpSize + lane,
                     nodes[3].values[i] * inverse);
  }
}

}  // namespace

cudaError_t launch_merge(const AttentionTask& task, cudaStream_t stream) {
  const PagedAttentionParams& params = task.params;
  const LaunchShape shape{
      .blocks = params.num_rows * params.num_heads, .threads = kThreads, .overlaps_previous = true};
  return dispatch_head_dim(
      params.layout.head_dim,
      [&](auto head_dim) {
        return launch_kernel(attention_merge_kernel<decltype(head_dim)::value>, shape, stream,
                             task);
      },
      HeadDims{});
}

}  // namespace skv::cuda
