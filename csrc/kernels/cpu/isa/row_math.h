// RMS norm and silu(gate) * up of one row: one definition for the ops of these names and for the
// linear layers that contain them, so that fused and separate give the same bits.
#pragma once

#include <cmath>
#include <cstring>

#include "csrc/kernels/cpu/isa/elements.h"
#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {

template <typename Load>
SKV_INLINE float sum_of_squares(const typename Load::Element* x, int64_t count) {
  // Four chains hide the latency of the addition.
  Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= count; i += 4 * Vec::kWidth) {
    for (int chain = 0; chain < 4; ++chain) {
      const Vec value = Load::load(x + i + chain * Vec::kWidth);
      sum[chain] = fma(value, value, sum[chain]);
    }
  }
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    const Vec value = Load::load(x + i);
    sum[0] = fma(value, value, sum[0]);
  }
  float tail = 0.0F;
  for (; i < count; ++i) {
    const float value = Load::load_one(x + i);
    tail += value * value;
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

SKV_INLINE void scale_run(const float* x, const float* weight, float factor, float* y,
                          int64_t count) {
  const Vec factors = Vec::set1(factor);
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    (Vec::load(x + i) * factors * Vec::load(weight + i)).store(y + i);
  }
  for (; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

// y = x * weight / sqrt(mean(x^2) + epsilon). The order of the sum depends on the length only.
inline void normalise_row(const Row& x, const Row& weight, float epsilon, const OutputRow& y,
                          int64_t count) {
  const float squares = x.dispatch([&]<typename Load>(const typename Load::Element* elements) {
    return sum_of_squares<Load>(elements, count);
  });
  const float mean = squares / static_cast<float>(count);
  const float factor = 1.0F / std::sqrt(mean + epsilon);
  float wide_x[kRunLength];
  float wide_weight[kRunLength];
  float wide_y[kRunLength];
  for_runs(count, [&](int64_t at, int64_t size) {
    float* results = y.place(at, wide_y);
    scale_run(x.from(at).floats(size, wide_x), weight.from(at).floats(size, wide_weight), factor,
              results, size);
    y.finish(results, at, size);
  });
}

SKV_INLINE Vec silu_mul_vector(Vec gate, Vec up) {
  // With e = e^-|x|: sigmoid(x) = (x < 0 ? e : 1) / (1 + e). The exponential cannot overflow. NaN
  // survives in the denominator.
  const Vec one = Vec::set1(1.0F);
  const Vec e = exp(min(gate, Vec::zero() - gate));
  const Vec numerator = select_less(gate, Vec::zero(), e, one);
  return gate * numerator / (one + e) * up;
}

SKV_INLINE void silu_mul_row(const float* gate, const float* up, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    silu_mul_vector(Vec::load(gate + i), Vec::load(up + i)).store(y + i);
  }
  if (i == count) return;
  // The tail goes through a padded vector: the same operations give the same bits.
  const auto tail_bytes = static_cast<size_t>(count - i) * sizeof(float);
  float padded_gate[Vec::kWidth] = {};
  float padded_up[Vec::kWidth] = {};
  std::memcpy(padded_gate, gate + i, tail_bytes);
  std::memcpy(padded_up, up + i, tail_bytes);
  silu_mul_vector(Vec::load(padded_gate), Vec::load(padded_up)).store(padded_gate);
  std::memcpy(y + i, padded_gate, tail_bytes);
}

}  // namespace skv::cpu::SKV_ISA_NS
