// paged_attention and shared_prefix_attention of tensors without memory: what tracing checks, and
// the shape of the output.
#include <torch/library.h>

#include "csrc/ops/attention/args.h"
#include "csrc/ops/checks.h"

namespace skv::ops {

namespace {

at::Tensor paged_attention_meta(const at::Tensor& q, const at::Tensor& k_pool,
                                const at::Tensor& v_pool, const at::Tensor& page_table,
                                const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                double scale, int64_t sliding_window, double soft_cap,
                                const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const PagedAttentionArgs args{q,        k_pool,        v_pool,  page_table,
                                seq_lens, query_offsets, scale,   sliding_window,
                                soft_cap, k_scales,      v_scales};
  check_attention({"paged_attention", q.device()}, args, nullptr);
  return empty_attention_output(args);
}

at::Tensor shared_prefix_attention_meta(const at::Tensor& q, const at::Tensor& k_pool,
                                        const at::Tensor& v_pool, const at::Tensor& page_table,
                                        const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                        const at::Tensor& group_offsets,
                                        const at::Tensor& prefix_lens, double scale,
                                        int64_t sliding_window, double soft_cap,
                                        const OptionalTensor& k_scales,
                                        const OptionalTensor& v_scales) {
  const PagedAttentionArgs args{q,        k_pool,        v_pool,  page_table,
                                seq_lens, query_offsets, scale,   sliding_window,
                                soft_cap, k_scales,      v_scales};
  const SharedPrefixArgs prefixes{group_offsets, prefix_lens};
  check_attention({"shared_prefix_attention", q.device()}, args, &prefixes);
  return empty_attention_output(args);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_meta));
  m.impl("shared_prefix_attention", TORCH_FN(shared_prefix_attention_meta));
}

}  // namespace skv::ops
