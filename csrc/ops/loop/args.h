// The arguments of ngram_lookup, fill_rows and advance_sequences, the ops around a step whose state
// lies in device memory: checks that hold on every device and for tracing, the outputs, and the
// parameters of the kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>

#include "csrc/kernels/token_params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/offsets.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

struct NgramLookupArgs {
  const at::Tensor& tokens;
  const at::Tensor& offsets;
  int64_t min_n;
  int64_t max_n;
  int64_t max_draft;
  const OptionalTensor& lengths;
};

inline void check_ngram_lookup(const OpCheck& check, const NgramLookupArgs& args) {
  check("tokens", args.tokens).dtype(kIdDtypes).shape({{"T"}}).contiguous();
  // What counts tokens is int32: offsets, lengths, and the number of drafted ones.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check.value("tokens", holds(args.tokens.sym_size(0).sym_le(kMost)),
              "at most " + std::to_string(kMost) + " tokens in all", args.tokens);
  const c10::SymInt num_sequences = check_offsets_shape(check, "offsets", args.offsets);
  check.value("min_n", args.min_n >= 1, "a number >= 1", args.min_n);
  TORCH_CHECK_VALUE(args.max_n >= args.min_n, check.op(),
                    ": max_n: expected a number >= min_n = ", args.min_n, ", got ", args.max_n);
  check.value("max_draft",
              args.max_draft >= 0 && args.max_draft <= kMost &&
                  holds((num_sequences * args.max_draft).sym_le(kMost)),
              "a number from 0 to (2^31 - 1) / S with S = " + to_text(num_sequences),
              args.max_draft);
  if (args.lengths.has_value()) {
    check("lengths", *args.lengths).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  }
}

// draft_ids and num_draft.
inline TwoTensors empty_drafts(const NgramLookupArgs& args) {
  const c10::SymInt num_sequences = args.offsets.sym_size(0) - 1;
  return {empty_tensor({num_sequences, args.max_draft}, at::kInt, args.tokens),
          empty_tensor({num_sequences}, at::kInt, args.tokens)};
}

inline NgramLookupParams params_of(const NgramLookupArgs& args, const TwoTensors& drafts) {
  return {
      .tokens = args.tokens.const_data_ptr(),
      .offsets = args.offsets.const_data_ptr<int32_t>(),
      .draft_ids = std::get<0>(drafts).mutable_data_ptr<int32_t>(),
      .num_draft = std::get<1>(drafts).mutable_data_ptr<int32_t>(),
      .tokens_are_int64 = args.tokens.scalar_type() == at::kLong,
      .num_sequences = args.offsets.numel() - 1,
      .min_n = args.min_n,
      .max_n = args.max_n,
      .max_draft = args.max_draft,
      .lengths = args.lengths.has_value() ? args.lengths->const_data_ptr<int32_t>() : nullptr,
  };
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
  const c10::SymInt num_sequences = args.history.sym_size(0);
  check("lengths", args.lengths).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("num_left", args.num_left).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("kv_limits", args.kv_limits).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("draft_ids", args.draft_ids)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"K"}})
      .contiguous();
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const c10::SymInt max_draft = args.draft_ids.sym_size(1);
  check.value("draft_ids",
              max_draft < kMost && holds((num_sequences * (max_draft + 1)).sym_le(kMost)),
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

// token_ids, positions, slots, seq_lens, query_offsets and row_sequences.
inline SixTensors empty_step(const FillRowsArgs& args) {
  const c10::SymInt num_sequences = args.history.sym_size(0);
  const c10::SymInt num_rows = num_sequences * (args.draft_ids.sym_size(1) + 1);
  return {empty_tensor({num_rows}, at::kLong, args.history),
          empty_tensor({num_rows}, at::kInt, args.history),
          empty_tensor({num_rows}, at::kLong, args.history),
          empty_tensor({num_sequences}, at::kInt, args.history),
          empty_tensor({num_sequences + 1}, at::kInt, args.history),
          empty_tensor({num_rows}, at::kLong, args.history)};
}

inline FillRowsParams params_of(const FillRowsArgs& args, const SixTensors& step) {
  const auto& [token_ids, positions, slots, seq_lens, query_offsets, row_sequences] = step;
  return {
      .history = args.history.const_data_ptr<int32_t>(),
      .lengths = args.lengths.const_data_ptr<int32_t>(),
      .num_left = args.num_left.const_data_ptr<int32_t>(),
      .kv_limits = args.kv_limits.const_data_ptr<int32_t>(),
      .draft_ids = args.draft_ids.const_data_ptr<int32_t>(),
      .num_draft = args.num_draft.const_data_ptr<int32_t>(),
      .page_table = args.page_table.const_data_ptr<int32_t>(),
      .token_ids = token_ids.mutable_data_ptr<int64_t>(),
      .positions = positions.mutable_data_ptr<int32_t>(),
      .slots = slots.mutable_data_ptr<int64_t>(),
      .seq_lens = seq_lens.mutable_data_ptr<int32_t>(),
      .query_offsets = query_offsets.mutable_data_ptr<int32_t>(),
      .row_sequences = row_sequences.mutable_data_ptr<int64_t>(),
      .num_sequences = args.history.size(0),
      .capacity = args.history.size(1),
      .max_draft = args.draft_ids.size(1),
      .max_pages = args.page_table.size(1),
      .page_size = args.page_size,
  };
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
  const c10::SymInt num_rows = args.token_ids.sym_size(0);
  check("target_ids", args.target_ids).dtype({at::kLong}).shape({{"N", num_rows}}).contiguous();
  check("target_values", args.target_values)
      .dtype({at::kFloat})
      .shape({{"N", num_rows}})
      .contiguous();
  const c10::SymInt num_sequences = check_offsets_shape(check, "query_offsets", args.query_offsets);
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

inline AdvanceSequencesParams params_of(const AdvanceSequencesArgs& args) {
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

}  // namespace skv::ops
