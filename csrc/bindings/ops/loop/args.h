// The arguments of ngram_lookup, fill_rows and advance_sequences, the ops around a step whose state
// lies in device memory: checks that hold on every device, the outputs, and the parameters of the
// kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/offsets.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

struct NgramLookupCall {
  at::Tensor draft_ids;
  at::Tensor num_draft;
  NgramLookupParams params;

  std::tuple<at::Tensor, at::Tensor> results() const { return {draft_ids, num_draft}; }
};

inline NgramLookupCall ngram_lookup_call(const OpCheck& check, const at::Tensor& tokens,
                                         const at::Tensor& offsets, int64_t min_n, int64_t max_n,
                                         int64_t max_draft, const OptionalTensor& lengths) {
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
  at::Tensor draft_ids = empty_tensor({num_sequences, max_draft}, at::kInt, tokens);
  at::Tensor num_draft = empty_tensor({num_sequences}, at::kInt, tokens);
  const NgramLookupParams params{
      .tokens = tokens.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int32_t>(),
      .draft_ids = draft_ids.mutable_data_ptr<int32_t>(),
      .num_draft = num_draft.mutable_data_ptr<int32_t>(),
      .tokens_are_int64 = tokens.scalar_type() == at::kLong,
      .num_sequences = num_sequences,
      .min_n = min_n,
      .max_n = max_n,
      .max_draft = max_draft,
      .lengths = lengths.has_value() ? lengths->const_data_ptr<int32_t>() : nullptr,
  };
  return {std::move(draft_ids), std::move(num_draft), params};
}

struct FillRowsArgs {
  const at::Tensor& history;
  const at::Tensor& lengths;
  const at::Tensor& num_left;
  const at::Tensor& kv_limits;
  const at::Tensor& draft_ids;
  const at::Tensor& num_draft;
  const at::Tensor& page_table;
  int64_t page_size;
};

inline void check_fill_rows(const OpCheck& check, const FillRowsArgs& args) {
  check("history", args.history).dtype({at::kInt}).shape({{"S"}, {"L"}}).contiguous();
  const int64_t num_sequences = args.history.size(0);
  check("lengths", args.lengths).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("num_left", args.num_left).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("kv_limits", args.kv_limits).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("draft_ids", args.draft_ids)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"K"}})
      .contiguous();
  const int64_t most_rows =
      std::numeric_limits<int32_t>::max() / std::max<int64_t>(num_sequences, 1);
  check.value("draft_ids", args.draft_ids.size(1) < most_rows,
              "at most 2^31 - 1 rows, S * (K + 1), in all", args.draft_ids);
  check("num_draft", args.num_draft).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("page_table", args.page_table)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"M"}})
      .contiguous();
  check.value("page_size",
              args.page_size >= 1 && args.page_size <= std::numeric_limits<int32_t>::max(),
              "a number from 1 to 2^31 - 1", args.page_size);
}

using SixTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct FillRowsCall {
  at::Tensor token_ids;
  at::Tensor positions;
  at::Tensor slots;
  at::Tensor seq_lens;
  at::Tensor query_offsets;
  at::Tensor row_sequences;
  FillRowsParams params;

  SixTensors results() const {
    return {token_ids, positions, slots, seq_lens, query_offsets, row_sequences};
  }
};

inline FillRowsCall fill_rows_call(const OpCheck& check, const FillRowsArgs& args) {
  check_fill_rows(check, args);
  const int64_t num_sequences = args.history.size(0);
  const int64_t num_rows = num_sequences * (args.draft_ids.size(1) + 1);
  FillRowsCall call{
      .token_ids = empty_tensor({num_rows}, at::kLong, args.history),
      .positions = empty_tensor({num_rows}, at::kInt, args.history),
      .slots = empty_tensor({num_rows}, at::kLong, args.history),
      .seq_lens = empty_tensor({num_sequences}, at::kInt, args.history),
      .query_offsets = empty_tensor({num_sequences + 1}, at::kInt, args.history),
      .row_sequences = empty_tensor({num_rows}, at::kLong, args.history),
      .params = {},
  };
  call.params = {
      .history = args.history.const_data_ptr<int32_t>(),
      .lengths = args.lengths.const_data_ptr<int32_t>(),
      .num_left = args.num_left.const_data_ptr<int32_t>(),
      .kv_limits = args.kv_limits.const_data_ptr<int32_t>(),
      .draft_ids = args.draft_ids.const_data_ptr<int32_t>(),
      .num_draft = args.num_draft.const_data_ptr<int32_t>(),
      .page_table = args.page_table.const_data_ptr<int32_t>(),
      .token_ids = call.token_ids.mutable_data_ptr<int64_t>(),
      .positions = call.positions.mutable_data_ptr<int32_t>(),
      .slots = call.slots.mutable_data_ptr<int64_t>(),
      .seq_lens = call.seq_lens.mutable_data_ptr<int32_t>(),
      .query_offsets = call.query_offsets.mutable_data_ptr<int32_t>(),
      .row_sequences = call.row_sequences.mutable_data_ptr<int64_t>(),
      .num_sequences = num_sequences,
      .capacity = args.history.size(1),
      .max_draft = args.draft_ids.size(1),
      .max_pages = args.page_table.size(1),
      .page_size = args.page_size,
  };
  return call;
}

struct AdvanceSequencesArgs {
  const at::Tensor& token_ids;
  const at::Tensor& target_ids;
  const at::Tensor& target_values;
  const at::Tensor& query_offsets;
  const at::Tensor& stop_ids;
  const at::Tensor& history;
  const at::Tensor& lengths;
  const at::Tensor& num_left;
  const at::Tensor& counts;
};

inline void check_advance_sequences(const OpCheck& check, const AdvanceSequencesArgs& args) {
  check("token_ids", args.token_ids).dtype({at::kLong}).shape({{"N"}}).contiguous();
  const int64_t num_rows = args.token_ids.size(0);
  check("target_ids", args.target_ids).dtype({at::kLong}).shape({{"N", num_rows}}).contiguous();
  check("target_values", args.target_values)
      .dtype({at::kFloat})
      .shape({{"N", num_rows}})
      .contiguous();
  const int64_t num_sequences = check_offsets_shape(check, "query_offsets", args.query_offsets);
  check("stop_ids", args.stop_ids)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"E"}})
      .contiguous();
  check("history", args.history)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"L"}})
      .contiguous();
  check("lengths", args.lengths).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("num_left", args.num_left).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("counts", args.counts)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"3", 3}})
      .contiguous();
  // What is written has memory of its own, apart from what is read meanwhile.
  const struct {
    const char* name;
    const at::Tensor& tensor;
  } written[] = {{"history", args.history},
                 {"lengths", args.lengths},
                 {"num_left", args.num_left},
                 {"counts", args.counts}};
  for (const auto& state : written) {
    for (const auto& other : written) {
      if (&state == &other) break;
      check.own_memory(state.name, state.tensor, other.name, other.tensor);
    }
    check.own_memory(state.name, state.tensor, "token_ids", args.token_ids);
    check.own_memory(state.name, state.tensor, "target_ids", args.target_ids);
    check.own_memory(state.name, state.tensor, "target_values", args.target_values);
    check.own_memory(state.name, state.tensor, "query_offsets", args.query_offsets);
    check.own_memory(state.name, state.tensor, "stop_ids", args.stop_ids);
  }
}

inline AdvanceSequencesParams advance_sequences_params(const OpCheck& check,
                                                       const AdvanceSequencesArgs& args) {
  check_advance_sequences(check, args);
  return {
      .token_ids = args.token_ids.const_data_ptr<int64_t>(),
      .target_ids = args.target_ids.const_data_ptr<int64_t>(),
      .target_values = args.target_values.const_data_ptr<float>(),
      .query_offsets = args.query_offsets.const_data_ptr<int32_t>(),
      .stop_ids = args.stop_ids.const_data_ptr<int32_t>(),
      .history = args.history.mutable_data_ptr<int32_t>(),
      .lengths = args.lengths.mutable_data_ptr<int32_t>(),
      .num_left = args.num_left.mutable_data_ptr<int32_t>(),
      .counts = args.counts.mutable_data_ptr<int32_t>(),
      .num_sequences = args.lengths.size(0),
      .capacity = args.history.size(1),
      .num_stop_ids = args.stop_ids.size(1),
  };
}

}  // namespace skv::bindings
