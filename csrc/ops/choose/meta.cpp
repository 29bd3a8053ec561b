// argmax, sample and verify_draft of tensors without memory: what tracing checks, and the shapes of
// the outputs.
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/choose/args.h"

namespace skv::ops {

namespace {

TwoTensors argmax_meta(const at::Tensor& logits) {
  check_argmax({"argmax", logits.device()}, logits);
  return empty_choices(logits);
}

TwoTensors sample_meta(const at::Tensor& logits, const at::Tensor& seeds,
                       const at::Tensor& positions, const at::Tensor& temperatures,
                       const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p) {
  check_sample({"sample", logits.device()},
               {logits, seeds, positions, temperatures, top_k, top_p, min_p});
  return empty_choices(logits);
}

TwoTensors verify_draft_meta(const at::Tensor& draft_ids, const at::Tensor& target_ids,
                             const at::Tensor& draft_offsets) {
  const VerifyDraftArgs args{draft_ids, target_ids, draft_offsets};
  check_verify_draft({"verify_draft", draft_ids.device()}, args);
  return empty_verdicts(args);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("argmax", TORCH_FN(argmax_meta));
  m.impl("sample", TORCH_FN(sample_meta));
  m.impl("verify_draft", TORCH_FN(verify_draft_meta));
}

}  // namespace skv::ops
