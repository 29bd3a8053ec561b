// Stores runs of floats into a pool in the pool's dtype (round to nearest even), and vectors into
// an int8 pool.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

SKV_INLINE int64_t element_size(DType dtype) {
  if (dtype == DType::kInt8) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}

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
    case DType::kInt8:  // a vector has a scale: QuantizedVector
      break;
  }
}

// A vector of an int8 pool: scale = max |x| / 127 and round(x / scale), in two passes over runs of
// the vector. A vector of zeros (or whose scale would be 0) has scale 0; one with an infinity or
// a NaN has scale NaN, so whoever reads it gets NaN.
class QuantizedVector {
 public:
  void look_at(const float* source, int64_t count) {
    Vec largest = Vec::zero();
    Vec poison = Vec::zero();  // x * 0 is 0 for every number
    int64_t i = 0;
    for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
      const Vec x = Vec::load(source + i);
      largest = max(max(x, Vec::zero() - x), largest);
      poison = poison + x * Vec::zero();
    }
    largest_ = std::max(largest_, reduce_max(largest));
    poison_ += reduce_add(poison);
    for (; i < count; ++i) {
      largest_ = std::max(largest_, std::fabs(source[i]));
      poison_ += source[i] * 0.0F;
    }
  }

  float scale() const {
    return poison_ == 0.0F ? largest_ / 127.0F : std::numeric_limits<float>::quiet_NaN();
  }

  void store(const float* source, int64_t count, int8_t* target) const {
    const float divisor = scale();
    if (!(divisor > 0.0F)) {
      std::memset(target, 0, static_cast<size_t>(count));
      return;
    }
    // A subnormal scale is coarse: without the bound its quotients could leave the range.
    const Vec bound = Vec::set1(127.0F);
    int64_t i = 0;
    for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
      const Vec x = round_to_int(Vec::load(source + i) / Vec::set1(divisor));
      max(min(x, bound), Vec::zero() - bound).store_int8(target + i);
    }
    for (; i < count; ++i) {
      const float x = std::nearbyintf(source[i] / divisor);
      target[i] = static_cast<int8_t>(std::max(std::min(x, 127.0F), -127.0F));
    }
  }

 private:
  float largest_ = 0.0F;
  float poison_ = 0.0F;
};

// A whole vector with its scale.
SKV_INLINE void store_quantized(const float* source, int64_t count, int8_t* target, float* scale) {
  QuantizedVector vector;
  vector.look_at(source, count);
  vector.store(source, count, target);
  *scale = vector.scale();
}

}  // namespace skv::cpu::SKV_ISA_NS
