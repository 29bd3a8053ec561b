// For functions that CPU and CUDA kernels share. Always inline: builds for different instruction
// sets must not share one copy, and device code has no linker worth the name.
#pragma once

#if defined(__CUDACC__)
#define SKV_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SKV_HOST_DEVICE __attribute__((always_inline)) inline
#endif
