// CUDA kernels of ngram_lookup, fill_rows and advance_sequences: check, launch. Values in device
// memory are trusted: they were checked where the host wrote them, or are these ops' own.
#include <torch/library.h>

#include <cstdint>
#include <string>

#include "csrc/kernels/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/loop/args.h"

namespace skv::ops {

namespace {

TwoTensors ngram_lookup_cuda(const at::Tensor& tokens, const at::Tensor& offsets, int64_t min_n,
                             int64_t max_n, int64_t max_draft, const OptionalTensor& lengths) {
  const OpCheck check{"ngram_lookup", tokens.device()};
  const NgramLookupArgs args{tokens, offsets, min_n, max_n, max_draft, lengths};
  check_ngram_lookup(check, args);
  TwoTensors drafts = empty_drafts(args);
  launch(check.op(), cuda::ngram_lookup, params_of(args, drafts), tokens);
  return drafts;
}

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
  SixTensors step = empty_step(args);
  launch(check.op(), cuda::fill_rows, params_of(args, step), history);
  return step;
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
  m.impl("ngram_lookup", TORCH_FN(ngram_lookup_cuda));
  m.impl("fill_rows", TORCH_FN(fill_rows_cuda));
  m.impl("advance_sequences", TORCH_FN(advance_sequences_cuda));
}

}  // namespace skv::ops
