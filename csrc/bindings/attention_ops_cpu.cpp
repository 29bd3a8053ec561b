// CPU kernel of paged_attention: check values, launch.
#include <torch/library.h>

#include "csrc/bindings/attention_args.h"
#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

// The lengths fit the rows of the batch and the page table, and the pages that will be read exist.
void check_sequences(const OpCheck& check, const at::Tensor& page_table, const at::Tensor& seq_lens,
                     const at::Tensor& query_offsets, const KvLayout& layout) {
  const int32_t* pages = page_table.const_data_ptr<int32_t>();
  const int32_t* lengths = seq_lens.const_data_ptr<int32_t>();
  const int32_t* offsets = query_offsets.const_data_ptr<int32_t>();
  const int64_t capacity = page_table.size(1) * layout.page_size;
  for (int64_t sequence = 0; sequence < seq_lens.numel(); ++sequence) {
    const int64_t length = lengths[sequence];
    const int64_t num_rows = offsets[sequence + 1] - offsets[sequence];
    TORCH_CHECK_VALUE(length >= num_rows, check.op(), ": seq_lens: expected at least the ",
                      num_rows, " new rows of sequence ", sequence, ", got ", length);
    TORCH_CHECK_VALUE(length <= capacity, check.op(),
                      ": seq_lens: expected at most M * B = ", capacity, ", got ", length,
                      " for sequence ", sequence);
    const int64_t num_pages = (length + layout.page_size - 1) / layout.page_size;
    const int32_t* row = pages + sequence * page_table.stride(0);
    for (int64_t i = 0; i < num_pages; ++i) {
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < layout.num_pages, check.op(),
                        ": page_table: expected page ids in [0, P = ", layout.num_pages, "), got ",
                        row[i], " at [", sequence, ", ", i, "]");
    }
  }
}

at::Tensor paged_attention_cpu(const at::Tensor& q, const at::Tensor& k_pool,
                               const at::Tensor& v_pool, const at::Tensor& page_table,
                               const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                               double scale, int64_t sliding_window, double soft_cap) {
  const OpCheck check{"paged_attention", q.device()};
  const PagedAttentionArgs args{q,     k_pool,         v_pool,  page_table, seq_lens, query_offsets,
                                scale, sliding_window, soft_cap};
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check.value("k_pool", layout.head_dim % 16 == 0 && layout.head_dim <= 256,
              "a head dimension D that is a multiple of 16 and at most 256", layout.head_dim);
  check_paged_attention(check, args, layout, {at::kFloat});
  check_offset_values(check, "query_offsets", query_offsets, q.size(0));
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
