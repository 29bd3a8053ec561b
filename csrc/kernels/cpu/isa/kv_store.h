// Stores vectors of keys and values into a pool, in the pool's dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "csrc/kernels/cpu/isa/elements.h"
#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

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

// Where a vector of a pool is.
struct PoolVector {
  void* pool;
  DType dtype;
  int64_t at;        // its first element
  float* scales;     // of an int8 pool, else null
  int64_t scale_at;  // its scale
};

// A whole vector. In the dtype of the pool it is copied as it is, signalling NaN too.
SKV_INLINE void store_vector(const Row& source, int64_t count, const PoolVector& target) {
  const int64_t size = element_size(target.dtype);
  if (source.dtype == target.dtype) {
    std::memcpy(static_cast<char*>(target.pool) + target.at * size, source.data,
                static_cast<size_t>(count * size));
    return;
  }
  float wide[kRunLength];
  if (target.dtype != DType::kInt8) {
    for_runs(count, [&](int64_t at, int64_t run) {
      store_run(source.from(at).floats(run, wide), run, target.pool, target.dtype, target.at + at);
    });
    return;
  }
  auto* elements = static_cast<int8_t*>(target.pool) + target.at;
  QuantizedVector vector;
  for_runs(count, [&](int64_t at, int64_t run) {
    vector.look_at(source.from(at).floats(run, wide), run);
  });
  for_runs(count, [&](int64_t at, int64_t run) {
    vector.store(source.from(at).floats(run, wide), run, elements + at);
  });
  target.scales[target.scale_at] = vector.scale();
}

}  // namespace skv::cpu::SKV_ISA_NS
