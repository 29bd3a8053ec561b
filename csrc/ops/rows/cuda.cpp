// CUDA kernels of rms_norm, add_rms_norm and silu_mul: check, launch.
//
// Not registered for CUDA: decoder_layers, linear_top_k and quantized_linear. Torch's dispatcher
// then names the op and the missing backend; a slow stand-in would hide that.
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "csrc/kernels/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/rows/args.h"

namespace skv::ops {

namespace {

at::Tensor rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const OpCheck check{"rms_norm", x.device()};
  const RmsNormArgs args{x, weight, eps};
  check_rms_norm(check, args);
  at::Tensor output = empty_rows(x);
  launch(check.op(), cuda::rms_norm, params_of(args, output), x);
  return output;
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm_cuda(const at::Tensor& x,
                                                     const at::Tensor& residual,
                                                     const at::Tensor& weight, double eps) {
  const OpCheck check{"add_rms_norm", x.device()};
  const RmsNormArgs args{x, weight, eps, &residual};
  check_rms_norm(check, args);
  at::Tensor output = empty_rows(x);
  at::Tensor sum = empty_rows(x);
  launch(check.op(), cuda::rms_norm, params_of(args, output, &sum), x);
  return {std::move(output), std::move(sum)};
}

at::Tensor silu_mul_cuda(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  check_silu_mul(check, gate_up);
  at::Tensor output = empty_gated(gate_up);
  launch(check.op(), cuda::silu_mul, silu_mul_params(gate_up, output), gate_up);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_cuda));
  m.impl("add_rms_norm", TORCH_FN(add_rms_norm_cuda));
  m.impl("silu_mul", TORCH_FN(silu_mul_cuda));
}

}  // namespace skv::ops
