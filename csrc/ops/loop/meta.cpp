// ngram_lookup, fill_rows and advance_sequences of tensors without memory: what tracing checks, and
// the shapes of the outputs.
#include <torch/library.h>

#include <cstdint>

#include "csrc/ops/checks.h"
#include "csrc/ops/loop/args.h"

namespace skv::ops {

namespace {

TwoTensors ngram_lookup_meta(const at::Tensor& tokens, const at::Tensor& offsets, int64_t min_n,
                             int64_t max_n, int64_t max_draft, const OptionalTensor& lengths) {
  const NgramLookupArgs args{tokens, offsets, min_n, max_n, max_draft, lengths};
  check_ngram_lookup({"ngram_lookup", tokens.device()}, args);
  return empty_drafts(args);
}

SixTensors fill_rows_meta(const at::Tensor& history, const at::Tensor& lengths,
                          const at::Tensor& num_left, const at::Tensor& kv_limits,
                          const at::Tensor& draft_ids, const at::Tensor& num_draft,
                          const at::Tensor& page_table, int64_t page_size) {
  const FillRowsArgs args{history,   lengths,   num_left,   kv_limits,
                          draft_ids, num_draft, page_table, page_size};
  check_fill_rows({"fill_rows", history.device()}, args);
  return empty_step(args);
}

void advance_sequences_meta(const at::Tensor& token_ids, const at::Tensor& target_ids,
                            const at::Tensor& target_values, const at::Tensor& query_offsets,
                            const at::Tensor& stop_ids, const at::Tensor& history,
                            const at::Tensor& lengths, const at::Tensor& num_left,
                            const at::Tensor& counts) {
  check_advance_sequences({"advance_sequences", token_ids.device()},
                          {token_ids, target_ids, target_values, query_offsets, stop_ids, history,
                           lengths, num_left, counts});
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("ngram_lookup", TORCH_FN(ngram_lookup_meta));
  m.impl("fill_rows", TORCH_FN(fill_rows_meta));
  m.impl("advance_sequences", TORCH_FN(advance_sequences_meta));
}

}  // namespace skv::ops
