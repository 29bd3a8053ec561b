// quantized_linear and linear_top_k of tensors without memory: what tracing checks, and the shapes
// of the outputs.
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/linear/args.h"

namespace skv::ops {

namespace {

at::Tensor quantized_linear_meta(const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& scales, const OptionalTensor& minimums,
                                 const OptionalTensor& bias, int64_t out_features,
                                 const OptionalTensor& residual, const OptionalTensor& norm_weight,
                                 double norm_eps, bool silu_mul) {
  const QuantizedLinearArgs args{x,        weight,      scales,   minimums, bias, out_features,
                                 residual, norm_weight, norm_eps, silu_mul};
  check_quantized_linear({"quantized_linear", x.device()}, args);
  return empty_linear_output(args);
}

std::tuple<at::Tensor, at::Tensor> linear_top_k_meta(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& scales,
    const OptionalTensor& minimums, const OptionalTensor& bias, int64_t out_features, int64_t k,
    const OptionalTensor& norm_weight, double norm_eps) {
  const OptionalTensor no_residual;
  const QuantizedLinearArgs args{x,           weight,      scales,   minimums, bias, out_features,
                                 no_residual, norm_weight, norm_eps, false};
  check_top_k({"linear_top_k", x.device()}, args, k);
  return empty_top_k(x, k);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("quantized_linear", TORCH_FN(quantized_linear_meta));
  m.impl("linear_top_k", TORCH_FN(linear_top_k_meta));
}

}  // namespace skv::ops
