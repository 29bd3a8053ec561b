// The arguments of ngram_lookup and verify_draft: checks that hold on every device, and the
// parameters of the kernels without their outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

inline NgramLookupParams ngram_lookup_params(const OpCheck& check, const at::Tensor& tokens,
                                             const at::Tensor& offsets, int64_t min_n,
                                             int64_t max_n, int64_t max_draft,
                                             const OptionalTensor& lengths) {
  check("tokens", tokens).dtype(kIdDtypes).shape({{"T"}}).contiguous();
  // What counts tokens is int32: offsets, lengths, and the number of drafted ones.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check.value("tokens", tokens.numel() <= kMost,
              "at most " + std::to_string(kMost) + " tokens in all", tokens);
  const int64_t num_sequences = check_offsets_shape(check, "offsets", offsets);
  check.value("min_n", min_n >= 1, "a number >= 1", min_n);
  TORCH_CHECK_VALUE(max_n >= min_n, check.op(), ": max_n: expected a number >= min_n = ", min_n,
                    ", got ", max_n);
  const int64_t most_each = kMost / std::max<int64_t>(num_sequences, 1);
  check.value("max_draft", max_draft >= 0 && max_draft <= most_each,
              "a number from 0 to (2^31 - 1) / S = " + std::to_string(most_each), max_draft);
  if (lengths.has_value()) {
    check("lengths", *lengths).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  }
  return {
      .tokens = tokens.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .draft_ids = nullptr,
      .num_draft = nullptr,
      .tokens_are_int64 = tokens.scalar_type() == at::kLong,
      .num_sequences = num_sequences,
      .min_match = min_n,
      .max_match = max_n,
      .max_draft = max_draft,
      .lengths = lengths.has_value() ? lengths->const_data_ptr<int32_t>() : nullptr,
  };
}

inline VerifyDraftParams verify_draft_params(const OpCheck& check, const at::Tensor& draft_ids,
                                             const at::Tensor& target_ids,
                                             const at::Tensor& draft_offsets) {
  check("draft_ids", draft_ids).dtype(kIdDtypes).shape({{"sum k_s"}}).contiguous();
  const int64_t num_sequences = check_offsets_shape(check, "draft_offsets", draft_offsets);
  check("target_ids", target_ids)
      .dtype({draft_ids.scalar_type()})
      .shape({{"sum k_s + S", draft_ids.numel() + num_sequences}})
      .contiguous();
  return {
      .draft_ids = draft_ids.const_data_ptr(),
      .target_ids = target_ids.const_data_ptr(),
      .draft_offsets = draft_offsets.const_data_ptr<int32_t>(),
      .num_accepted = nullptr,
      .bonus_ids = nullptr,
      .ids_are_int64 = draft_ids.scalar_type() == at::kLong,
      .num_sequences = num_sequences,
  };
}

}  // namespace skv::bindings
