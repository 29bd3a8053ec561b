// The arguments of rms_norm and silu_mul: checks that hold on every device, and the parameters of
// the kernels without their output.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/row_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

inline RmsNormParams rms_norm_params(const OpCheck& check, const at::Tensor& x,
                                     const at::Tensor& weight, double eps, DtypeList dtypes) {
  check("x", x).dtype(dtypes).last_dim_contiguous();
  check("weight", weight).dtype({at::kFloat}).shape({{"E", x.size(-1)}}).contiguous();
  check.value("eps", eps >= 0 && std::isfinite(eps), "a finite number >= 0", eps);
  const FoldedRows rows = fold_rows(check, "x", x);
  return {
      .input = x.const_data_ptr(),
      .weight = weight.const_data_ptr<float>(),
      .output = nullptr,
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

}  // namespace skv::bindings
