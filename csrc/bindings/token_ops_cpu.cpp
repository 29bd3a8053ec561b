// CPU kernels of ngram_lookup and verify_draft: check values, launch.
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/token_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/ngram_lookup.h"
#include "csrc/kernels/cpu/verify_draft.h"

namespace skv::bindings {

namespace {

void check_lengths(const OpCheck& check, const NgramLookupParams& params) {
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    const int64_t room = params.offsets[s + 1] - params.offsets[s];
    TORCH_CHECK_VALUE(params.lengths[s] >= 0 && params.lengths[s] <= room, check.op(),
                      ": lengths: expected lengths in [0, offsets[s + 1] - offsets[s] = ", room,
                      "], got ", params.lengths[s], " at index ", s);
  }
}

// Only the tokens that are part of a text: what lies behind it may be anything.
template <typename Token>
void check_token_values(const OpCheck& check, const NgramLookupParams& params) {
  const Token* values = static_cast<const Token*>(params.tokens);
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    const int64_t begin = params.offsets[s];
    const int64_t end =
        params.lengths != nullptr ? begin + params.lengths[s] : params.offsets[s + 1];
    for (int64_t i = begin; i < end; ++i) {
      TORCH_CHECK_VALUE(values[i] >= 0 && values[i] <= std::numeric_limits<int32_t>::max(),
                        check.op(), ": tokens: expected token ids in [0, 2^31), got ", values[i],
                        " at index ", i);
    }
  }
}

std::tuple<at::Tensor, at::Tensor> ngram_lookup_cpu(const at::Tensor& tokens,
                                                    const at::Tensor& offsets, int64_t min_n,
                                                    int64_t max_n, int64_t max_draft,
                                                    const OptionalTensor& lengths) {
  const OpCheck check{"ngram_lookup", tokens.device()};
  NgramLookupParams params =
      ngram_lookup_params(check, tokens, offsets, min_n, max_n, max_draft, lengths);
  check_offset_values(check, "offsets", offsets, tokens.numel());
  if (params.lengths != nullptr) check_lengths(check, params);
  if (params.tokens_are_int64) {
    check_token_values<int64_t>(check, params);
  } else {
    check_token_values<int32_t>(check, params);
  }
  at::Tensor draft_ids = empty_tensor({params.num_sequences, max_draft}, at::kInt, tokens);
  at::Tensor num_draft = empty_tensor({params.num_sequences}, at::kInt, tokens);
  params.draft_ids = draft_ids.mutable_data_ptr<int32_t>();
  params.num_draft = num_draft.mutable_data_ptr<int32_t>();
  cpu::ngram_lookup(params, torch_parallel_for);
  return {draft_ids, num_draft};
}

std::tuple<at::Tensor, at::Tensor> verify_draft_cpu(const at::Tensor& draft_ids,
                                                    const at::Tensor& target_ids,
                                                    const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  VerifyDraftParams params = verify_draft_params(check, draft_ids, target_ids, draft_offsets);
  check_offset_values(check, "draft_offsets", draft_offsets, draft_ids.numel());
  at::Tensor num_accepted = empty_tensor({params.num_sequences}, at::kInt, draft_ids);
  at::Tensor bonus_ids = empty_tensor({params.num_sequences}, draft_ids.scalar_type(), draft_ids);
  params.num_accepted = num_accepted.mutable_data_ptr<int32_t>();
  params.bonus_ids = bonus_ids.mutable_data_ptr();
  cpu::verify_draft(params, torch_parallel_for);
  return {num_accepted, bonus_ids};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("ngram_lookup", TORCH_FN(ngram_lookup_cpu));
  m.impl("verify_draft", TORCH_FN(verify_draft_cpu));
}

}  // namespace skv::bindings
