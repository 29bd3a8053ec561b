// CUDA kernels of ngram_lookup and verify_draft: check, launch. Token ids, offsets and lengths are
// trusted: looking at them would need a synchronisation.
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/token_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

std::tuple<at::Tensor, at::Tensor> ngram_lookup_cuda(const at::Tensor& tokens,
                                                     const at::Tensor& offsets, int64_t min_n,
                                                     int64_t max_n, int64_t max_draft,
                                                     const OptionalTensor& lengths) {
  const OpCheck check{"ngram_lookup", tokens.device()};
  NgramLookupParams params =
      ngram_lookup_params(check, tokens, offsets, min_n, max_n, max_draft, lengths);
  at::Tensor draft_ids = empty_tensor({params.num_sequences, max_draft}, at::kInt, tokens);
  at::Tensor num_draft = empty_tensor({params.num_sequences}, at::kInt, tokens);
  params.draft_ids = draft_ids.mutable_data_ptr<int32_t>();
  params.num_draft = num_draft.mutable_data_ptr<int32_t>();
  launch(check.op(), cuda::ngram_lookup, params, tokens);
  return {draft_ids, num_draft};
}

std::tuple<at::Tensor, at::Tensor> verify_draft_cuda(const at::Tensor& draft_ids,
                                                     const at::Tensor& target_ids,
                                                     const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  VerifyDraftParams params = verify_draft_params(check, draft_ids, target_ids, draft_offsets);
  at::Tensor num_accepted = empty_tensor({params.num_sequences}, at::kInt, draft_ids);
  at::Tensor bonus_ids = empty_tensor({params.num_sequences}, draft_ids.scalar_type(), draft_ids);
  params.num_accepted = num_accepted.mutable_data_ptr<int32_t>();
  params.bonus_ids = bonus_ids.mutable_data_ptr();
  launch(check.op(), cuda::verify_draft, params, draft_ids);
  return {num_accepted, bonus_ids};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("ngram_lookup", TORCH_FN(ngram_lookup_cuda));
  m.impl("verify_draft", TORCH_FN(verify_draft_cuda));
}

}  // namespace skv::bindings
