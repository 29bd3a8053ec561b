// CUDA kernel of sample: check, fill params, launch. Values inside tensors are not looked at; the
// kernel clamps them.
#include <torch/library.h>

#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/sample_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

std::tuple<at::Tensor, at::Tensor> sample_cuda(const at::Tensor& logits, const at::Tensor& seeds,
                                               const at::Tensor& positions,
                                               const at::Tensor& temperatures,
                                               const at::Tensor& top_k, const at::Tensor& top_p,
                                               const at::Tensor& min_p) {
  const OpCheck check{"sample", logits.device()};
  SampleParams params =
      sample_params(check, {logits, seeds, positions, temperatures, top_k, top_p, min_p});
  at::Tensor ids = empty_tensor({params.num_rows}, at::kLong, logits);
  at::Tensor values = empty_tensor({params.num_rows}, at::kFloat, logits);
  params.ids = ids.mutable_data_ptr<int64_t>();
  params.values = values.mutable_data_ptr<float>();
  launch(check.op(), cuda::sample, params, logits);
  return {ids, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) { m.impl("sample", TORCH_FN(sample_cuda)); }

}  // namespace skv::bindings
