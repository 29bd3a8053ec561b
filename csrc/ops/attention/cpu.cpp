// CPU kernels of paged_attention and shared_prefix_attention: check values, launch.
#include <torch/library.h>

#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/ops/attention/args.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

namespace {

// prefixes: of shared_prefix_attention, else null. They are checked and then of no use: a CPU walks
// the keys of one sequence after those of another, and its caches are too small for a prefix.
at::Tensor attend(const OpCheck& check, const PagedAttentionArgs& args,
                  const SharedPrefixArgs* prefixes) {
  check_attention(check, args, prefixes);
  check_attention_values(check, args, prefixes);
  const at::Tensor output = empty_attention_output(args);
  cpu::kernels().paged_attention(params_of(args, output), torch_parallel_for);
  return output;
}

at::Tensor paged_attention_cpu(const at::Tensor& q, const at::Tensor& k_pool,
                               const at::Tensor& v_pool, const at::Tensor& page_table,
                               const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                               double scale, int64_t sliding_window, double soft_cap,
                               const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"paged_attention", q.device()};
  return attend(check,
                {q, k_pool, v_pool, page_table, seq_lens, query_offsets, scale, sliding_window,
                 soft_cap, k_scales, v_scales},
                nullptr);
}

at::Tensor shared_prefix_attention_cpu(const at::Tensor& q, const at::Tensor& k_pool,
                                       const at::Tensor& v_pool, const at::Tensor& page_table,
                                       const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                       const at::Tensor& group_offsets,
                                       const at::Tensor& prefix_lens, double scale,
                                       int64_t sliding_window, double soft_cap,
                                       const OptionalTensor& k_scales,
                                       const OptionalTensor& v_scales) {
  const OpCheck check{"shared_prefix_attention", q.device()};
  const SharedPrefixArgs prefixes{group_offsets, prefix_lens};
  return attend(check,
                {q, k_pool, v_pool, page_table, seq_lens, query_offsets, scale, sliding_window,
                 soft_cap, k_scales, v_scales},
                &prefixes);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_cpu));
  m.impl("shared_prefix_attention", TORCH_FN(shared_prefix_attention_cpu));
}

}  // namespace skv::ops
