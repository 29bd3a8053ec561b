// CUDA kernels of fill_rows and advance_sequences: check, launch. Values in device memory are
// trusted: they were checked where the host wrote them, or are these ops' own.
#include <torch/library.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/loop_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

using SixTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

SixTensors fill_rows_cuda(const at::Tensor& history, const at::Tensor& lengths,
                          const at::Tensor& num_left, const at::Tensor& kv_limits,
                          const at::Tensor& draft_ids, const at::Tensor& num_draft,
                          const at::Tensor& page_table, int64_t page_size) {
  const OpCheck check{"fill_rows", history.device()};
  const FillRowsArgs args{history,   lengths,   num_left,   kv_limits,
                          draft_ids, num_draft, page_table, page_size};
  check_fill_rows(check, args);
  check.value("history", history.size(0) <= cuda::kMaxSequences,
              "at most " + std::to_string(cuda::kMaxSequences) + " sequences", history);
  const FilledRows rows = empty_rows(args);
  launch(check.op(), cuda::fill_rows, params_of(args, rows), history);
  return {rows.token_ids, rows.positions,     rows.slots,
          rows.seq_lens,  rows.query_offsets, rows.row_sequences};
}

void advance_sequences_cuda(const at::Tensor& token_ids, const at::Tensor& target_ids,
                            const at::Tensor& target_values, const at::Tensor& query_offsets,
                            const at::Tensor& stop_ids, const at::Tensor& history,
                            const at::Tensor& lengths, const at::Tensor& num_left,
                            const at::Tensor& counts) {
  const OpCheck check{"advance_sequences", token_ids.device()};
  const AdvanceSequencesArgs args{token_ids, target_ids, target_values, query_offsets, stop_ids,
                                  history,   lengths,    num_left,      counts};
  check_advance_sequences(check, args);
  launch(check.op(), cuda::advance_sequences, params_of(args), history);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("fill_rows", TORCH_FN(fill_rows_cuda));
  m.impl("advance_sequences", TORCH_FN(advance_sequences_cuda));
}

}  // namespace skv::bindings
