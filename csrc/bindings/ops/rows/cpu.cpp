// CPU kernels of rms_norm and silu_mul: check, launch.
#include <torch/library.h>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/rows/args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

at::Tensor rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps,
                        const OptionalTensor& residual) {
  const OpCheck check{"rms_norm", x.device()};
  const RmsNormCall call = rms_norm_call(check, x, weight, eps, residual, kPoolDtypes);
  cpu::kernels().rms_norm(call.params, torch_parallel_for);
  return call.output;
}

at::Tensor silu_mul_cpu(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  const SiluMulCall call = silu_mul_call(check, gate_up, kPoolDtypes);
  cpu::kernels().silu_mul(call.params, torch_parallel_for);
  return call.output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_cpu));
  m.impl("silu_mul", TORCH_FN(silu_mul_cpu));
}

}  // namespace skv::bindings
