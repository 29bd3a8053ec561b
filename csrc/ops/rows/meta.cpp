// rms_norm, add_rms_norm and silu_mul of tensors without memory: what tracing checks, and the
// shapes of the outputs.
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/rows/args.h"

namespace skv::ops {

namespace {

at::Tensor rms_norm_meta(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_rms_norm({"rms_norm", x.device()}, {x, weight, eps});
  return empty_rows(x);
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm_meta(const at::Tensor& x,
                                                     const at::Tensor& residual,
                                                     const at::Tensor& weight, double eps) {
  check_rms_norm({"add_rms_norm", x.device()}, {x, weight, eps, &residual});
  return {empty_rows(x), empty_rows(x)};
}

at::Tensor silu_mul_meta(const at::Tensor& gate_up) {
  check_silu_mul({"silu_mul", gate_up.device()}, gate_up);
  return empty_gated(gate_up);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("rms_norm", TORCH_FN(rms_norm_meta));
  m.impl("add_rms_norm", TORCH_FN(add_rms_norm_meta));
  m.impl("silu_mul", TORCH_FN(silu_mul_meta));
}

}  // namespace skv::ops
