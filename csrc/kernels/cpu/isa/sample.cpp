// The parts of `sample` that go over whole rows: widening, maxima of blocks, weights. What they
// give does not depend on the instruction set: no sum of floats, no fused multiply-add.
#include <cmath>
#include <cstring>
#include <limits>

#include "csrc/kernels/cpu/isa/elements.h"
#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/sample_rule.h"

namespace skv::cpu::SKV_ISA_NS {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The maximum of at most kSampleBlock floats; `bad` becomes positive if one is NaN or +infinity.
SKV_INLINE float block_maximum(const float* row, int64_t count, Vec& bad) {
  const Vec infinity = Vec::set1(kInfinity);
  Vec top = Vec::set1(-kInfinity);
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    const Vec x = Vec::load(row + i);
    top = max(x, top);  // max gives the second operand if one is NaN
    bad = max(bad, select_less(x, infinity, Vec::zero(), Vec::set1(1.0F)));
  }
  float largest = reduce_max(top);
  for (; i < count; ++i) {
    if (!(row[i] < kInfinity)) bad = Vec::set1(1.0F);
    largest = row[i] > largest ? row[i] : largest;
  }
  return largest;
}

}  // namespace

void widen(const uint16_t* values, DType dtype, int64_t count, float* wide) {
  Row{values, dtype}.copy_to(wide, count);
}

float block_maxima(const float* row, int64_t count, float* maxima) {
  Vec bad = Vec::zero();
  float largest = -kInfinity;
  for (int64_t begin = 0; begin < count; begin += kSampleBlock) {
    const int64_t rest = count - begin;
    const int64_t size = rest < kSampleBlock ? rest : kSampleBlock;
    const float top = block_maximum(row + begin, size, bad);
    maxima[begin / kSampleBlock] = top;
    largest = top > largest ? top : largest;
  }
  if (reduce_max(bad) > 0.0F) {
    for (int64_t i = 0; i < count; ++i) {
      if (std::isnan(row[i])) return row[i];
    }
  }
  return largest;
}

void sample_weights(const float* logits, int64_t count, float top, float inverse_temperature,
                    float* weights) {
  const Vec tops = Vec::set1(top);
  const Vec inverse = Vec::set1(inverse_temperature);
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    sample_weight(Vec::load(logits + i), tops, inverse).store(weights + i);
  }
  if (i == count) return;
  float padded[Vec::kWidth] = {};
  const auto tail_bytes = static_cast<size_t>(count - i) * sizeof(float);
  std::memcpy(padded, logits + i, tail_bytes);
  sample_weight(Vec::load(padded), tops, inverse).store(padded);
  std::memcpy(weights + i, padded, tail_bytes);
}

}  // namespace skv::cpu::SKV_ISA_NS
