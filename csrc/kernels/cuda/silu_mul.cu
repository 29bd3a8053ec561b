// silu(gate) * up over rows [gate, up]. A thread owns eight neighbouring features of a row.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/eight.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const __grid_constant__ SiluMulParams params, int32_t row_threads,
                    bool is_vector) {
  const int32_t thread = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / row_threads;
  if (row >= params.num_rows) return;
  const int64_t i = int64_t{thread % row_threads} * kEight;
  const Extent extent = extent_of(i, params.num_features, is_vector);
  const int64_t gate_at = row * params.input_row_stride + i;
  const Eight gate = load8(params.gate_up, params.activation_dtype, gate_at, extent);
  Eight result =
      load8(params.gate_up, params.activation_dtype, gate_at + params.num_features, extent);
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    // A gate far below zero gives exp = inf and gate / inf = -0, which is the limit.
    result.values[j] *= gate.values[j] / (1.0f + expf(-gate.values[j]));
  }
  store8(params.output, params.activation_dtype, row * params.num_features + i, extent, result);
}

}  // namespace

cudaError_t silu_mul(const SiluMulParams& params, cudaStream_t stream) {
  if (params.num_rows < 0 || params.num_features < 0) return cudaErrorInvalidValue;
  const int64_t row_threads = ceil_div(params.num_features, kEight);
  const int64_t num_threads = params.num_rows * row_threads;
  if (!fits_int32(num_threads + kThreads)) return cudaErrorInvalidValue;
  if (num_threads == 0) return cudaSuccess;
  const bool is_vector = params.num_features % kEight == 0 && is_aligned(params.output, 16) &&
                         rows_are_aligned(params.gate_up, params.activation_dtype,
                                          params.input_row_stride, params.num_rows);
  return launch_kernel(silu_mul_kernel, LaunchShape{ceil_div(num_threads, kThreads), kThreads},
                       stream, params, static_cast<int32_t>(row_threads), is_vector);
}

}  // namespace skv::cuda
