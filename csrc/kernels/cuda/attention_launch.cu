// Which kernels a call of paged attention runs, on how many blocks, and with how much scratch.
//
// The host knows sizes only: N rows, S sequences and M pages, no lengths. So it bounds, and the
// device counts (attention_work.cuh).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "csrc/kernels/cuda/attention.h"
#include "csrc/kernels/cuda/attention_ring.cuh"
#include "csrc/kernels/cuda/attention_task.h"
#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::cuda {
namespace {

// Pieces of work for each block, at most: enough that a last, incomplete wave is short.
constexpr int64_t kItemsPerBlock = 4;
// Partial results for which there always is room where a prefix is shared.
constexpr int64_t kSharedPartialRows = int64_t{1} << 17;
constexpr int kRegistersPerThread = 255;

#if defined(SKV_BUILT_FOR_SM90A)
constexpr bool kHasWarpgroupCode = true;
#else
constexpr bool kHasWarpgroupCode = false;
#endif

struct DeviceLimits {
  int major;  // of the compute capability
  int minor;
  int multiprocessors;
  int shared_bytes;        // of a multiprocessor
  int block_shared_bytes;  // of a block at most
};

cudaError_t find_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto attribute = [&](int* value, cudaDeviceAttr name) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, name, device);
  };
  attribute(&limits->major, cudaDevAttrComputeCapabilityMajor);
  attribute(&limits->minor, cudaDevAttrComputeCapabilityMinor);
  attribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount);
  attribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  attribute(&limits->block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return status;
}

int32_t ceil_log2(int64_t value) {
  int32_t log2 = 0;
  while ((int64_t{1} << log2) < value) ++log2;
  return log2;
}

// Bytes of a thread's waiting node: its accumulators and the state of its two rows.
int64_t node_bytes(int64_t head_dim) {
  return (warp_columns(head_dim) / 8 + 1) * static_cast<int64_t>(sizeof(float4));
}

bool runs_on_tensor_cores(const PagedAttentionParams& params) {
  const bool has_16_bits = params.activation_dtype != DType::kFloat32;
  return has_16_bits &&
         (params.kv_dtype == params.activation_dtype || params.kv_dtype == DType::kInt8);
}

bool has_groups(const PagedAttentionCall& call) {
  // With a sliding window a long prefix is not seen by most rows: nothing is shared.
  return call.prefixes.group_offsets != nullptr && call.prefixes.num_groups > 0 &&
         call.params.sliding_window == 0;
}

// The smallest tile that holds the query vectors of an average sequence (or group, where a prefix
// is shared). More warps read K and V less often, and are idle where there are fewer rows.
int32_t choose_warps(const PagedAttentionCall& call) {
  const PagedAttentionParams& params = call.params;
  const int32_t least = row_warps(params.layout.head_dim);
  if (call.tuning.warps > 0) return std::clamp(call.tuning.warps, least, kMaxTileWarps);
  const int64_t sharers = has_groups(call) ? call.prefixes.num_groups : params.num_sequences;
  const int64_t group = params.num_heads / params.layout.num_kv_heads;
  const int64_t rows = ceil_div(params.num_rows * group, std::max<int64_t>(sharers, 1));
  int32_t warps = least;
  while (warps < kMaxTileWarps && rows > kWarpRows * (warps / least)) warps *= 2;
  return warps;
}

// Blocks that a multiprocessor holds at once; the others of a larger grid would only wait.
int64_t resident_blocks(const DeviceLimits& limits, int64_t shared_bytes, int32_t warps) {
  constexpr int64_t kReservedBytes = 1024;  // of each block, by the system
  constexpr int64_t kRegisters = 65536;
  const int64_t by_shared = limits.shared_bytes / (shared_bytes + kReservedBytes);
  const int64_t by_registers = kRegisters / (kRegistersPerThread * kWarpSize * warps);
  return std::max<int64_t>(1, std::min(by_shared, by_registers));
}

// Limits of the work list. Tiles: each sequence (and group) has at most one that is not full.
void bound_work(const PagedAttentionCall& call, int64_t num_blocks, AttentionPlan* plan) {
  const PagedAttentionParams& params = call.params;
  const int64_t group = params.num_heads / params.layout.num_kv_heads;
  const int64_t chunks =
      std::max<int64_t>(1, ceil_div(params.max_pages * params.layout.page_size, kChunkKeys));
  const int64_t tile_rows = plan->tile_rows;
  const int64_t full_tiles = params.num_rows * group / tile_rows;
  const int64_t part_tiles = std::min(params.num_sequences, params.num_rows);
  int64_t tiles = (full_tiles + part_tiles) * params.layout.num_kv_heads;
  if (has_groups(call)) tiles *= 2;
  plan->last_run_log2 = ceil_log2(chunks);
  plan->first_run_log2 = std::max(0, plan->last_run_log2 - kMergeLevels);
  plan->first_run_log2 = std::max(plan->first_run_log2, call.tuning.run_log2);
  // Pieces are counted in int32.
  while (plan->first_run_log2 < plan->last_run_log2 &&
         tiles * ceil_div(chunks, int64_t{1} << plan->first_run_log2) > (int64_t{1} << 30)) {
    ++plan->first_run_log2;
  }
  plan->first_run_log2 = std::min(plan->first_run_log2, plan->last_run_log2);
  const int64_t runs = ceil_div(chunks, int64_t{1} << plan->first_run_log2);
  plan->blocks = static_cast<int32_t>(std::max<int64_t>(1, std::min(num_blocks, tiles * runs)));
  // Bound of the partial results: 64 KB of them for each block at a head dim of 128 and one warp;
  // never more than one for each row and run. With a shared prefix there are also those of the
  // sequences' own runs, so that sharing does not end where there are many of them.
  plan->max_items = kItemsPerBlock * plan->blocks;
  plan->partial_rows = plan->max_items * tile_rows;
  const int64_t rows = params.num_rows * params.num_heads;
  if (has_groups(call)) {
    plan->max_items = std::max(plan->max_items, kItemsPerBlock * tiles);
    plan->partial_rows = std::max({plan->partial_rows, kSharedPartialRows, kItemsPerBlock * rows});
  }
  plan->partial_rows = runs > 1 ? std::min(plan->partial_rows, rows * runs) : 0;
}

template <int... kDims>
bool is_one_of(int64_t head_dim, std::integer_sequence<int, kDims...>) {
  return ((head_dim == kDims) || ...);
}

AttentionPlan make_plan(const PagedAttentionCall& call, const DeviceLimits& limits) {
  const PagedAttentionParams& params = call.params;
  const int64_t head_dim = params.layout.head_dim;
  AttentionPlan plan{};
  plan.warps = choose_warps(call);
  plan.tile_rows = kWarpRows * (plan.warps / row_warps(head_dim));
  plan.has_warpgroups = kHasWarpgroupCode && call.tuning.use_warpgroups && plan.warps % 4 == 0 &&
                        is_one_of(head_dim, WarpgroupHeadDims{}) && limits.major == 9 &&
                        limits.minor == 0;
  // Long runs are those of large tiles. A block of few warps has short ones, and other use for
  // shared memory: more blocks, with more loads in flight.
  plan.is_bottom_shared = plan.warps >= 4;
  if (attention_shared_bytes(params.kv_dtype, head_dim, plan) >
      std::min(limits.block_shared_bytes, limits.shared_bytes / 2)) {
    plan.is_bottom_shared = false;
  }
  const int64_t shared_bytes = attention_shared_bytes(params.kv_dtype, head_dim, plan);
  bound_work(call, limits.multiprocessors * resident_blocks(limits, shared_bytes, plan.warps),
             &plan);
  plan.stack_levels = std::max(0, plan.last_run_log2 - (plan.is_bottom_shared ? 1 : 0));
  return plan;
}

// Parts of the scratch, each aligned. Waiting nodes: one for each level below the longest run and
// thread of the grid, which is no larger than the device: 9 MB a level at 132 multiprocessors, a
// head dim of 128 and 8 warps.
struct ScratchLayout {
  int64_t stacks;
  int64_t states;
  int64_t values;
  int64_t end;
};

ScratchLayout lay_out_scratch(const AttentionPlan& plan, int64_t head_dim) {
  const auto aligned = [](int64_t bytes) {
    return ceil_div(bytes, kScratchAlignment) * kScratchAlignment;
  };
  const int64_t threads = static_cast<int64_t>(plan.blocks) * plan.warps * kWarpSize;
  const auto floats = static_cast<int64_t>(sizeof(float));
  ScratchLayout layout{};
  layout.stacks = kScratchAlignment;  // run_log2 is before them
  layout.states = layout.stacks + aligned(threads * plan.stack_levels * node_bytes(head_dim));
  layout.values = layout.states + aligned(plan.partial_rows * 2 * floats);
  layout.end = layout.values + aligned(plan.partial_rows * head_dim * floats);
  return layout;
}

cudaError_t check_call(const PagedAttentionCall& call) {
  const PagedAttentionParams& params = call.params;
  if (params.num_heads < 1 || params.layout.num_kv_heads < 1 || params.layout.page_size < 1 ||
      params.num_heads % params.layout.num_kv_heads != 0 ||
      !fits_grid(params.num_rows * params.num_heads) || !fits_int32(params.num_sequences) ||
      params.max_pages * params.layout.page_size > kMaxPositions) {
    return cudaErrorInvalidValue;
  }
  if (!is_aligned(params.k_pool, kPoolAlignment) || !is_aligned(params.v_pool, kPoolAlignment)) {
    return cudaErrorMisalignedAddress;
  }
  return cudaSuccess;
}

cudaError_t launch_tiles_of(const AttentionTask& task, cudaStream_t stream) {
  const int64_t head_dim = task.params.layout.head_dim;
  if (task.plan.has_warpgroups) {
    const auto launch = [&](auto dim) {
      return launch_tiles<decltype(dim)::value, true>(task, stream);
    };
    return dispatch_head_dim(head_dim, launch, WarpgroupHeadDims{});
  }
  const auto launch = [&](auto dim) {
    return launch_tiles<decltype(dim)::value, false>(task, stream);
  };
  return dispatch_head_dim(head_dim, launch, HeadDims{});
}

AttentionTask make_task(const PagedAttentionCall& call, const AttentionPlan& plan) {
  const PagedAttentionParams& params = call.params;
  const ScratchLayout layout = lay_out_scratch(plan, params.layout.head_dim);
  auto* scratch = static_cast<unsigned char*>(call.scratch);
  AttentionTask task{};
  task.params = params;
  if (has_groups(call)) task.prefixes = call.prefixes;
  task.plan = plan;
  task.run_log2 = reinterpret_cast<int32_t*>(scratch);
  task.stacks = reinterpret_cast<float4*>(scratch + layout.stacks);
  task.partials = {reinterpret_cast<float*>(scratch + layout.states),
                   reinterpret_cast<float*>(scratch + layout.values)};
  task.is_query_paired = is_aligned(params.query, 4) && params.query_row_stride % 2 == 0 &&
                         params.query_head_stride % 2 == 0;
  return task;
}

}  // namespace

int64_t attention_shared_bytes(DType kv_dtype, int64_t head_dim, const AttentionPlan& plan) {
  int64_t bytes = 0;
  const auto find = [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    bytes = kv_dtype == DType::kInt8 ? RingShape<int8_t, kHeadDim>::end(plan.warps)
                                     : RingShape<uint16_t, kHeadDim>::end(plan.warps);
    return cudaSuccess;
  };
  static_cast<void>(dispatch_head_dim(head_dim, find, HeadDims{}));
  if (plan.is_bottom_shared) bytes += plan.warps * kWarpSize * node_bytes(head_dim);
  return bytes + (plan.has_warpgroups ? kSwizzleAtomBytes : 0);  // room to align the operands
}

cudaError_t paged_attention_scratch(const PagedAttentionCall& call, int64_t* bytes) {
  *bytes = 0;
  const cudaError_t invalid = check_call(call);
  if (invalid != cudaSuccess) return invalid;
  if (!runs_on_tensor_cores(call.params) || call.params.num_rows == 0) return cudaSuccess;
  DeviceLimits limits{};
  const cudaError_t status = find_limits(&limits);
  if (status != cudaSuccess) return status;
  *bytes = lay_out_scratch(make_plan(call, limits), call.params.layout.head_dim).end;
  return cudaSuccess;
}

cudaError_t paged_attention(const PagedAttentionCall& call, cudaStream_t stream) {
  const PagedAttentionParams& params = call.params;
  const cudaError_t invalid = check_call(call);
  if (invalid != cudaSuccess) return invalid;
  if (params.num_rows == 0) return cudaSuccess;
  if (!runs_on_tensor_cores(params)) return scalar_attention(params, stream);
  DeviceLimits limits{};
  cudaError_t status = find_limits(&limits);
  if (status != cudaSuccess) return status;
  const AttentionPlan plan = make_plan(call, limits);
  if (call.scratch_bytes < lay_out_scratch(plan, params.layout.head_dim).end) {
    return cudaErrorInvalidValue;
  }
  const AttentionTask task = make_task(call, plan);
  status = launch_tiles_of(task, stream);
  // Where one run holds every position no row has a partial result.
  if (status != cudaSuccess || plan.partial_rows == 0) return status;
  return launch_merge(task, stream);
}

}  // namespace skv::cuda
