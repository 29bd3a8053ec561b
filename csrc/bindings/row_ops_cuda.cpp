// CUDA kernels of rms_norm, silu_mul and argmax: check, fill params, launch.
//
// Not registered for CUDA: decoder_layers, linear_top_k and quantized_linear. Torch's dispatcher
// then names the op and the missing backend; a slow stand-in would hide that.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/row_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

at::Tensor rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps,
                         const OptionalTensor& residual) {
  const OpCheck check{"rms_norm", x.device()};
  RmsNormParams params = rms_norm_params(check, x, weight, eps, residual, kPoolDtypes);
  at::Tensor output = at::empty(x.sizes(), x.options().requires_grad(false));
  params.output = output.mutable_data_ptr();
  launch(check.op(), cuda::rms_norm, params, x);
  return output;
}

at::Tensor silu_mul_cuda(const at::Tensor& gate_up) {
  const OpCheck check{"silu_mul", gate_up.device()};
  SiluMulParams params = silu_mul_params(check, gate_up, kPoolDtypes);
  at::Tensor output =
      empty_tensor({params.num_rows, params.num_features}, gate_up.scalar_type(), gate_up);
  params.output = output.mutable_data_ptr();
  launch(check.op(), cuda::silu_mul, params, gate_up);
  return output;
}

std::tuple<at::Tensor, at::Tensor> argmax_cuda(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  const auto [ids, values, params] = argmax_result(check, logits, kPoolDtypes);
  launch(check.op(), cuda::argmax, params, logits);
  return {ids, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_cuda));
  m.impl("silu_mul", TORCH_FN(silu_mul_cuda));
  m.impl("argmax", TORCH_FN(argmax_cuda));
}

}  // namespace skv::bindings
