// Paged attention without tensor cores, for float32 queries or pools: one kernel for decode, extend
// and verify rows.
//
// One thread block computes one (row, query head). Keys are cut into chunks of kChunk positions,
// anchored at absolute position 0; a warp reduces a chunk to a partial (maximum, sum, acc[D]) from
// a fresh state, and the block merges the partials in chunk order:
//
//   position  0 ........ 63 | 64 ...... 127 | 128 ..... 191 | ...
//   warp           0        |       1       |       2       | ...   kWarps chunks a round
//   merge     state <- partial 0 <- partial 1 <- partial 2 ...
//
// Inside a chunk a key's lane group is its absolute position mod 4. So every sum of a row is
// ordered by absolute positions alone: the bits depend neither on the batch nor on pages, nor on
// which tokens of the sequence were computed in the same call.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "csrc/kernels/cuda/attention_task.h"
#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kChunk = 64;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMinBlocks = 2;  // leaves a thread 128 registers
constexpr int kLanesPerKey = 8;
constexpr int kKeysPerStep = kWarpSize / kLanesPerKey;
static_assert(kChunk == 2 * kWarpSize, "softmax holds two scores a lane");
static_assert(kChunk % kKeysPerStep == 0, "a step never crosses a chunk");

// What one row may see: keys [first_key, last_key] of `pages`; nothing if last_key < first_key.
struct VisibleKeys {
  const int32_t* pages;
  int32_t first_key;
  int32_t last_key;
};

__device__ VisibleKeys visible_keys(const PagedAttentionParams& params, int64_t row) {
  // The last sequence whose rows begin at or before `row`; empty sequences before it share its
  // offset and are passed over.
  int64_t low = -1;
  int64_t high = params.num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (params.query_offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (low < 0 || row >= params.query_offsets[low + 1]) return {nullptr, 0, -1};
  const int64_t position = params.seq_lens[low] - params.query_offsets[low + 1] + row;
  SKV_DEVICE_ASSERT(position >= 0);
  SKV_DEVICE_ASSERT(position < params.max_pages * params.layout.page_size);
  int64_t first = 0;
  if (params.sliding_window > 0 && position >= params.sliding_window) {
    first = position - params.sliding_window + 1;
  }
  return {params.page_table + low * params.page_table_row_stride, static_cast<int32_t>(first),
          static_cast<int32_t>(position)};
}

// Lane `lane` holds columns 4 * (v * kLanesPerKey + lane % kLanesPerKey) + [0, 4) for each v, so
// the eight lanes of a key read neighbouring addresses.
template <int kHeadDim>
struct LaneColumns {
  static constexpr int kVectors = kHeadDim / (4 * kLanesPerKey);
  static_assert(kHeadDim % (4 * kLanesPerKey) == 0);
  static __device__ __forceinline__ int column(int vector, int lane) {
    return 4 * (vector * kLanesPerKey + lane % kLanesPerKey);
  }
};

// Per warp: the scores of its chunk, then its partial.
template <int kHeadDim>
struct Partials {
  float scores[kWarps][kChunk];
  float acc[kWarps][kHeadDim];
  float maximum[kWarps];
  float sum[kWarps];
};

// Number of the vector of a key among all vectors of a pool.
__device__ __forceinline__ int64_t key_vector(const PagedAttentionParams& params,
                                              const int32_t* pages, int32_t kv_head, int32_t key) {
  const int32_t page_size = static_cast<int32_t>(params.layout.page_size);
  const int32_t page = pages[key / page_size];
  SKV_DEVICE_ASSERT(page >= 0 && page < params.layout.num_pages);
  return (page * params.layout.num_kv_heads + kv_head) * page_size + key % page_size;
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

// Scores of the visible keys of one chunk; all others stay -inf and their slots are not read.
template <typename Kv, int kHeadDim>
__device__ void score_chunk(const PagedAttentionParams& params, const VisibleKeys& keys,
                            int32_t kv_head, int32_t begin, int32_t end, const float4* query,
                            int lane, float* scores) {
  using Columns = LaneColumns<kHeadDim>;
  scores[lane] = -INFINITY;
  scores[lane + kWarpSize] = -INFINITY;
  __syncwarp();
  const int group = lane / kLanesPerKey;
  // The bounds are the same in all lanes: the shuffles need the whole warp.
  for (int32_t base = begin - begin % kKeysPerStep; base <= end; base += kKeysPerStep) {
    const int32_t key = base + group;
    const bool visible = key >= begin && key <= end;
    float dot = 0.0f;
    if (visible) {
      const int64_t index = key_vector(params, keys.pages, kv_head, key);
      const Kv* vector = static_cast<const Kv*>(params.k_pool) + index * kHeadDim;
#pragma unroll
      for (int v = 0; v < Columns::kVectors; ++v) {
        dot = dot4(query[v], load4(vector + Columns::column(v, lane)), dot);
      }
      // Every lane: a factor of its part of the sum.
      if constexpr (std::is_same_v<Kv, int8_t>) dot *= params.k_scales[index];
    }
#pragma unroll
    for (int mask = kLanesPerKey / 2; mask > 0; mask /= 2) {
      dot += __shfl_xor_sync(kFullWarp, dot, mask);
    }
    if (visible && lane % kLanesPerKey == 0) {
      float score = dot * params.scale;
      if (params.soft_cap > 0.0f) score = params.soft_cap * tanhf(score / params.soft_cap);
      scores[key % kChunk] = score;
    }
  }
  __syncwarp();
}

// Weighted sum of the values of one chunk; `weights` are its softmax numerators.
template <typename Kv, int kHeadDim>
__device__ void sum_values(const PagedAttentionParams& params, const VisibleKeys& keys,
                           int32_t kv_head, int32_t begin, int32_t end, const float* weights,
                           int lane, float* result) {
  using Columns = LaneColumns<kHeadDim>;
  float4 acc[Columns::kVectors];
#pragma unroll
  for (int v = 0; v < Columns::kVectors; ++v) acc[v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int32_t key = begin - begin % kKeysPerStep + lane / kLanesPerKey; key <= end;
       key += kKeysPerStep) {
    if (key < begin) continue;
    const int64_t index = key_vector(params, keys.pages, kv_head, key);
    const Kv* vector = static_cast<const Kv*>(params.v_pool) + index * kHeadDim;
    float weight = weights[key % kChunk];
    if constexpr (std::is_same_v<Kv, int8_t>) weight *= params.v_scales[index];
#pragma unroll
    for (int v = 0; v < Columns::kVectors; ++v) {
      const float4 value = load4(vector + Columns::column(v, lane));
      acc[v].x = fmaf(weight, value.x, acc[v].x);
      acc[v].y = fmaf(weight, value.y, acc[v].y);
      acc[v].z = fmaf(weight, value.z, acc[v].z);
      acc[v].w = fmaf(weight, value.w, acc[v].w);
    }
  }
#pragma unroll
  for (int v = 0; v < Columns::kVectors; ++v) {
#pragma unroll
    for (int mask = kLanesPerKey; mask < kWarpSize; mask *= 2) {
      acc[v].x += __shfl_xor_sync(kFullWarp, acc[v].x, mask);
      acc[v].y += __shfl_xor_sync(kFullWarp, acc[v].y, mask);
      acc[v].z += __shfl_xor_sync(kFullWarp, acc[v].z, mask);
      acc[v].w += __shfl_xor_sync(kFullWarp, acc[v].w, mask);
    }
    if (lane < kLanesPerKey) {
      *reinterpret_cast<float4*>(result + Columns::column(v, lane)) = acc[v];
    }
  }
}

template <typename Kv, int kHeadDim>
__device__ void reduce_chunk(const PagedAttentionParams& params, const VisibleKeys& keys,
                             int32_t kv_head, int32_t chunk, const float4* query, int warp,
                             int lane, Partials<kHeadDim>& partials) {
  const int32_t begin = max(keys.first_key, chunk * kChunk);
  const int32_t end = min(keys.last_key, chunk * kChunk + (kChunk - 1));
  float* scores = partials.scores[warp];
  score_chunk<Kv, kHeadDim>(params, keys, kv_head, begin, end, query, lane, scores);
  const float low = scores[lane];
  const float high = scores[lane + kWarpSize];
  const float maximum = warp_max(fmaxf(low, high));
  const float low_weight = expf(low - maximum);  // hidden keys: exp(-inf) is exactly 0
  const float high_weight = expf(high - maximum);
  const float sum = warp_sum(low_weight + high_weight);
  scores[lane] = low_weight;
  scores[lane + kWarpSize] = high_weight;
  if (lane == 0) {
    partials.maximum[warp] = maximum;
    partials.sum[warp] = sum;
  }
  __syncwarp();
  sum_values<Kv, kHeadDim>(params, keys, kv_head, begin, end, scores, lane, partials.acc[warp]);
}

template <typename Kv, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    scalar_attention_kernel(const __grid_constant__ PagedAttentionParams params) {
  using Columns = LaneColumns<kHeadDim>;
  static_assert(kHeadDim <= kThreads, "one thread merges one column");
  __shared__ __align__(16) Partials<kHeadDim> partials;

  const int64_t row = blockIdx.x / params.num_heads;
  const int32_t head = static_cast<int32_t>(blockIdx.x % params.num_heads);
  const int32_t group_size = static_cast<int32_t>(params.num_heads / params.layout.num_kv_heads);
  const int32_t kv_head = head / group_size;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int column = static_cast<int>(threadIdx.x);
  const VisibleKeys keys = visible_keys(params, row);

  const int64_t query_offset = row * params.query_row_stride + head * params.query_head_stride;
  float4 query[Columns::kVectors];
#pragma unroll
  for (int v = 0; v < Columns::kVectors; ++v) {
    const int64_t index = query_offset + Columns::column(v, lane);
    query[v] = make_float4(load_as_float(params.query, params.activation_dtype, index),
                           load_as_float(params.query, params.activation_dtype, index + 1),
                           load_as_float(params.query, params.activation_dtype, index + 2),
                           load_as_float(params.query, params.activation_dtype, index + 3));
  }

  float maximum = -INFINITY;
  float sum = 0.0f;
  float acc = 0.0f;
  if (keys.last_key >= keys.first_key) {
    const int32_t last_chunk = keys.last_key / kChunk;
    for (int32_t round = keys.first_key / kChunk; round <= last_chunk; round += kWarps) {
      if (round + warp <= last_chunk) {
        reduce_chunk<Kv, kHeadDim>(params, keys, kv_head, round + warp, query, warp, lane,
                                   partials);
      }
      __syncthreads();
      if (column < kHeadDim) {
        const int num_partials = min(kWarps, last_chunk - round + 1);
        for (int w = 0; w < num_partials; ++w) {
          const float merged = fmaxf(maximum, partials.maximum[w]);
          const float old_scale = expf(maximum - merged);
          const float new_scale = expf(partials.maximum[w] - merged);
          sum = fmaf(partials.sum[w], new_scale, sum * old_scale);
          acc = fmaf(partials.acc[w][column], new_scale, acc * old_scale);
          maximum = merged;
        }
      }
      __syncthreads();
    }
  }
  if (column < kHeadDim) {
    // A row that belongs to no sequence, or sees no key, is defined as zero.
    const float result = keys.last_key >= keys.first_key ? acc / sum : 0.0f;
    const int64_t index = (row * params.num_heads + head) * kHeadDim + column;
    store_from_float(params.output, params.activation_dtype, index, result);
  }
}

}  // namespace

cudaError_t scalar_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  const int64_t num_blocks = params.num_rows * params.num_heads;
  const auto launch = [&](auto tag) {
    using Kv = typename decltype(tag)::type;
    return dispatch_head_dim(
        params.layout.head_dim,
        [&](auto head_dim) {
          return launch_kernel(scalar_attention_kernel<Kv, decltype(head_dim)::value>,
                               {num_blocks, kThreads}, stream, params);
        },
        HeadDims{});
  };
  if (params.kv_dtype == DType::kInt8) return launch(TypeTag<int8_t>{});
  return dispatch_dtype(params.kv_dtype, launch);
}

}  // namespace skv::cuda
