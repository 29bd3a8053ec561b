// CUDA kernels of argmax, sample and verify_draft: check, launch. Values inside tensors are not
// looked at, which would need a synchronisation: the kernel of sample clamps its settings, and
// token ids and offsets are trusted.
#include <torch/library.h>

#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/choose/args.h"
#include "csrc/bindings/ops/cuda_launch.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

std::tuple<at::Tensor, at::Tensor> argmax_cuda(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  const ArgmaxCall call = argmax_call(check, logits, kPoolDtypes);
  launch(check.op(), cuda::argmax, call.params, logits);
  return call.results();
}

std::tuple<at::Tensor, at::Tensor> sample_cuda(const at::Tensor& logits, const at::Tensor& seeds,
                                               const at::Tensor& positions,
                                               const at::Tensor& temperatures,
                                               const at::Tensor& top_k, const at::Tensor& top_p,
                                               const at::Tensor& min_p) {
  const OpCheck check{"sample", logits.device()};
  const SampleCall call =
      sample_call(check, {logits, seeds, positions, temperatures, top_k, top_p, min_p});
  launch(check.op(), cuda::sample, call.params, logits);
  return call.results();
}

std::tuple<at::Tensor, at::Tensor> verify_draft_cuda(const at::Tensor& draft_ids,
                                                     const at::Tensor& target_ids,
                                                     const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  const VerifyDraftCall call = verify_draft_call(check, draft_ids, target_ids, draft_offsets);
  launch(check.op(), cuda::verify_draft, call.params, draft_ids);
  return call.results();
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("argmax", TORCH_FN(argmax_cuda));
  m.impl("sample", TORCH_FN(sample_cuda));
  m.impl("verify_draft", TORCH_FN(verify_draft_cuda));
}

}  // namespace skv::bindings
