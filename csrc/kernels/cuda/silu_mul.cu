// silu(gate) * up over rows [gate, up]. A thread block owns a run of one row's output.
#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFeaturesPerBlock = 4 * kThreads;

__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const __grid_constant__ SiluMulParams params, int64_t blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t begin = blockIdx.x % blocks_per_row * kFeaturesPerBlock;
  const int64_t end = min(begin + kFeaturesPerBlock, params.num_features);
  const int64_t gate_row = row * params.input_row_stride;
  const int64_t up_row = gate_row + params.num_features;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float gate = load_as_float(params.gate_up, params.activation_dtype, gate_row + i);
    const float up = load_as_float(params.gate_up, params.activation_dtype, up_row + i);
    // A gate far below zero gives exp = inf and gate / inf = -0, which is the limit.
    const float silu = gate / (1.0f + expf(-gate));
    store_from_float(params.output, params.activation_dtype, row * params.num_features + i,
                     silu * up);
  }
}

}  // namespace

cudaError_t silu_mul(const SiluMulParams& params, cudaStream_t stream) {
  if (params.num_rows < 0 || params.num_features < 0) return cudaErrorInvalidValue;
  const int64_t blocks_per_row = ceil_div(params.num_features, kFeaturesPerBlock);
  const int64_t num_blocks = params.num_rows * blocks_per_row;
  if (!fits_grid(num_blocks)) return cudaErrorInvalidValue;
  if (num_blocks == 0) return cudaSuccess;
  return launch_kernel(silu_mul_kernel, {num_blocks, kThreads}, stream, params, blocks_per_row);
}

}  // namespace skv::cuda
