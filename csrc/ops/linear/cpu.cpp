// CPU kernels of quantized_linear and linear_top_k: check, fill params, launch.
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/ops/linear/args.h"

namespace skv::ops {

namespace {

// Scratch for the input where it is normalised or widened, else undefined.
at::Tensor float_input_of(const QuantizedLinearArgs& args) {
  if (!args.norm_weight && args.x.scalar_type() == at::kFloat) return {};
  return empty_tensor({args.x.size(0), args.x.size(1)}, at::kFloat, args.x);
}

at::Tensor quantized_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                const OptionalTensor& scales, const OptionalTensor& minimums,
                                const OptionalTensor& bias, int64_t out_features,
                                const OptionalTensor& residual, const OptionalTensor& norm_weight,
                                double norm_eps, bool silu_mul) {
  const QuantizedLinearArgs args{x,        weight,      scales,   minimums, bias, out_features,
                                 residual, norm_weight, norm_eps, silu_mul};
  check_quantized_linear(OpCheck{"quantized_linear", x.device()}, args);
  at::Tensor output = empty_linear_output(args);
  QuantizedLinearMemory memory;
  memory.float_input = float_input_of(args);
  if (silu_mul) {
    memory.activated = output;
  } else if (x.scalar_type() != at::kFloat) {
    memory.rounded = output;
  } else {
    memory.sums = output;
  }
  if (!memory.sums.defined()) memory.sums = empty_tensor({x.size(0), out_features}, at::kFloat, x);
  cpu::kernels().quantized_linear(params_of(args, memory), torch_parallel_for);
  return output;
}

std::tuple<at::Tensor, at::Tensor> linear_top_k_cpu(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& scales,
    const OptionalTensor& minimums, const OptionalTensor& bias, int64_t out_features, int64_t k,
    const OptionalTensor& norm_weight, double norm_eps) {
  const OptionalTensor no_residual;
  const QuantizedLinearArgs args{x,           weight,      scales,   minimums, bias, out_features,
                                 no_residual, norm_weight, norm_eps, false};
  const OpCheck check{"linear_top_k", x.device()};
  check_top_k(check, args, k);

  QuantizedLinearMemory memory;
  memory.float_input = float_input_of(args);
  const int64_t num_lists = kTopKParts * std::min(kTopKBlockRows, x.size(0));
  const at::Tensor part_values = empty_tensor({num_lists, k}, at::kFloat, x);
  const at::Tensor part_ids = empty_tensor({num_lists, k}, at::kLong, x);
  const at::Tensor part_counts = empty_tensor({num_lists}, at::kLong, x);
  auto [ids, values] = empty_top_k(x, k);
  const LinearTopKParams params{
      .linear = params_of(args, memory),
      .k = k,
      .ids = ids.mutable_data_ptr<int64_t>(),
      .values = values.mutable_data_ptr<float>(),
      .part_values = part_values.mutable_data_ptr<float>(),
      .part_ids = part_ids.mutable_data_ptr<int64_t>(),
      .part_counts = part_counts.mutable_data_ptr<int64_t>(),
  };
  cpu::kernels().linear_top_k(params, torch_parallel_for);
  return {ids, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("quantized_linear", TORCH_FN(quantized_linear_cpu));
  m.impl("linear_top_k", TORCH_FN(linear_top_k_cpu));
}

}  // namespace skv::ops
