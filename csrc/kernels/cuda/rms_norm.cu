// Root-mean-square norm. One thread block per row; which thread adds which features depends on the
// feature number alone, so a row's bits do not depend on the batch.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The sum over the block, in warp order, in every thread.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams params) {
  const int64_t row = blockIdx.x;
  const int64_t input =
      row / params.inner_rows * params.outer_stride + row % params.inner_rows * params.inner_stride;
  const int64_t output = row * params.num_features;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < params.num_features; i += kThreads) {
    const float value = load_as_float(params.input, params.activation_dtype, input + i);
    squares = fmaf(value, value, squares);
  }
  const float mean = block_sum(squares) / static_cast<float>(params.num_features);
  const float scale = 1.0f / sqrtf(mean + params.epsilon);
  for (int64_t i = threadIdx.x; i < params.num_features; i += kThreads) {
    const float value = load_as_float(params.input, params.activation_dtype, input + i);
    store_from_float(params.output, params.activation_dtype, output + i,
                     value * scale * params.weight[i]);
  }
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_rows) || params.num_features < 0 || params.inner_rows < 1) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0 || params.num_features == 0) return cudaSuccess;
  return launch_kernel(rms_norm_kernel, {params.num_rows, kThreads}, stream, params);
}

}  // namespace skv::cuda
