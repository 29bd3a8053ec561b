// y = silu(gate) * up with silu(x) = x / (1 + e^-x), element by element, so a row has the same bits
// in any batch.
#include <cstring>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

// An element costs about eight times a copied one, because of the exponential.
constexpr int64_t kElementsPerThread = 1 << 12;

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

}  // namespace

void silu_mul(const SiluMulParams& params, ParallelFor parallel_for) {
  const int64_t count = params.num_features;
  if (count == 0) return;
  auto work_on_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = static_cast<const float*>(params.gate_up) + row * params.input_row_stride;
      silu_mul_row(gate, gate + count, static_cast<float*>(params.output) + row * count, count);
    }
  };
  parallel_for(params.num_rows, 1 + kElementsPerThread / count, work_on_rows);
}

}  // namespace skv::cpu::SKV_ISA_NS
