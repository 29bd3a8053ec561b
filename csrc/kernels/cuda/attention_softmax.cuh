// Scores of a tile to weights: scale, soft cap, mask, and the online softmax of a chunk.
//
// Fragments are those of mma_m16n8k16: lane 4g + t holds rows g and g + 8 of its warp, here called
// rows 0 and 1 of the lane, and of each block of eight keys the keys 2t and 2t + 1. Scores are in
// units of log2, so that weights are powers of two.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "csrc/kernels/cuda/attention_work.cuh"
#include "csrc/kernels/cuda/ptx.cuh"

namespace skv::cuda {

inline constexpr int kKeyBlocks = kTileKeys / 8;
inline constexpr float kLog2E = 1.4426950408889634f;

using TileScores = float[kKeyBlocks][4];  // [.][2 * row + key]

// Positions, which are the last visible keys, of the two rows of a lane and over all of its warp.
// The first visible key never decreases with the position.
struct WarpPositions {
  int32_t rows[2];
  int32_t smallest;
  int32_t largest;

  // No row sees a key of the tile that begins at first_key.
  __device__ __forceinline__ bool is_tile_hidden(const AttentionTask& task,
                                                 int32_t first_key) const {
    return first_key > largest || first_key + kTileKeys <= first_visible(task, smallest);
  }
  // Every row sees all of it.
  __device__ __forceinline__ bool is_tile_visible(const AttentionTask& task,
                                                  int32_t first_key) const {
    return first_key + kTileKeys - 1 <= smallest && first_key >= first_visible(task, largest);
  }
};

// Softmax of the keys so far of the two rows of a lane. A row that saw no key has sum 0, every
// other one at least 1 or NaN. Until the chunk ends a lane's sum holds its own keys only.
struct RowSums {
  float maximum[2];
  float sum[2];

  __device__ __forceinline__ void clear() {
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }
};

// c * tanh(x / c); tanh from 2^x, whose relative error near 0 is an absolute one of the score.
__device__ __forceinline__ float capped(float score, float cap) {
  const float power = exp2_approx(score / cap * (2.0f * kLog2E));
  return cap * (1.0f - 2.0f / (1.0f + power));
}

// Products to scores. key_scales: of an int8 pool, else null.
__device__ __forceinline__ void scale_scores(TileScores& scores, const PagedAttentionParams& params,
                                             const float* key_scales) {
  const int key = 2 * (static_cast<int>(threadIdx.x) % 4);
  const bool has_cap = params.soft_cap > 0.0f;
  const float factor = has_cap ? params.scale : params.scale * kLog2E;
#pragma unroll
  for (int block = 0; block < kKeyBlocks; ++block) {
    float2 factors = make_float2(factor, factor);
    if (key_scales != nullptr) {
      const float2 scales = *reinterpret_cast<const float2*>(key_scales + block * 8 + key);
      factors = make_float2(factor * scales.x, factor * scales.y);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      scores[block][2 * row] *= factors.x;
      scores[block][2 * row + 1] *= factors.y;
    }
  }
  if (!has_cap) return;
#pragma unroll
  for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[block][i] = capped(scores[block][i], params.soft_cap) * kLog2E;
    }
  }
}

__device__ __forceinline__ void mask_scores(TileScores& scores, const AttentionTask& task,
                                            const WarpPositions& positions, int32_t first_key) {
  const int32_t lane_key = first_key + 2 * (static_cast<int32_t>(threadIdx.x) % 4);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int32_t last = positions.rows[row] - lane_key;
    const int32_t first = first_visible(task, positions.rows[row]) - lane_key;
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t key = block * 8 + i;
        if (key < first || key > last) scores[block][2 * row + i] = -INFINITY;
      }
    }
  }
}

// Largest of the four lanes that share a row; every lane gets it.
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullWarp, value, 2));
}
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// Sum of the weights of one row in a fixed order: 16 neighbouring keys, then pairs of those.
__device__ __forceinline__ float sum_weights(const TileScores& weights, int row) {
  float sums[kKeyBlocks / 2];
#pragma unroll
  for (int i = 0; i < kKeyBlocks / 2; ++i) {
    sums[i] = (weights[2 * i][2 * row] + weights[2 * i][2 * row + 1]) +
              (weights[2 * i + 1][2 * row] + weights[2 * i + 1][2 * row + 1]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Turns scores into weights 2^(score - maximum) and joins them to `sums`. decay[row] is what
// everything summed before has to be multiplied by; exactly 1 where the maximum stays.
__device__ __forceinline__ void weigh_scores(TileScores& scores, RowSums& sums, float (&decay)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = fmaxf(scores[0][2 * row], scores[0][2 * row + 1]);
#pragma unroll
    for (int block = 1; block < kKeyBlocks; ++block) {
      largest = fmaxf(largest, fmaxf(scores[block][2 * row], scores[block][2 * row + 1]));
    }
    const float maximum = fmaxf(sums.maximum[row], quad_max(largest));
    // With every key hidden so far, -inf - -inf would be NaN; -inf - 0 weighs 0.
    const float origin = maximum == -INFINITY ? 0.0f : maximum;
    decay[row] = exp2_approx(sums.maximum[row] - origin);
    sums.maximum[row] = maximum;
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
      scores[block][2 * row] = exp2_approx(scores[block][2 * row] - origin);
      scores[block][2 * row + 1] = exp2_approx(scores[block][2 * row + 1] - origin);
    }
    sums.sum[row] = fmaf(sums.sum[row], decay[row], sum_weights(scores, row));
  }
}

// The scale of an int8 value goes to its weight, after the weights were summed. A key of weight 0,
// such as one that the row does not see, stays so whatever its scale is.
__device__ __forceinline__ float scaled_weight(float weight, float scale) {
  return weight == 0.0f ? 0.0f : weight * scale;
}
__device__ __forceinline__ void scale_weights(TileScores& weights, const float* value_scales) {
  const int key = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int block = 0; block < kKeyBlocks; ++block) {
    const float2 scales = *reinterpret_cast<const float2*>(value_scales + block * 8 + key);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      weights[block][2 * row] = scaled_weight(weights[block][2 * row], scales.x);
      weights[block][2 * row + 1] = scaled_weight(weights[block][2 * row + 1], scales.y);
    }
  }
}

}  // namespace skv::cuda
