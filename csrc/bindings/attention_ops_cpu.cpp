// CPU kernel of paged_attention: check, fill params, launch.
#include <torch/library.h>

#include <cmath>

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

KvLayout check_paged_attention(const OpCheck& check, const at::Tensor& q, const at::Tensor& k_pool,
                               const at::Tensor& v_pool, const at::Tensor& page_table,
                               const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                               double scale, int64_t sliding_window, double soft_cap) {
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check.value("k_pool", layout.head_dim % 16 == 0 && layout.head_dim <= 256,
              "a head dimension D that is a multiple of 16 and at most 256", layout.head_dim);
  check("q", q)
      .dtype({at::kFloat})
      .shape({{"N"}, {"H"}, {"D", layout.head_dim}})
      .last_dim_contiguous();
  TORCH_CHECK_VALUE(layout.num_kv_heads > 0 && q.size(1) % layout.num_kv_heads == 0, check.op(),
                    ": q: expected H to be a multiple of the pool's Hk = ", layout.num_kv_heads,
                    ", got ", describe(q));
  const int64_t num_sequences = check_offsets_shape(check, "query_offsets", query_offsets);
  check("seq_lens", seq_lens).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("page_table", page_table)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"M"}})
      .last_dim_contiguous();
  check.value("scale", std::isfinite(scale), "a finite number", scale);
  check.value("sliding_window", sliding_window >= 0, "a number >= 0", sliding_window);
  check.value("soft_cap", soft_cap >= 0 && std::isfinite(soft_cap), "a finite number >= 0",
              soft_cap);
  check_offset_values(check, "query_offsets", query_offsets, q.size(0));
  check_sequences(check, page_table, seq_lens, query_offsets, layout);
  return layout;
}

at::Tensor paged_attention_cpu(const at::Tensor& q, const at::Tensor& k_pool,
                               const at::Tensor& v_pool, const at::Tensor& page_table,
                               const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                               double scale, int64_t sliding_window, double soft_cap) {
  const OpCheck check{"paged_attention", q.device()};
  const KvLayout layout = check_paged_attention(check, q, k_pool, v_pool, page_table, seq_lens,
                                                query_offsets, scale, sliding_window, soft_cap);
  at::Tensor output = empty_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type(), q);
  const PagedAttentionParams params{
      .query = q.const_data_ptr(),
      .k_pool = k_pool.const_data_ptr(),
      .v_pool = v_pool.const_data_ptr(),
      .page_table = page_table.const_data_ptr<int32_t>(),
      .seq_lens = seq_lens.const_data_ptr<int32_t>(),
      .query_offsets = query_offsets.const_data_ptr<int32_t>(),
      .output = output.mutable_data_ptr(),
      .layout = layout,
      .activation_dtype = dtype_of(q),
      .kv_dtype = dtype_of(k_pool),
      .num_sequences = seq_lens.numel(),
      .num_rows = q.size(0),
      .num_heads = q.size(1),
      .max_pages = page_table.size(1),
      .query_row_stride = q.stride(0),
      .query_head_stride = q.stride(1),
      .page_table_row_stride = page_table.stride(0),
      .scale = static_cast<float>(scale),
      .sliding_window = sliding_window,
      .soft_cap = static_cast<float>(soft_cap),
  };
  cpu::kernels().paged_attention(params, torch_parallel_for);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_cpu));
}

}  // namespace skv::bindings
