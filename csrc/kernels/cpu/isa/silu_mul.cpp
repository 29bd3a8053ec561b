// y = silu(gate) * up with silu(x) = x / (1 + e^-x), element by element, so a row has the same bits
// in any batch.
#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/row_math.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

// An element costs about eight times a copied one, because of the exponential.
constexpr int64_t kElementsPerThread = 1 << 12;

void gate_row(const Row& gate_up, const OutputRow& output, int64_t count) {
  float wide_gate[kRunLength];
  float wide_up[kRunLength];
  float wide_output[kRunLength];
  for_runs(count, [&](int64_t at, int64_t size) {
    const float* gate = gate_up.from(at).floats(size, wide_gate);
    const float* up = gate_up.from(count + at).floats(size, wide_up);
    float* results = output.place(at, wide_output);
    silu_mul_row(gate, up, results, size);
    output.finish(results, at, size);
  });
}

}  // namespace

void silu_mul(const SiluMulParams& params, ParallelFor parallel_for) {
  const int64_t count = params.num_features;
  if (count == 0) return;
  const Row gate_up{params.gate_up, params.activation_dtype};
  const int64_t size = element_size(params.activation_dtype);
  auto work_on_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const OutputRow output{static_cast<char*>(params.output) + row * count * size,
                             params.activation_dtype};
      gate_row(gate_up.from(row * params.input_row_stride), output, count);
    }
  };
  parallel_for(params.num_rows, 1 + kElementsPerThread / count, work_on_rows);
}

}  // namespace skv::cpu::SKV_ISA_NS
