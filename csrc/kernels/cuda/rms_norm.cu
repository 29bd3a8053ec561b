// Root-mean-square norm, of the input or of a residual that the input is added to first. Which
// thread adds which features depends on the feature number and the row length alone, so a row's
// bits do not depend on the batch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/eight.cuh"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

// A thread keeps its first eight features in registers: rows of up to 8192 are read once.
constexpr int kMaxThreads = 1024;
// Rows that one warp does alone (heads, for example) share blocks.
constexpr int kSmallRowsPerBlock = 8;

// The sum over the threads of a row, whole warps, in every one of them. Rows of more than one warp
// have a block of their own.
__device__ float row_sum(float value, int row_threads) {
  value = warp_sum(value);
  if (row_threads == kWarpSize) return value;
  __shared__ float warp_sums[kMaxThreads / kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_sum(lane < row_threads / kWarpSize ? warp_sums[lane] : 0.0f);
}

__device__ __forceinline__ float sum_of_squares(const Eight& eight, float sum) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum = fmaf(eight.values[i], eight.values[i], sum);
  return sum;
}

struct Row {
  int64_t input;   // its first element in the input
  int64_t output;  // its first element in the output, the residual and the sum
};

// What is normalised, from feature i on: with a residual, their sum, rounded to its dtype and
// written.
__device__ __forceinline__ Eight take(const RmsNormParams& params, const Row& row, int64_t i,
                                      Extent extent) {
  const DType dtype = params.activation_dtype;
  Eight x = load8(params.input, dtype, row.input + i, extent);
  if (params.residual == nullptr) return x;
  const Eight before = load8(params.residual, dtype, row.output + i, extent);
#pragma unroll
  for (int j = 0; j < kEight; ++j) x.values[j] = rounded(before.values[j] + x.values[j], dtype);
  store8(params.sum, dtype, row.output + i, extent, x);
  return x;
}

__device__ __forceinline__ void write(const RmsNormParams& params, const Row& row, int64_t i,
                                      Extent extent, Eight x, float scale) {
  const Eight weight = load8(params.weight, params.weight_dtype, i, extent);
#pragma unroll
  for (int j = 0; j < kEight; ++j) x.values[j] = x.values[j] * scale * weight.values[j];
  store8(params.output, params.activation_dtype, row.output + i, extent, x);
}

__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams params, int row_threads, bool is_vector) {
  const int thread = static_cast<int>(threadIdx.x) % row_threads;
  const int64_t number = int64_t{blockIdx.x} * (blockDim.x / row_threads) +
                         static_cast<int>(threadIdx.x) / row_threads;
  if (number >= params.num_rows) return;  // whole warps, of blocks of small rows
  const Row row{number / params.inner_rows * params.outer_stride +
                    number % params.inner_rows * params.inner_stride,
                number * params.num_features};
  const int64_t end = params.num_features;
  const int64_t first = int64_t{thread} * kEight;
  const int64_t step = int64_t{row_threads} * kEight;
  Eight kept{};
  if (first < end) kept = take(params, row, first, extent_of(first, end, is_vector));
  float squares = sum_of_squares(kept, 0.0f);
  for (int64_t i = first + step; i < end; i += step) {
    squares = sum_of_squares(take(params, row, i, extent_of(i, end, is_vector)), squares);
  }
  const float mean = row_sum(squares, row_threads) / static_cast<float>(end);
  const float scale = 1.0f / sqrtf(mean + params.epsilon);
  if (first < end) write(params, row, first, extent_of(first, end, is_vector), kept, scale);
  for (int64_t i = first + step; i < end; i += step) {
    const Extent extent = extent_of(i, end, is_vector);
    const Eight x = params.residual == nullptr
                        ? load8(params.input, params.activation_dtype, row.input + i, extent)
                        : load8(params.sum, params.activation_dtype, row.output + i, extent);
    write(params, row, i, extent, x, scale);
  }
}

bool is_vectorized(const RmsNormParams& params) {
  const DType dtype = params.activation_dtype;
  const int64_t outer_rows = ceil_div(params.num_rows, params.inner_rows);
  return params.num_features % kEight == 0 && is_aligned(params.weight, 16) &&
         is_aligned(params.output, 16) && is_aligned(params.residual, 16) &&
         is_aligned(params.sum, 16) &&
         rows_are_aligned(params.input, dtype, params.inner_stride, params.inner_rows) &&
         rows_are_aligned(params.input, dtype, params.outer_stride, outer_rows);
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.num_rows < 0 || params.num_features < 0 || params.inner_rows < 1) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0 || params.num_features == 0) return cudaSuccess;
  const int64_t warps = ceil_div(params.num_features, kWarpSize * kEight);
  const int row_threads = static_cast<int>(std::min<int64_t>(warps * kWarpSize, kMaxThreads));
  const int rows_per_block = row_threads == kWarpSize ? kSmallRowsPerBlock : 1;
  const int64_t num_blocks = ceil_div(params.num_rows, rows_per_block);
  if (!fits_grid(num_blocks)) return cudaErrorInvalidValue;
  return launch_kernel(rms_norm_kernel, LaunchShape{num_blocks, rows_per_block * row_threads},
                       stream, params, row_threads, is_vectorized(params));
}

}  // namespace skv::cuda
