// The arguments of rms_norm, silu_mul and argmax: checks that hold on every device, and the
// parameters of the kernels without their output.
#pragma once

#include <cstdint>
#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/row_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

// residual: dtype and shape of x, contiguous, memory of its own. It is written.
inline void check_residual(const OpCheck& check, const at::Tensor& residual, const at::Tensor& x,
                           const at::Tensor& weight) {
  check("residual", residual).dtype({x.scalar_type()}).contiguous();
  check.value("residual", residual.sizes() == x.sizes(), "the shape of x, " + describe(x),
              residual);
  check.own_memory("residual", residual, "x", x);
  check.own_memory("residual", residual, "weight", weight);
}

inline RmsNormParams rms_norm_params(const OpCheck& check, const at::Tensor& x,
                                     const at::Tensor& weight, double eps,
                                     const OptionalTensor& residual, DtypeList dtypes) {
  check("x", x).dtype(dtypes).last_dim_contiguous();
  check("weight", weight).dtype({at::kFloat}).shape({{"E", x.size(-1)}}).contiguous();
  check.float32("eps", eps);
  const FoldedRows rows = fold_rows(check, "x", x);
  if (residual.has_value()) check_residual(check, *residual, x, weight);
  return {
      .input = x.const_data_ptr(),
      .weight = weight.const_data_ptr<float>(),
      .output = nullptr,
      .residual = residual.has_value() ? residual->mutable_data_ptr() : nullptr,
      .activation_dtype = dtype_of(x),
      .num_rows = rows.num_rows,
      .num_features = x.size(-1),
      .inner_rows = rows.inner_rows,
      .inner_stride = rows.inner_stride,
      .outer_stride = rows.outer_stride,
      .epsilon = static_cast<float>(eps),
  };
}

inline SiluMulParams silu_mul_params(const OpCheck& check, const at::Tensor& gate_up,
                                     DtypeList dtypes) {
  check("gate_up", gate_up).dtype(dtypes).shape({{"N"}, {"2F"}}).last_dim_contiguous();
  check.value("gate_up", gate_up.size(1) % 2 == 0, "an even last dimension 2F", gate_up);
  return {
      .gate_up = gate_up.const_data_ptr(),
      .output = nullptr,
      .activation_dtype = dtype_of(gate_up),
      .num_rows = gate_up.size(0),
      .num_features = gate_up.size(1) / 2,
      .input_row_stride = gate_up.stride(0),
  };
}

struct ArgmaxResult {
  at::Tensor ids;
  at::Tensor values;
  ArgmaxParams params;
};

inline ArgmaxResult argmax_result(const OpCheck& check, const at::Tensor& logits,
                                  DtypeList dtypes) {
  check("logits", logits).dtype(dtypes).shape({{"R"}, {"V"}}).last_dim_contiguous();
  check.value("logits", logits.size(1) > 0, "V >= 1", logits);
  at::Tensor ids = empty_tensor({logits.size(0)}, at::kLong, logits);
  at::Tensor values = empty_tensor({logits.size(0)}, at::kFloat, logits);
  const ArgmaxParams params{
      .logits = logits.const_data_ptr(),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .values = values.mutable_data_ptr<float>(),
      .logits_dtype = dtype_of(logits),
      .num_rows = logits.size(0),
      .vocab_size = logits.size(1),
      .row_stride = logits.stride(0),
  };
  return {std::move(ids), std::move(values), params};
}

}  // namespace skv::bindings
