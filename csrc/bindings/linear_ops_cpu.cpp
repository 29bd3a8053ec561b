// CPU kernel of quantized_linear: check, fill params, launch.
#include <torch/library.h>

#include "csrc/bindings/linear_args.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

at::Tensor quantized_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                const OptionalTensor& scales, const OptionalTensor& minimums,
                                const OptionalTensor& bias, int64_t out_features,
                                const OptionalTensor& residual, const OptionalTensor& norm_weight,
                                double norm_eps, bool silu_mul) {
  const QuantizedLinearArgs args{x,        weight,      scales,   minimums, bias, out_features,
                                 residual, norm_weight, norm_eps, silu_mul};
  check_quantized_linear(OpCheck{"quantized_linear", x.device()}, args);
  QuantizedLinearMemory memory;
  memory.sums = empty_tensor({x.size(0), out_features}, at::kFloat, x);
  if (norm_weight) memory.normalised = empty_tensor({x.size(0), x.size(1)}, at::kFloat, x);
  if (silu_mul) memory.activated = empty_tensor({x.size(0), out_features / 2}, at::kFloat, x);
  cpu::kernels().quantized_linear(params_of(args, memory), torch_parallel_for);
  return silu_mul ? memory.activated : memory.sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("quantized_linear", TORCH_FN(quantized_linear_cpu));
}

}  // namespace skv::bindings
