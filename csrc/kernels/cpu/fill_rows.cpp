#include "csrc/kernels/cpu/fill_rows.h"

#include <algorithm>

#include "csrc/kernels/loop_rule.h"

namespace skv::cpu {

namespace {

void write_row(const FillRowsParams& params, int64_t sequence, int64_t index, int64_t row) {
  const int64_t length = params.lengths[sequence];
  const int64_t position = length - 1 + index;
  const int32_t* pages = params.page_table + sequence * params.max_pages;
  const int32_t token = index == 0 ? params.history[sequence * params.capacity + length - 1]
                                   : params.draft_ids[sequence * params.max_draft + index - 1];
  params.token_ids[row] = token;
  params.positions[row] = static_cast<int32_t>(position);
  params.slots[row] =
      pages[position / params.page_size] * params.page_size + position % params.page_size;
  params.row_sequences[row] = sequence;
}

}  // namespace

void fill_rows(const FillRowsParams& params) {
  int64_t row = 0;
  params.query_offsets[0] = 0;
  for (int64_t sequence = 0; sequence < params.num_sequences; ++sequence) {
    const int64_t num_rows = num_step_rows(params, sequence);
    for (int64_t i = 0; i < num_rows; ++i) write_row(params, sequence, i, row++);
    const int64_t seq_len = num_rows == 0 ? 0 : params.lengths[sequence] - 1 + num_rows;
    params.seq_lens[sequence] = static_cast<int32_t>(seq_len);
    params.query_offsets[sequence + 1] = static_cast<int32_t>(row);
  }
  const int64_t total = params.num_sequences * (params.max_draft + 1);
  std::fill(params.token_ids + row, params.token_ids + total, 0);
  std::fill(params.positions + row, params.positions + total, 0);
  std::fill(params.slots + row, params.slots + total, -1);
  std::fill(params.row_sequences + row, params.row_sequences + total, 0);
}

}  // namespace skv::cpu
