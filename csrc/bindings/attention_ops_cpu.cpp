// CPU kernel of paged_attention: check values, launch.
#include <torch/library.h>

#include "csrc/bindings/attention_args.h"
#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

at::Tensor paged_attention_cpu(const at::Tensor& q, const at::Tensor& k_pool,
                               const at::Tensor& v_pool, const at::Tensor& page_table,
                               const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                               double scale, int64_t sliding_window, double soft_cap,
                               const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"paged_attention", q.device()};
  const PagedAttentionArgs args{q,        k_pool,        v_pool,  page_table,
                                seq_lens, query_offsets, scale,   sliding_window,
                                soft_cap, k_scales,      v_scales};
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check_attention_head_dim(check, layout);
  check_paged_attention(check, args, layout, {at::kFloat});
  check_row_offsets(check, "query_offsets", query_offsets, q.size(0));
  check_sequences(check, page_table, seq_lens, query_offsets, layout);
  const at::Tensor output = empty_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type(), q);
  cpu::kernels().paged_attention(params_of(args, layout, output), torch_parallel_for);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_cpu));
}

}  // namespace skv::bindings
