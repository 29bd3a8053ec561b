// CPU kernels of ngram_lookup, fill_rows and advance_sequences: check values, launch.
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "csrc/kernels/cpu/advance_sequences.h"
#include "csrc/kernels/cpu/fill_rows.h"
#include "csrc/kernels/cpu/ngram_lookup.h"
#include "csrc/kernels/loop_rule.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/loop/args.h"
#include "csrc/ops/offsets.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void check_text_lengths(const OpCheck& check, const NgramLookupParams& params) {
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
      TORCH_CHECK_VALUE(values[i] >= 0 && values[i] <= kMaxInt32, check.op(),
                        ": tokens: expected token ids in [0, 2^31), got ", values[i], " at index ",
                        i);
    }
  }
}

TwoTensors ngram_lookup_cpu(const at::Tensor& tokens, const at::Tensor& offsets, int64_t min_n,
                            int64_t max_n, int64_t max_draft, const OptionalTensor& lengths) {
  const OpCheck check{"ngram_lookup", tokens.device()};
  const NgramLookupArgs args{tokens, offsets, min_n, max_n, max_draft, lengths};
  check_ngram_lookup(check, args);
  TwoTensors drafts = empty_drafts(args);
  const NgramLookupParams params = params_of(args, drafts);
  check_offset_values(check, "offsets", offsets, tokens.numel());
  if (params.lengths != nullptr) check_text_lengths(check, params);
  if (params.tokens_are_int64) {
    check_token_values<int64_t>(check, params);
  } else {
    check_token_values<int32_t>(check, params);
  }
  cpu::ngram_lookup(params, torch_parallel_for);
  return drafts;
}

// One value of an argument; `index` says which.
void check_element(const OpCheck& check, const char* name, int64_t value, int64_t low, int64_t high,
                   const char* high_name, int64_t index) {
  TORCH_CHECK_VALUE(value >= low && value <= high, check.op(), ": ", name,
                    ": expected a value in [", low, ", ", high_name, " = ", high, "], got ", value,
                    " at index ", index);
}

// Sequences that do not run may hold anything, and so may what their rows leave out.
void check_running_sequences(const OpCheck& check, const FillRowsParams& params) {
  const int64_t room = params.max_pages * params.page_size;
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    if (params.num_left[s] <= 0) continue;
    const int64_t length = params.lengths[s];
    check_element(check, "lengths", length, 1, params.capacity, "L", s);
    if (length > params.kv_limits[s]) continue;
    check_element(check, "kv_limits", params.kv_limits[s], 0, room, "M * page_size", s);
    check_element(check, "num_draft", params.num_draft[s], 0, params.max_draft, "K", s);
    const int64_t num_rows = num_step_rows(params, s);
    const int64_t pending = params.history[s * params.capacity + length - 1];
    check_element(check, "history", pending, 0, kMaxInt32, "2^31 - 1", s);
    for (int64_t i = 0; i < num_rows - 1; ++i) {
      const int64_t token = params.draft_ids[s * params.max_draft + i];
      check_element(check, "draft_ids", token, 0, kMaxInt32, "2^31 - 1", s);
    }
    const int64_t last = length - 2 + num_rows;
    for (int64_t i = (length - 1) / params.page_size; i <= last / params.page_size; ++i) {
      const int64_t page = params.page_table[s * params.max_pages + i];
      check_element(check, "page_table", page, 0, kMaxInt32, "2^31 - 1", s);
    }
  }
}

SixTensors fill_rows_cpu(const at::Tensor& history, const at::Tensor& lengths,
                         const at::Tensor& num_left, const at::Tensor& kv_limits,
                         const at::Tensor& draft_ids, const at::Tensor& num_draft,
                         const at::Tensor& page_table, int64_t page_size) {
  const OpCheck check{"fill_rows", history.device()};
  const FillRowsArgs args{history,   lengths,   num_left,   kv_limits,
                          draft_ids, num_draft, page_table, page_size};
  check_fill_rows(check, args);
  SixTensors step = empty_step(args);
  const FillRowsParams params = params_of(args, step);
  check_running_sequences(check, params);
  cpu::fill_rows(params);
  return step;
}

void check_advanced_sequences(const OpCheck& check, const AdvanceSequencesParams& params) {
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    const int64_t begin = params.query_offsets[s];
    const int64_t end = params.query_offsets[s + 1];
    if (begin == end) continue;
    const int64_t num_left = params.num_left[s];
    TORCH_CHECK_VALUE(num_left >= 1, check.op(), ": num_left: expected at least 1 for sequence ", s,
                      ", which has rows, got ", num_left);
    const int64_t most = std::min(params.capacity, kMaxInt32) - std::min(end - begin, num_left);
    check_element(check, "lengths", params.lengths[s], 0, most, "L - new tokens", s);
    for (int64_t row = begin; row < end; ++row) {
      check_element(check, "target_ids", params.target_ids[row], 0, kMaxInt32, "2^31 - 1", row);
    }
  }
}

void advance_sequences_cpu(const at::Tensor& token_ids, const at::Tensor& target_ids,
                           const at::Tensor& target_values, const at::Tensor& query_offsets,
                           const at::Tensor& stop_ids, const at::Tensor& history,
                           const at::Tensor& lengths, const at::Tensor& num_left,
                           const at::Tensor& counts) {
  const OpCheck check{"advance_sequences", token_ids.device()};
  const AdvanceSequencesArgs args{token_ids, target_ids, target_values, query_offsets, stop_ids,
                                  history,   lengths,    num_left,      counts};
  check_advance_sequences(check, args);
  const AdvanceSequencesParams params = params_of(args);
  check_row_offsets(check, "query_offsets", query_offsets, token_ids.numel());
  check_advanced_sequences(check, params);
  cpu::advance_sequences(params);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("ngram_lookup", TORCH_FN(ngram_lookup_cpu));
  m.impl("fill_rows", TORCH_FN(fill_rows_cpu));
  m.impl("advance_sequences", TORCH_FN(advance_sequences_cpu));
}

}  // namespace skv::ops
