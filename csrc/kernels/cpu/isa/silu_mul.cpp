// y = silu(gate) * up with silu(x) = x / (1 + e^-x), element by element, so a row has the same bits
// in any batch.
#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/row_math.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

// An element costs about eight times a copied one, because of the exponential.
constexpr int64_t kElementsPerThread = 1 << 12;

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
