// The arguments of rms_norm and silu_mul: checks that hold on every device, the outputs, and the
// parameters of the kernels.
#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>
#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/rows/folded_rows.h"
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

// Without the output.
inline RmsNormParams rms_norm_params(const OpCheck& check, const at::Tensor& x,
                                     const at::Tensor& weight, double eps,
                                     const OptionalTensor& residual, DtypeList dtypes) {
  check("x", x).dtype(dtypes).last_dim_contiguous();
  check("weight", weight).dtype(kPoolDtypes).shape({{"E", x.size(-1)}}).contiguous();
  check.float32("eps", eps);
  const FoldedRows rows = fold_rows(check, "x", x);
  if (residual.has_value()) check_residual(check, *residual, x, weight);
  return {
      .input = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .output = nullptr,
      .residual = residual.has_value() ? residual->mutable_data_ptr() : nullptr,
      .activation_dtype = dtype_of(x),
      .num_rows = rows.num_rows,
      .num_features = x.size(-1),
      .inner_rows = rows.inner_rows,
      .inner_stride = rows.inner_stride,
      .outer_stride = rows.outer_stride,
      .epsilon = static_cast<float>(eps),
      .weight_dtype = dtype_of(weight),
  };
}

struct RmsNormCall {
  at::Tensor output;
  RmsNormParams params;
};

inline RmsNormCall rms_norm_call(const OpCheck& check, const at::Tensor& x,
                                 const at::Tensor& weight, double eps,
                                 const OptionalTensor& residual, DtypeList dtypes) {
  RmsNormParams params = rms_norm_params(check, x, weight, eps, residual, dtypes);
  at::Tensor output = at::empty(x.sizes(), x.options().requires_grad(false));
  params.output = output.mutable_data_ptr();
  return {std::move(output), params};
}

struct SiluMulCall {
  at::Tensor output;
  SiluMulParams params;
};

inline SiluMulCall silu_mul_call(const OpCheck& check, const at::Tensor& gate_up,
                                 DtypeList dtypes) {
  check("gate_up", gate_up).dtype(dtypes).shape({{"N"}, {"2F"}}).last_dim_contiguous();
  check.value("gate_up", gate_up.size(1) % 2 == 0, "an even last dimension 2F", gate_up);
  const int64_t num_rows = gate_up.size(0);
  const int64_t num_features = gate_up.size(1) / 2;
  at::Tensor output = empty_tensor({num_rows, num_features}, gate_up.scalar_type(), gate_up);
  const SiluMulParams params{
      .gate_up = gate_up.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .activation_dtype = dtype_of(gate_up),
      .num_rows = num_rows,
      .num_features = num_features,
      .input_row_stride = gate_up.stride(0),
  };
  return {std::move(output), params};
}

}  // namespace skv::bindings
