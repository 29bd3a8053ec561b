// CUDA kernels of argmax, sample and verify_draft: check, launch. Values inside tensors are not
// looked at, which would need a synchronisation: the kernel of sample clamps its settings, and
// token ids and offsets are trusted.
#include <torch/library.h>

#include "csrc/kernels/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/choose/args.h"
#include "csrc/ops/cuda_launch.h"

namespace skv::ops {

namespace {

TwoTensors argmax_cuda(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  check_argmax(check, logits);
  TwoTensors choices = empty_choices(logits);
  launch(check.op(), cuda::argmax, argmax_params(logits, choices), logits);
  return choices;
}

TwoTensors sample_cuda(const at::Tensor& logits, const at::Tensor& seeds,
                       const at::Tensor& positions, const at::Tensor& temperatures,
                       const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p) {
  const OpCheck check{"sample", logits.device()};
  const SampleArgs args{logits, seeds, positions, temperatures, top_k, top_p, min_p};
  check_sample(check, args);
  TwoTensors choices = empty_choices(logits);
  launch(check.op(), cuda::sample, params_of(args, choices), logits);
  return choices;
}

TwoTensors verify_draft_cuda(const at::Tensor& draft_ids, const at::Tensor& target_ids,
                             const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  const VerifyDraftArgs args{draft_ids, target_ids, draft_offsets};
  check_verify_draft(check, args);
  TwoTensors verdicts = empty_verdicts(args);
  launch(check.op(), cuda::verify_draft, params_of(args, verdicts), draft_ids);
  return verdicts;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("argmax", TORCH_FN(argmax_cuda));
  m.impl("sample", TORCH_FN(sample_cuda));
  m.impl("verify_draft", TORCH_FN(verify_draft_cuda));
}

}  // namespace skv::ops
