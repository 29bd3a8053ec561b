// CUDA kernels of rms_norm and silu_mul: check, launch.
//
// Not registered for CUDA: decoder_layers, linear_top_k and quantized_linear. Torch's dispatcher
// then names the op and the missing backend; a slow stand-in would hide that.
#include <torch/library.h>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/cuda_launch.h"
#include "csrc/bindings/ops/rows/args.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

at::Tensor rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps,
                         const OptionalTensor& residual) {
  const OpCheck check{"rms_norm", x.device()};
  const RmsNormCall call = rms_norm_call(check, x, weight, eps, residual, kPoolDtypes);
  launch(check.op(), cuda::rms_norm, call.params, x);
  return call.output;
}

at::Tensor silu_mul_cuda(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  const SiluMulCall call = silu_mul_call(check, gate_up, kPoolDtypes);
  launch(check.op(), cuda::silu_mul, call.params, gate_up);
  return call.output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_cuda));
  m.impl("silu_mul", TORCH_FN(silu_mul_cuda));
}

}  // namespace skv::bindings
