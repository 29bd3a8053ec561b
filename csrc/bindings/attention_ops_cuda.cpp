// paged_attention on CUDA: check, fill the parameters, launch. Contents of the page table and the
// lengths are not checked here, which would need a synchronisation.
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

template <int... kDims>
void check_head_dim(const OpCheck& check, int64_t head_dim, std::integer_sequence<int, kDims...>) {
  std::string available;
  ((available += (available.empty() ? "" : ", ") + std::to_string(kDims)), ...);
  check.value("k_pool", ((head_dim == kDims) || ...), "a head_dim that is built: " + available,
              head_dim);
}

KvLayout check_paged_attention(const OpCheck& check, const at::Tensor& q, const at::Tensor& k_pool,
                               const at::Tensor& v_pool, const at::Tensor& page_table,
                               const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                               double scale, int64_t sliding_window, double soft_cap) {
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check_head_dim(check, layout.head_dim, cuda::HeadDims{});
  check_pool_alignment(check, "k_pool", k_pool);
  check_pool_alignment(check, "v_pool", v_pool);
  check("q", q)
      .dtype(kPoolDtypes)
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
  const int64_t num_positions = page_table.size(1) * layout.page_size;
  check.value("page_table", num_positions <= cuda::kMaxPositions,
              "M * B to be at most " + std::to_string(cuda::kMaxPositions), num_positions);
  check.value("scale", std::isfinite(scale), "a finite number", scale);
  check.value("sliding_window", sliding_window >= 0, "a number >= 0", sliding_window);
  check.value("soft_cap", soft_cap >= 0 && std::isfinite(soft_cap), "a finite number >= 0",
              soft_cap);
  return layout;
}

at::Tensor paged_attention_cuda(const at::Tensor& q, const at::Tensor& k_pool,
                                const at::Tensor& v_pool, const at::Tensor& page_table,
                                const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                double scale, int64_t sliding_window, double soft_cap) {
  const OpCheck check{"paged_attention", q.device()};
  const KvLayout layout = check_paged_attention(check, q, k_pool, v_pool, page_table, seq_lens,
                                                query_offsets, scale, sliding_window, soft_cap);
  const at::Tensor output = empty_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type(), q);
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
  launch(check.op(), cuda::paged_attention, params, q);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_cuda));
}

}  // namespace skv::bindings
