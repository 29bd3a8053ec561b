// What every CUDA op needs around a launcher: the current stream, and the launch status as an
// exception. Only c10/cuda headers: those of ATen/cuda pull in cuBLAS and cuSPARSE.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "csrc/kernels/cuda/kernels.h"
#include "csrc/ops/checks.h"

namespace skv::ops {

// Launches on the current stream of the device of `tensor`, which is made current meanwhile.
template <typename Params>
void launch(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t),
            const Params& params, const at::Tensor& tensor) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(tensor.device().index());
  const cudaError_t status = launcher(params, stream.stream());
  TORCH_CHECK(status == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(status));
}

// A dense pool at an address the kernels can read four elements at a time.
inline void check_pool_alignment(const OpCheck& check, const char* name, const at::Tensor& pool) {
  const auto address = reinterpret_cast<uintptr_t>(pool.const_data_ptr());
  check.value(name, address % cuda::kPoolAlignment == 0, "a data pointer aligned to 16 bytes",
              "a view at an odd offset");
}

}  // namespace skv::ops
