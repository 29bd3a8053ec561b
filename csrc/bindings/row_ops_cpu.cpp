// CPU kernels of rms_norm, silu_mul and argmax: check, fill params, launch.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/row_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const OpCheck check{"rms_norm", x.device()};
  check("x", x).dtype({at::kFloat}).last_dim_contiguous();
  check("weight", weight).dtype({at::kFloat}).shape({{"E", x.size(-1)}}).contiguous();
  check.value("eps", eps >= 0 && std::isfinite(eps), "a finite number >= 0", eps);
  const FoldedRows rows = fold_rows(check, "x", x);

  at::Tensor output = at::empty(x.sizes(), x.options().requires_grad(false));
  const RmsNormParams params{
      .input = x.const_data_ptr(),
      .weight = weight.const_data_ptr<float>(),
      .output = output.mutable_data_ptr(),
      .activation_dtype = dtype_of(x),
      .num_rows = rows.num_rows,
      .num_features = x.size(-1),
      .inner_rows = rows.inner_rows,
      .inner_stride = rows.inner_stride,
      .outer_stride = rows.outer_stride,
      .epsilon = static_cast<float>(eps),
  };
  cpu::kernels().rms_norm(params, torch_parallel_for);
  return output;
}

at::Tensor silu_mul_cpu(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  check("gate_up", gate_up).dtype({at::kFloat}).shape({{"N"}, {"2F"}}).last_dim_contiguous();
  check.value("gate_up", gate_up.size(1) % 2 == 0, "an even last dimension 2F", gate_up);
  const int64_t num_features = gate_up.size(1) / 2;

  at::Tensor output = empty_tensor({gate_up.size(0), num_features}, at::kFloat, gate_up);
  const SiluMulParams params{
      .gate_up = gate_up.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .activation_dtype = dtype_of(gate_up),
      .num_rows = gate_up.size(0),
      .num_features = num_features,
      .input_row_stride = gate_up.stride(0),
  };
  cpu::kernels().silu_mul(params, torch_parallel_for);
  return output;
}

std::tuple<at::Tensor, at::Tensor> argmax_cpu(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  check("logits", logits).dtype({at::kFloat}).shape({{"R"}, {"V"}}).last_dim_contiguous();
  check.value("logits", logits.size(1) > 0, "V >= 1", logits);

  at::Tensor ids = empty_tensor({logits.size(0)}, at::kLong, logits);
  at::Tensor values = empty_tensor({logits.size(0)}, at::kFloat, logits);
  const ArgmaxParams params{
      .logits = logits.const_data_ptr<float>(),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .values = values.mutable_data_ptr<float>(),
      .num_rows = logits.size(0),
      .vocab_size = logits.size(1),
      .row_stride = logits.stride(0),
  };
  cpu::kernels().argmax(params, torch_parallel_for);
  return {ids, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_cpu));
  m.impl("silu_mul", TORCH_FN(silu_mul_cpu));
  m.impl("argmax", TORCH_FN(argmax_cpu));
}

}  // namespace skv::bindings
