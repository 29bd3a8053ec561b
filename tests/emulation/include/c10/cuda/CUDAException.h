// Shadow of torch's header.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(expression)                                                          \
  do {                                                                                      \
    const cudaError_t skv_status = (expression);                                            \
    TORCH_CHECK(skv_status == cudaSuccess, "CUDA error: ", cudaGetErrorString(skv_status)); \
  } while (0)
