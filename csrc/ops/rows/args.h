// The arguments of rms_norm, add_rms_norm and silu_mul: checks that hold on every device and for
// tracing, the outputs, and the parameters of the kernels.
#pragma once

#include <cstdint>

#include "csrc/kernels/token_params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/rows/folded_rows.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

struct RmsNormArgs {
  const at::Tensor& x;
  const at::Tensor& weight;
  double eps;
  const at::Tensor* residual = nullptr;  // of add_rms_norm, else null
};

inline void check_rms_norm(const OpCheck& check, const RmsNormArgs& args) {
  const at::Tensor& x = args.x;
  check("x", x).dtype(kFloatDtypes).last_dim_contiguous();
  check("weight", args.weight).dtype(kFloatDtypes).shape({{"E", x.sym_size(-1)}}).contiguous();
  check.float32("eps", args.eps);
  check_folds(check, "x", x);
  if (args.residual == nullptr) return;
  check("residual", *args.residual).dtype({x.scalar_type()}).contiguous();
  check.value("residual", args.residual->sym_sizes() == x.sym_sizes(),
              "the shape of x, " + describe(x), *args.residual);
}

// A fresh contiguous tensor, dtype and shape of x.
inline at::Tensor empty_rows(const at::Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options().requires_grad(false));
}

// sum: of add_rms_norm, else null.
inline RmsNormParams params_of(const RmsNormArgs& args, const at::Tensor& output,
                               const at::Tensor* sum = nullptr) {
  const at::Tensor& x = args.x;
  const auto rows = FoldedRows<int64_t>::of(x);
  return {
      .input = x.const_data_ptr(),
      .weight = args.weight.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .residual = args.residual == nullptr ? nullptr : args.residual->const_data_ptr(),
      .sum = sum == nullptr ? nullptr : sum->mutable_data_ptr(),
      .activation_dtype = dtype_of(x),
      .num_rows = rows.num_rows,
      .num_features = x.size(-1),
      .inner_rows = rows.inner_rows,
      .inner_stride = rows.inner_stride,
      .outer_stride = rows.outer_stride,
      .epsilon = static_cast<float>(args.eps),
      .weight_dtype = dtype_of(args.weight),
  };
}

inline void check_silu_mul(const OpCheck& check, const at::Tensor& gate_up) {
  check("gate_up", gate_up).dtype(kFloatDtypes).shape({{"N"}, {"2F"}}).last_dim_contiguous();
  check.value("gate_up", gate_up.sym_size(1) % 2 == 0, "an even last dimension 2F", gate_up);
}

inline at::Tensor empty_gated(const at::Tensor& gate_up) {
  return empty_tensor({gate_up.sym_size(0), gate_up.sym_size(1) / 2}, gate_up.scalar_type(),
                      gate_up);
}

inline SiluMulParams silu_mul_params(const at::Tensor& gate_up, const at::Tensor& output) {
  return {
      .gate_up = gate_up.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .activation_dtype = dtype_of(gate_up),
      .num_rows = gate_up.size(0),
      .num_features = gate_up.size(1) / 2,
      .input_row_stride = gate_up.stride(0),
  };
}

}  // namespace skv::ops
