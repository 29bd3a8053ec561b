// CPU kernels of ngram_lookup and verify_draft: check, fill params, launch.
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/ngram_lookup.h"
#include "csrc/kernels/cpu/verify_draft.h"

namespace skv::bindings {

namespace {

template <typename Token>
void check_token_values(const OpCheck& check, const at::Tensor& tokens) {
  const Token* values = tokens.const_data_ptr<Token>();
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] <= std::numeric_limits<int32_t>::max(),
                      check.op(), ": tokens: expected token ids in [0, 2^31), got ", values[i],
                      " at index ", i);
  }
}

std::tuple<at::Tensor, at::Tensor> ngram_lookup_cpu(const at::Tensor& tokens,
                                                    const at::Tensor& offsets, int64_t min_n,
                                                    int64_t max_n, int64_t max_draft) {
  const OpCheck check{"ngram_lookup", tokens.device()};
  check("tokens", tokens).dtype(kIdDtypes).shape({{"T"}}).contiguous();
  const int64_t num_sequences = check_offsets_shape(check, "offsets", offsets);
  check.value("min_n", min_n >= 1, "a number >= 1", min_n);
  TORCH_CHECK_VALUE(max_n >= min_n, check.op(), ": max_n: expected a number >= min_n = ", min_n,
                    ", got ", max_n);
  check.value("max_draft", max_draft >= 0, "a number >= 0", max_draft);
  check_offset_values(check, "offsets", offsets, tokens.numel());
  const bool tokens_are_int64 = tokens.scalar_type() == at::kLong;
  if (tokens_are_int64) {
    check_token_values<int64_t>(check, tokens);
  } else {
    check_token_values<int32_t>(check, tokens);
  }

  at::Tensor draft_ids = empty_tensor({num_sequences, max_draft}, at::kInt, tokens);
  at::Tensor num_draft = empty_tensor({num_sequences}, at::kInt, tokens);
  const NgramLookupParams params{
      .tokens = tokens.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .draft_ids = draft_ids.mutable_data_ptr<int32_t>(),
      .num_draft = num_draft.mutable_data_ptr<int32_t>(),
      .tokens_are_int64 = tokens_are_int64,
      .num_sequences = num_sequences,
      .min_match = min_n,
      .max_match = max_n,
      .max_draft = max_draft,
  };
  cpu::ngram_lookup(params, torch_parallel_for);
  return {draft_ids, num_draft};
}

std::tuple<at::Tensor, at::Tensor> verify_draft_cpu(const at::Tensor& draft_ids,
                                                    const at::Tensor& target_ids,
                                                    const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  check("draft_ids", draft_ids).dtype(kIdDtypes).shape({{"sum k_s"}}).contiguous();
  const int64_t num_sequences = check_offsets_shape(check, "draft_offsets", draft_offsets);
  check("target_ids", target_ids)
      .dtype({draft_ids.scalar_type()})
      .shape({{"sum k_s + S", draft_ids.numel() + num_sequences}})
      .contiguous();
  check_offset_values(check, "draft_offsets", draft_offsets, draft_ids.numel());

  at::Tensor num_accepted = empty_tensor({num_sequences}, at::kInt, draft_ids);
  at::Tensor bonus_ids = empty_tensor({num_sequences}, draft_ids.scalar_type(), draft_ids);
  const VerifyDraftParams params{
      .draft_ids = draft_ids.const_data_ptr(),
      .target_ids = target_ids.const_data_ptr(),
      .draft_offsets = draft_offsets.const_data_ptr<int32_t>(),
      .num_accepted = num_accepted.mutable_data_ptr<int32_t>(),
      .bonus_ids = bonus_ids.mutable_data_ptr(),
      .ids_are_int64 = draft_ids.scalar_type() == at::kLong,
      .num_sequences = num_sequences,
  };
  cpu::verify_draft(params, torch_parallel_for);
  return {num_accepted, bonus_ids};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("ngram_lookup", TORCH_FN(ngram_lookup_cpu));
  m.impl("verify_draft", TORCH_FN(verify_draft_cpu));
}

}  // namespace skv::bindings
