// y = x * weight / sqrt(mean(x^2) + epsilon), row by row; with a residual that is added to first
// and normalised in the place of x. The order of the sum depends on the row length only, so a row
// has the same bits in any batch.
#include <algorithm>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/row_math.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

SKV_INLINE void add(const float* residual, const float* x, float* sum, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    (Vec::load(residual + i) + Vec::load(x + i)).store(sum + i);
  }
  for (; i < count; ++i) sum[i] = residual[i] + x[i];
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
      if (params.residual != nullptr) {
        float* sum = static_cast<float*>(params.sum) + row * count;
        add(static_cast<const float*>(params.residual) + row * count, x, sum, count);
        x = sum;
      }
      normalise_row(x, params.weight, params.epsilon,
                    static_cast<float*>(params.output) + row * count, count);
    }
  };
  parallel_for(params.num_rows, 1 + kElementsPerThread / count, normalise_rows);
}

}  // namespace skv::cpu::SKV_ISA_NS
