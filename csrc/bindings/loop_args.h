// The arguments of fill_rows and advance_sequences, the ops around a step whose state lies in
// device memory: checks that hold on every device, the outputs, and the parameters of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

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

struct FilledRows {
  at::Tensor token_ids;
  at::Tensor positions;
  at::Tensor slots;
  at::Tensor seq_lens;
  at::Tensor query_offsets;
  at::Tensor row_sequences;
};

inline FilledRows empty_rows(const FillRowsArgs& args) {
  const int64_t num_sequences = args.history.size(0);
  const int64_t num_rows = num_sequences * (args.draft_ids.size(1) + 1);
  return {
      .token_ids = empty_tensor({num_rows}, at::kLong, args.history),
      .positions = empty_tensor({num_rows}, at::kInt, args.history),
      .slots = empty_tensor({num_rows}, at::kLong, args.history),
      .seq_lens = empty_tensor({num_sequences}, at::kInt, args.history),
      .query_offsets = empty_tensor({num_sequences + 1}, at::kInt, args.history),
      .row_sequences = empty_tensor({num_rows}, at::kLong, args.history),
  };
}

inline FillRowsParams params_of(const FillRowsArgs& args, const FilledRows& rows) {
  return {
      .history = args.history.const_data_ptr<int32_t>(),
      .lengths = args.lengths.const_data_ptr<int32_t>(),
      .num_left = args.num_left.const_data_ptr<int32_t>(),
      .kv_limits = args.kv_limits.const_data_ptr<int32_t>(),
      .draft_ids = args.draft_ids.const_data_ptr<int32_t>(),
      .num_draft = args.num_draft.const_data_ptr<int32_t>(),
      .page_table = args.page_table.const_data_ptr<int32_t>(),
      .token_ids = rows.token_ids.mutable_data_ptr<int64_t>(),
      .positions = rows.positions.mutable_data_ptr<int32_t>(),
      .slots = rows.slots.mutable_data_ptr<int64_t>(),
      .seq_lens = rows.seq_lens.mutable_data_ptr<int32_t>(),
      .query_offsets = rows.query_offsets.mutable_data_ptr<int32_t>(),
      .row_sequences = rows.row_sequences.mutable_data_ptr<int64_t>(),
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
  for (const auto& one : written) {
    for (const auto& other : written) {
      if (&one == &other) break;
      check.own_memory(one.name, one.tensor, other.name, other.tensor);
    }
    check.own_memory(one.name, one.tensor, "token_ids", args.token_ids);
    check.own_memory(one.name, one.tensor, "target_ids", args.target_ids);
    check.own_memory(one.name, one.tensor, "target_values", args.target_values);
    check.own_memory(one.name, one.tensor, "query_offsets", args.query_offsets);
    check.own_memory(one.name, one.tensor, "stop_ids", args.stop_ids);
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

}  // namespace skv::bindings
