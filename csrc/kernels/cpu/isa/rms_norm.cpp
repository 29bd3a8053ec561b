// y = x * weight / sqrt(mean(x^2) + epsilon), row by row. The order of the sum depends on the row
// length only, so a row has the same bits in any batch.
#include <algorithm>
#include <cmath>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

SKV_INLINE float sum_of_squares(const float* x, int64_t count) {
  // Four chains hide the latency of the addition.
  Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= count; i += 4 * Vec::kWidth) {
    for (int chain = 0; chain < 4; ++chain) {
      const Vec value = Vec::load(x + i + chain * Vec::kWidth);
      sum[chain] = fma(value, value, sum[chain]);
    }
  }
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    const Vec value = Vec::load(x + i);
    sum[0] = fma(value, value, sum[0]);
  }
  float tail = 0.0F;
  for (; i < count; ++i) tail += x[i] * x[i];
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

SKV_INLINE void normalise(const float* x, const float* weight, float factor, float* y,
                          int64_t count) {
  const Vec factors = Vec::set1(factor);
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    (Vec::load(x + i) * factors * Vec::load(weight + i)).store(y + i);
  }
  for (; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

}  // namespace

void rms_norm(const RmsNormParams& params, ParallelFor parallel_for) {
  const int64_t count = params.num_features;
  if (count == 0) return;
  auto normalise_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = static_cast<const float*>(params.input) +
                       row / params.inner_rows * params.outer_stride +
                       row % params.inner_rows * params.inner_stride;
      const float mean = sum_of_squares(x, count) / static_cast<float>(count);
      const float factor = 1.0F / std::sqrt(mean + params.epsilon);
      normalise(x, params.weight, factor, static_cast<float*>(params.output) + row * count, count);
    }
  };
  parallel_for(params.num_rows, 1 + kElementsPerThread / count, normalise_rows);
}

}  // namespace skv::cpu::SKV_ISA_NS
