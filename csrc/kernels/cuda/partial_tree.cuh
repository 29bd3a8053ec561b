// Merging of partial results by a fixed binary tree over chunk numbers:
//
//   node(0, j) = chunk j           node(level, j) = node(level - 1, 2j) + node(level - 1, 2j + 1)
//
// where a node without a visible key is an exact identity. So any aligned part of the chunks may be
// merged by itself, and a walk over ascending chunks needs one waiting node a level, like the bits
// of a counter: chunk 5 = 101b follows the nodes (2, 0) of chunks 0 to 3 and (0, 4) of chunk 4.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "csrc/kernels/cuda/attention_mma.cuh"
#include "csrc/kernels/cuda/attention_softmax.cuh"
#include "csrc/kernels/cuda/ptx.cuh"

namespace skv::cuda {

// Of a row: how the values of two nodes are joined, and the state of both together.
struct RowMerge {
  float maximum;
  float sum;
  float left_scale;
  float right_scale;
  bool is_left_empty;
  bool is_right_empty;

  __device__ __forceinline__ RowMerge(float left_maximum, float left_sum, float right_maximum,
                                      float right_sum)
      : is_left_empty(left_sum == 0.0f), is_right_empty(right_sum == 0.0f) {
    const float larger = fmaxf(left_maximum, right_maximum);
    left_scale = exp2_approx(left_maximum - larger);
    right_scale = exp2_approx(right_maximum - larger);
    maximum = is_left_empty ? right_maximum : is_right_empty ? left_maximum : larger;
    sum = join(left_sum, right_sum);
  }
  // Selected, not multiplied by 1 and 0: -0 + 0 would lose the sign, -inf - -inf is NaN.
  __device__ __forceinline__ float join(float left, float right) const {
    const float both = fmaf(right, right_scale, left * left_scale);
    return is_left_empty ? right : is_right_empty ? left : both;
  }
};

// 1 / sum of a row; 0 for a row that saw no key, whose result is defined as zero.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// The waiting nodes of a thread: its accumulators and those of the others of its block, level by
// level, in an order that lets a warp write whole lines. The lowest level, which half of all chunks
// go through, may be in shared memory.
template <int kHeadDim>
class PartialStack {
 public:
  __device__ __forceinline__ PartialStack(const AttentionTask& task, float4* shared_bottom)
      : task_(task), bottom_(shared_bottom) {}

  // Joins `chunk`, counted from the start of the run, with what waits for it; then keeps the node
  // until its right neighbour comes. Of the last chunk: joins it with everything that waits.
  __device__ __forceinline__ void add(int32_t chunk, bool is_last, TileSums<kHeadDim>& values,
                                      RowSums& sums) {
    const int level = __ffs(~chunk) - 1;  // so many nodes end with this chunk
    uint32_t ready = is_last ? waiting_ : waiting_ & ((1u << level) - 1);
    waiting_ ^= ready;
    for (; ready != 0; ready &= ready - 1) {
      join_left(level_at(__ffs(static_cast<int>(ready)) - 1), values, sums);
    }
    if (is_last) return;
    put(level_at(level), values, sums);
    waiting_ |= 1u << level;
  }

 private:
  static constexpr int kVectors = kSumBlocks<kHeadDim> + 1;

  __device__ __forceinline__ float4* level_at(int level) const {
    const AttentionPlan& plan = task_.plan;
    if (plan.is_bottom_shared && level == 0) return bottom_ + threadIdx.x;
    const int upper = plan.is_bottom_shared ? level - 1 : level;
    const int64_t node = blockIdx.x * static_cast<int64_t>(plan.stack_levels) + upper;
    return task_.stacks + node * kVectors * blockDim.x + threadIdx.x;
  }

  static __device__ __forceinline__ void join_left(const float4* node, TileSums<kHeadDim>& values,
                                                   RowSums& sums) {
    const int stride = static_cast<int>(blockDim.x);
    const float4 left = node[(kVectors - 1) * stride];
    const RowMerge upper(left.x, left.z, sums.maximum[0], sums.sum[0]);
    const RowMerge lower(left.y, left.w, sums.maximum[1], sums.sum[1]);
    sums = {{upper.maximum, lower.maximum}, {upper.sum, lower.sum}};
#pragma unroll
    for (int block = 0; block < kSumBlocks<kHeadDim>; ++block) {
      // A few loads at a time: all of them at once would not fit the registers.
      if (block % 4 == 0) __syncwarp();
      const float4 other = node[block * stride];
      values[block][0] = upper.join(other.x, values[block][0]);
      values[block][1] = upper.join(other.y, values[block][1]);
      values[block][2] = lower.join(other.z, values[block][2]);
      values[block][3] = lower.join(other.w, values[block][3]);
    }
  }

  static __device__ __forceinline__ void put(float4* node, const TileSums<kHeadDim>& values,
                                             const RowSums& sums) {
    const int stride = static_cast<int>(blockDim.x);
#pragma unroll
    for (int block = 0; block < kSumBlocks<kHeadDim>; ++block) {
      node[block * stride] =
          make_float4(values[block][0], values[block][1], values[block][2], values[block][3]);
    }
    node[(kVectors - 1) * stride] =
        make_float4(sums.maximum[0], sums.maximum[1], sums.sum[0], sums.sum[1]);
  }

  const AttentionTask& task_;
  float4* bottom_;
  uint32_t waiting_ = 0;  // bit i: level i holds a node
};

}  // namespace skv::cuda
