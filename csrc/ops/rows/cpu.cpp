// CPU kernels of rms_norm, add_rms_norm and silu_mul: check, launch.
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/rows/args.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

namespace {

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const OpCheck check{"rms_norm", x.device()};
  const RmsNormArgs args{x, weight, eps};
  check_rms_norm(check, args);
  at::Tensor output = empty_rows(x);
  cpu::kernels().rms_norm(params_of(args, output), torch_parallel_for);
  return output;
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                    const at::Tensor& weight, double eps) {
  const OpCheck check{"add_rms_norm", x.device()};
  const RmsNormArgs args{x, weight, eps, &residual};
  check_rms_norm(check, args);
  at::Tensor output = empty_rows(x);
  at::Tensor sum = empty_rows(x);
  cpu::kernels().rms_norm(params_of(args, output, &sum), torch_parallel_for);
  return {std::move(output), std::move(sum)};
}

at::Tensor silu_mul_cpu(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  check_silu_mul(check, gate_up);
  at::Tensor output = empty_gated(gate_up);
  cpu::kernels().silu_mul(silu_mul_params(gate_up, output), torch_parallel_for);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_cpu));
  m.impl("add_rms_norm", TORCH_FN(add_rms_norm_cpu));
  m.impl("silu_mul", TORCH_FN(silu_mul_cpu));
}

}  // namespace skv::ops
