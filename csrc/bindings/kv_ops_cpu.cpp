// CPU kernels of append_kv, rope_append_kv and copy_pages: check, fill params, launch.
#include <torch/library.h>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/copy_pages.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

void append_kv_cpu(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                   const at::Tensor& k_pool, const at::Tensor& v_pool) {
  const OpCheck check{"append_kv", k_pool.device()};
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check("slots", slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  check_new_rows(check, "k", k, {at::kFloat, k_pool.scalar_type()}, slots.numel(), layout);
  check_new_rows(check, "v", v, {k.scalar_type()}, slots.numel(), layout);
  check_slot_values(check, slots, layout);

  const AppendKvParams params{
      .key = k.const_data_ptr(),
      .value = v.const_data_ptr(),
      .slots = slots.const_data_ptr<int64_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = v_pool.mutable_data_ptr(),
      .layout = layout,
      .source_dtype = dtype_of(k),
      .kv_dtype = dtype_of(k_pool),
      .num_rows = slots.numel(),
      .key_row_stride = k.stride(0),
      .key_head_stride = k.stride(1),
      .value_row_stride = v.stride(0),
      .value_head_stride = v.stride(1),
  };
  cpu::kernels().append_kv(params, torch_parallel_for);
}

void check_positions(const OpCheck& check, const at::Tensor& positions, int64_t num_positions) {
  const int32_t* values = positions.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < positions.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < num_positions, check.op(),
                      ": positions: expected positions in [0, rows of cos_sin = ", num_positions,
                      "), got ", values[i], " at index ", i);
  }
}

KvLayout check_rope_append_kv(const OpCheck& check, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& v, const at::Tensor& positions,
                              const at::Tensor& cos_sin, const at::Tensor& slots,
                              const at::Tensor& k_pool, const at::Tensor& v_pool) {
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check.value("k_pool", layout.head_dim % 2 == 0, "an even head dimension D", layout.head_dim);
  check("slots", slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  const int64_t num_rows = slots.numel();
  check("q", q)
      .dtype({at::kFloat})
      .shape({{"N", num_rows}, {"H"}, {"D", layout.head_dim}})
      .last_dim_contiguous()
      .writable();
  check_new_rows(check, "k", k, {at::kFloat}, num_rows, layout);
  check_new_rows(check, "v", v, {at::kFloat}, num_rows, layout);
  check("positions", positions).dtype({at::kInt}).shape({{"N", num_rows}}).contiguous();
  check("cos_sin", cos_sin)
      .dtype({at::kFloat})
      .shape({{"max_pos"}, {"D", layout.head_dim}})
      .contiguous();
  check_slot_values(check, slots, layout);
  check_positions(check, positions, cos_sin.size(0));
  return layout;
}

void rope_append_kv_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& positions, const at::Tensor& cos_sin,
                        const at::Tensor& slots, const at::Tensor& k_pool,
                        const at::Tensor& v_pool) {
  const OpCheck check{"rope_append_kv", k_pool.device()};
  const KvLayout layout =
      check_rope_append_kv(check, q, k, v, positions, cos_sin, slots, k_pool, v_pool);
  const RopeAppendKvParams params{
      .query = q.mutable_data_ptr(),
      .key = k.const_data_ptr(),
      .value = v.const_data_ptr(),
      .positions = positions.const_data_ptr<int32_t>(),
      .cos_sin = cos_sin.const_data_ptr<float>(),
      .slots = slots.const_data_ptr<int64_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = v_pool.mutable_data_ptr(),
      .layout = layout,
      .activation_dtype = dtype_of(q),
      .kv_dtype = dtype_of(k_pool),
      .num_rows = slots.numel(),
      .num_heads = q.size(1),
      .query_row_stride = q.stride(0),
      .query_head_stride = q.stride(1),
      .key_row_stride = k.stride(0),
      .key_head_stride = k.stride(1),
      .value_row_stride = v.stride(0),
      .value_head_stride = v.stride(1),
  };
  cpu::kernels().rope_append_kv(params, torch_parallel_for);
}

void check_page_copies(const OpCheck& check, const at::Tensor& page_copies, int64_t num_pages) {
  const int32_t* pages = page_copies.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < page_copies.numel(); ++i) {
    TORCH_CHECK_VALUE(pages[i] >= 0 && pages[i] < num_pages, check.op(),
                      ": page_copies: expected page ids in [0, P = ", num_pages, "), got ",
                      pages[i], " in row ", i / 2);
  }
}

void copy_pages_cpu(const at::Tensor& page_copies, const at::Tensor& k_pool,
                    const at::Tensor& v_pool) {
  const OpCheck check{"copy_pages", k_pool.device()};
  const PoolStack pools = check_pool_stacks(check, k_pool, v_pool);
  check("page_copies", page_copies).dtype({at::kInt}).shape({{"C"}, {"2", 2}}).contiguous();
  check_page_copies(check, page_copies, pools.layout.num_pages);

  const CopyPagesParams params{
      .page_copies = page_copies.const_data_ptr<int32_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = v_pool.mutable_data_ptr(),
      .num_copies = page_copies.size(0),
      .num_layers = pools.num_layers,
      .num_pages = pools.layout.num_pages,
      .page_bytes = pools.layout.page_elements() * static_cast<int64_t>(k_pool.element_size()),
  };
  cpu::copy_pages(params, torch_parallel_for);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("append_kv", TORCH_FN(append_kv_cpu));
  m.impl("rope_append_kv", TORCH_FN(rope_append_kv_cpu));
  m.impl("copy_pages", TORCH_FN(copy_pages_cpu));
}

}  // namespace skv::bindings
