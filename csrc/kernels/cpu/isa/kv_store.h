// Stores runs of floats into a pool in the pool's dtype (round to nearest even).
#pragma once

#include <cstring>

#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

SKV_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

SKV_INLINE void store_half_run(const float* source, uint16_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) Vec::load(source + i).store_half(target + i);
  for (; i < count; ++i) target[i] = float_to_half(source[i]);
}

// pool[at + i] = source[i] for i < count.
SKV_INLINE void store_run(const float* source, int64_t count, void* pool, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(static_cast<float*>(pool) + at, source,
                  static_cast<size_t>(count) * sizeof(float));
      break;
    case DType::kFloat16:
      store_half_run(source, static_cast<uint16_t*>(pool) + at, count);
      break;
    case DType::kBFloat16: {
      uint16_t* target = static_cast<uint16_t*>(pool) + at;
      for (int64_t i = 0; i < count; ++i) target[i] = float_to_bfloat16(source[i]);
      break;
    }
  }
}

}  // namespace skv::cpu::SKV_ISA_NS
