// CPU kernels of rms_norm, silu_mul and argmax: check, fill params, launch.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/row_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps,
                        const OptionalTensor& residual) {
  const OpCheck check{"rms_norm", x.device()};
  RmsNormParams params = rms_norm_params(check, x, weight, eps, residual, {at::kFloat});
  at::Tensor output = at::empty(x.sizes(), x.options().requires_grad(false));
  params.output = output.mutable_data_ptr();
  cpu::kernels().rms_norm(params, torch_parallel_for);
  return output;
}

at::Tensor silu_mul_cpu(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  SiluMulParams params = silu_mul_params(check, gate_up, {at::kFloat});
  at::Tensor output =
      empty_tensor({params.num_rows, params.num_features}, gate_up.scalar_type(), gate_up);
  params.output = output.mutable_data_ptr();
  cpu::kernels().silu_mul(params, torch_parallel_for);
  return output;
}

std::tuple<at::Tensor, at::Tensor> argmax_cpu(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  const auto [ids, values, params] = argmax_result(check, logits, {at::kFloat});
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
