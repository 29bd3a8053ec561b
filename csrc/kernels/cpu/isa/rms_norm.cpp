// y = x * weight / sqrt(mean(x^2) + epsilon), row by row; with a residual the sum of both takes the
// place of x. The order of the sum depends on the row length only, so a row
// has the same bits in any batch.
#include <algorithm>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/row_math.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

// sum = residual + x, rounded once to their dtype.
void add(const Row& residual, const Row& x, const OutputRow& sum, int64_t count) {
  float wide_residual[kRunLength];
  float wide_x[kRunLength];
  float wide_sum[kRunLength];
  for_runs(count, [&](int64_t at, int64_t size) {
    const float* before = residual.from(at).floats(size, wide_residual);
    const float* values = x.from(at).floats(size, wide_x);
    float* total = sum.place(at, wide_sum);
    for (int64_t i = 0; i < size; ++i) total[i] = before[i] + values[i];
    sum.finish(total, at, size);
  });
}

}  // namespace

void rms_norm(const RmsNormParams& params, ParallelFor parallel_for) {
  const int64_t count = params.num_features;
  if (count == 0) return;
  const Row input{params.input, params.activation_dtype};
  const Row weight{params.weight, params.weight_dtype};
  const int64_t row_bytes = count * element_size(params.activation_dtype);
  auto normalise_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Row x = input.from(row / params.inner_rows * params.outer_stride +
                         row % params.inner_rows * params.inner_stride);
      if (params.residual != nullptr) {
        const Row residual{static_cast<const char*>(params.residual) + row * row_bytes,
                           params.activation_dtype};
        void* sum = static_cast<char*>(params.sum) + row * row_bytes;
        add(residual, x, {sum, params.activation_dtype}, count);
        x.data = sum;
      }
      const OutputRow output{static_cast<char*>(params.output) + row * row_bytes,
                             params.activation_dtype};
      normalise_row(x, weight, params.epsilon, output, count);
    }
  };
  parallel_for(params.num_rows, 1 + kElementsPerThread / count, normalise_rows);
}

}  // namespace skv::cpu::SKV_ISA_NS
