// One block: pieces of work one after the other, each from its first key to its output or partial.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/attention_mma.cuh"
#include "csrc/kernels/cuda/attention_ring.cuh"
#include "csrc/kernels/cuda/attention_softmax.cuh"
#include "csrc/kernels/cuda/attention_work.cuh"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/cuda/partial_tree.cuh"

namespace skv::cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// Place in the tile of the first of a warp's sixteen rows.
template <int kHeadDim>
__device__ __forceinline__ int first_place() {
  return warp_id() / row_warps(kHeadDim) * kWarpRows;
}

// The row at a place of the tile. The last tile of a sequence has fewer rows than warps have
// places: those past the end compute the last row again, and write nothing.
struct PackedRow {
  int32_t row;     // of the batch
  int32_t head;    // query head
  int32_t packed;  // in the tile
  bool is_valid;

  __device__ __forceinline__ PackedRow(const AttentionTask& task, const TileWork& tile, int place) {
    const int32_t group = group_size(task);
    is_valid = place < tile.num_packed;
    packed = min(place, tile.num_packed - 1);
    row = tile.first_row + (tile.first_packed + packed) / group;
    head = tile.kv_head * group + (tile.first_packed + packed) % group;
  }
};

template <int kHeadDim>
__device__ __forceinline__ WarpPositions warp_positions(const AttentionTask& task,
                                                        const TileWork& tile) {
  WarpPositions positions;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const PackedRow row(task, tile, first_place<kHeadDim>() + lane_id() / 4 + 8 * i);
    positions.rows[i] = tile.position_of(task, row.row - tile.first_row);
  }
  positions.smallest = min(positions.rows[0], positions.rows[1]);
  positions.largest = max(positions.rows[0], positions.rows[1]);
#pragma unroll
  for (int mask = 4; mask < kWarpSize; mask *= 2) {
    positions.smallest =
        min(positions.smallest, __shfl_xor_sync(kFullWarp, positions.smallest, mask));
    positions.largest = max(positions.largest, __shfl_xor_sync(kFullWarp, positions.largest, mask));
  }
  return positions;
}

// Elements `column` and `column` + 1 of the query vector that starts at element `begin`.
__device__ __forceinline__ uint32_t load_query_pair(const AttentionTask& task, int64_t begin,
                                                    int column) {
  const auto* source = static_cast<const uint16_t*>(task.params.query) + begin + column;
  if (task.is_query_paired) return *reinterpret_cast<const uint32_t*>(source);
  return source[0] | static_cast<uint32_t>(source[1]) << 16;
}

// Where the query lies in shared memory, the warps that share rows load it together: it must follow
// a barrier of the block (KvRing::start), and one must follow before its use (KvRing::next).
template <int kHeadDim>
__device__ __forceinline__ void load_query(const AttentionTask& task, const TileWork& tile,
                                           unsigned char* shared, int offset,
                                           QueryFragments<kHeadDim>& query) {
  const PagedAttentionParams& params = task.params;
  const int lane = lane_id();
  if constexpr (QueryFragments<kHeadDim>::kIsShared) {
    constexpr int kPairs = kHeadDim / 2;
    constexpr int kSharers = row_warps(kHeadDim);
    query.offset = offset + warp_id() / kSharers * RingShape<uint16_t, kHeadDim>::kQueryBytes;
    unsigned char* own = shared + query.offset;
    for (int i = warp_id() % kSharers; i < kWarpRows; i += kSharers) {
      const PackedRow row(task, tile, first_place<kHeadDim>() + i);
      const int64_t begin = row.row * params.query_row_stride + row.head * params.query_head_stride;
#pragma unroll
      for (int pair = lane; pair < kPairs; pair += kWarpSize) {
        *reinterpret_cast<uint32_t*>(own + 16 * tile_piece<kHeadDim>(i, pair / 4) +
                                     4 * (pair % 4)) = load_query_pair(task, begin, 2 * pair);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PackedRow row(task, tile, first_place<kHeadDim>() + lane / 4 + 8 * i);
      const int64_t begin = row.row * params.query_row_stride + row.head * params.query_head_stride;
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const int column = 16 * step + 2 * (lane % 4);
        query.values[step][i] = load_query_pair(task, begin, column);
        query.values[step][2 + i] = load_query_pair(task, begin, column + 8);
      }
    }
  }
}

// The normalised rows, as the op returns them.
template <typename T, int kHeadDim>
__device__ __forceinline__ void write_output(const AttentionTask& task, const TileWork& tile,
                                             const TileSums<kHeadDim>& values,
                                             const RowSums& sums) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const PackedRow row(task, tile, first_place<kHeadDim>() + lane_id() / 4 + 8 * i);
    if (!row.is_valid) continue;
    const float inverse = inverse_sum(sums.sum[i]);
    auto* output =
        static_cast<uint32_t*>(task.params.output) +
        ((row.row * task.params.num_heads + row.head) * kHeadDim + first_column<kHeadDim>()) / 2 +
        lane_id() % 4;
#pragma unroll
    for (int block = 0; block < kSumBlocks<kHeadDim>; ++block) {
      output[4 * block] =
          pack2<T>(values[block][2 * i] * inverse, values[block][2 * i + 1] * inverse);
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void write_partial(const AttentionTask& task, const TileWork& tile,
                                              const TileSums<kHeadDim>& values,
                                              const RowSums& sums) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const PackedRow row(task, tile, first_place<kHeadDim>() + lane_id() / 4 + 8 * i);
    if (!row.is_valid) continue;
    const int64_t partial = tile.first_partial + row.packed;
    SKV_DEVICE_ASSERT(partial < task.plan.partial_rows);
    if (first_column<kHeadDim>() == 0 && lane_id() % 4 == 0) {
      reinterpret_cast<float2*>(task.partials.states)[partial] =
          make_float2(sums.maximum[i], sums.sum[i]);
    }
    auto* target = reinterpret_cast<float2*>(task.partials.values + partial * kHeadDim +
                                             first_column<kHeadDim>()) +
                   lane_id() % 4;
#pragma unroll
    for (int block = 0; block < kSumBlocks<kHeadDim>; ++block) {
      target[4 * block] = make_float2(values[block][2 * i], values[block][2 * i + 1]);
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void clear_state(TileSums<kHeadDim>& values, RowSums& sums) {
  sums.clear();
#pragma unroll
  for (int block = 0; block < kSumBlocks<kHeadDim>; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[block][i] = 0.0f;
  }
}

// Everything of one piece of work that has keys: the fold of its chunks.
template <typename T, typename Kv, int kHeadDim, bool kByWarpgroup>
__device__ __forceinline__ void fold_keys(const AttentionTask& task, const TileWork& tile,
                                          int32_t run_log2, unsigned char* shared,
                                          PartialStack<kHeadDim>& stack, TileSums<kHeadDim>& values,
                                          RowSums& sums) {
  using Shape = RingShape<Kv, kHeadDim>;
  KvRing<T, Kv, kHeadDim, kByWarpgroup> ring(task, tile, shared);
  ring.start();
  QueryFragments<kHeadDim> query;
  load_query<kHeadDim>(task, tile, shared, Shape::kQueryOffset, query);
  const WarpPositions positions = warp_positions<kHeadDim>(task, tile);
  const int32_t end_tile = (tile.key_end + kTileKeys - 1) / kTileKeys;
  for (int32_t t = tile.key_begin / kTileKeys; t < end_tile; ++t) {
    const int32_t first_key = t * kTileKeys;
    // What a warp leaves out would have changed no bit of its rows; a warpgroup stays together.
    const bool is_seen = kByWarpgroup || !positions.is_tile_hidden(task, first_key);
    TileScores scores;
    WeightFragments weights;
    const int keys = ring.next();
    if (is_seen) {
      float decay[2];
      if constexpr (kByWarpgroup) {
        multiply_keys_by_warpgroup<T, kHeadDim>(query, shared, keys, scores);
      } else {
        multiply_keys<T, kHeadDim>(query, shared, keys, scores);
      }
      scale_scores(scores, task.params, Shape::kIsQuantized ? ring.scales() : nullptr);
      if (!positions.is_tile_visible(task, first_key)) {
        mask_scores(scores, task, positions, first_key);
      }
      weigh_scores(scores, sums, decay);
      decay_sums<kHeadDim>(values, decay);
      if constexpr (!Shape::kIsQuantized) round_weights<T>(scores, weights);
    }
    const int tile_values = ring.next();
    if (is_seen) {
      if constexpr (Shape::kIsQuantized) {
        scale_weights(scores, ring.scales());
        round_weights<T>(scores, weights);
      }
      if constexpr (kByWarpgroup) {
        add_values_by_warpgroup<T, kHeadDim>(weights, shared, tile_values, values);
      } else {
        add_values<T, kHeadDim>(weights, shared, tile_values, values);
      }
    }
    const bool is_last = t + 1 == end_tile;
    if (!is_last && (t + 1) % kChunkTiles != 0) continue;
    sums.sum[0] = quad_sum(sums.sum[0]);
    sums.sum[1] = quad_sum(sums.sum[1]);
    const int32_t chunk = t / kChunkTiles & ((1 << run_log2) - 1);
    stack.add(chunk, is_last, values, sums);
    if (!is_last) clear_state<kHeadDim>(values, sums);
  }
}

template <typename T, typename Kv, int kHeadDim, bool kByWarpgroup>
__device__ __forceinline__ void attend_tile(const AttentionTask& task, const TileWork& tile,
                                            int32_t run_log2, unsigned char* shared,
                                            float4* stack_bottom) {
  TileSums<kHeadDim> values;
  RowSums sums;
  clear_state<kHeadDim>(values, sums);
  if (tile.key_begin < tile.key_end) {
    PartialStack<kHeadDim> stack(task, stack_bottom);
    fold_keys<T, Kv, kHeadDim, kByWarpgroup>(task, tile, run_log2, shared, stack, values, sums);
  }
  if (tile.is_direct) {
    write_output<T, kHeadDim>(task, tile, values, sums);
  } else {
    write_partial<kHeadDim>(task, tile, values, sums);
  }
}

// Rows that belong to no sequence are zero.
__device__ __forceinline__ void clear_rows_past_the_end(const AttentionTask& task) {
  const PagedAttentionParams& params = task.params;
  const int64_t row_pairs = params.num_heads * params.layout.head_dim / 2;
  const int64_t end = params.num_rows * row_pairs;
  for (int64_t i = params.query_offsets[params.num_sequences] * row_pairs +
                   blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
       i < end; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    static_cast<uint32_t*>(params.output)[i] = 0;
  }
}

template <typename T, typename Kv, int kHeadDim, bool kByWarpgroup = false>
__device__ __forceinline__ void attend_tiles(const AttentionTask& task) {
  using Shape = RingShape<Kv, kHeadDim>;
  SKV_DYNAMIC_SHARED(unsigned char, all_shared);
  unsigned char* shared = all_shared;
  if constexpr (kByWarpgroup) shared = aligned_operands(all_shared);
  auto* stack_bottom = reinterpret_cast<float4*>(shared + Shape::end(task.plan.warps));
  // What is the same for all threads is found by one warp, and kept out of the registers.
  __shared__ int32_t run_log2;
  __shared__ WorkCursor cursor;
  __shared__ TileWork tile;
  if (warp_id() == 0) {
    const int32_t chosen = choose_run_log2(task);
    if (lane_id() == 0) {
      run_log2 = chosen;
      if (blockIdx.x == 0) *task.run_log2 = chosen;
      cursor.start();
    }
  }
  clear_rows_past_the_end(task);
  for (int64_t item = blockIdx.x;; item += gridDim.x) {
    __syncthreads();  // nobody reads the tile before
    if (warp_id() == 0) {
      TileWork found;
      found.is_there = find_tile(task, run_log2, item, &cursor, &found);
      if (lane_id() == 0) tile = found;
    }
    __syncthreads();
    if (!tile.is_there) break;
    // A late run of an early tile: none of its rows sees a key of it, so none of them reads it.
    if (tile.key_begin >= tile.key_end && !tile.is_direct) continue;
    attend_tile<T, Kv, kHeadDim, kByWarpgroup>(task, tile, run_log2, shared, stack_bottom);
  }
  grid_dependency_launch();
}

template <typename T, typename Kv, int kHeadDim, bool kByWarpgroup>
__global__ void __launch_bounds__(kWarpSize* kMaxTileWarps)
    attention_tiles_kernel([[maybe_unused]] const __grid_constant__ AttentionTask task) {
  if constexpr (kHasWarpgroups || !kByWarpgroup) {
    attend_tiles<T, Kv, kHeadDim, kByWarpgroup>(task);
  } else {
    unreachable_kernel();  // in code for sm_80: an error of the launch, never a wrong result
  }
}

template <typename T, int kHeadDim, bool kByWarpgroup>
auto tile_kernel(bool is_int8) {
  return is_int8 ? attention_tiles_kernel<T, int8_t, kHeadDim, kByWarpgroup>
                 : attention_tiles_kernel<T, T, kHeadDim, kByWarpgroup>;
}

template <int kHeadDim, bool kByWarpgroup>
cudaError_t launch_tiles(const AttentionTask& task, cudaStream_t stream) {
  const PagedAttentionParams& params = task.params;
  const bool is_int8 = params.kv_dtype == DType::kInt8;
  const LaunchShape shape{.blocks = task.plan.blocks,
                          .threads = task.plan.warps * kWarpSize,
                          .shared_bytes = static_cast<size_t>(
                              attention_shared_bytes(params.kv_dtype, kHeadDim, task.plan))};
  const auto kernel = params.activation_dtype == DType::kBFloat16
                          ? tile_kernel<__nv_bfloat16, kHeadDim, kByWarpgroup>(is_int8)
                          : tile_kernel<__half, kHeadDim, kByWarpgroup>(is_int8);
  return launch_kernel(kernel, shape, stream, task);
}

}  // namespace skv::cuda
