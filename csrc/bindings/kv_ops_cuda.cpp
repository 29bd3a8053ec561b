// append_kv, rope_append_kv and copy_pages on CUDA: check, fill the parameters, launch. Contents of
// slots, positions and page ids are not checked here, which would need a synchronisation.
#include <torch/library.h>

#include <cstdint>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

void append_kv_cuda(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                    const at::Tensor& k_pool, const at::Tensor& v_pool) {
  const OpCheck check{"append_kv", k_pool.device()};
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check("slots", slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  check_new_rows(check, "k", k, {at::kFloat, k_pool.scalar_type()}, slots.numel(), layout);
  check_new_rows(check, "v", v, {k.scalar_type()}, slots.numel(), layout);
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
  launch(check.op(), cuda::append_kv, params, k_pool);
}

void rope_append_kv_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& positions, const at::Tensor& cos_sin,
                         const at::Tensor& slots, const at::Tensor& k_pool,
                         const at::Tensor& v_pool) {
  const OpCheck check{"rope_append_kv", k_pool.device()};
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check.value("k_pool", layout.head_dim % 2 == 0, "an even head dimension D", layout.head_dim);
  check("slots", slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  const int64_t num_rows = slots.numel();
  check("q", q)
      .dtype(kPoolDtypes)
      .shape({{"N", num_rows}, {"H"}, {"D", layout.head_dim}})
      .last_dim_contiguous()
      .writable();
  check_new_rows(check, "k", k, {q.scalar_type()}, num_rows, layout);
  check_new_rows(check, "v", v, {q.scalar_type()}, num_rows, layout);
  check("positions", positions).dtype({at::kInt}).shape({{"N", num_rows}}).contiguous();
  check("cos_sin", cos_sin)
      .dtype({at::kFloat})
      .shape({{"max_pos"}, {"D", layout.head_dim}})
      .contiguous();
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
      .num_rows = num_rows,
      .num_heads = q.size(1),
      .query_row_stride = q.stride(0),
      .query_head_stride = q.stride(1),
      .key_row_stride = k.stride(0),
      .key_head_stride = k.stride(1),
      .value_row_stride = v.stride(0),
      .value_head_stride = v.stride(1),
  };
  launch(check.op(), cuda::rope_append_kv, params, k_pool);
}

void copy_pages_cuda(const at::Tensor& page_copies, const at::Tensor& k_pool,
                     const at::Tensor& v_pool) {
  const OpCheck check{"copy_pages", k_pool.device()};
  const PoolStack pools = check_pool_stacks(check, k_pool, v_pool);
  check("page_copies", page_copies).dtype({at::kInt}).shape({{"C"}, {"2", 2}}).contiguous();
  const CopyPagesParams params{
      .page_copies = page_copies.const_data_ptr<int32_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = v_pool.mutable_data_ptr(),
      .num_copies = page_copies.size(0),
      .num_layers = pools.num_layers,
      .num_pages = pools.layout.num_pages,
      .page_bytes = pools.layout.page_elements() * static_cast<int64_t>(k_pool.element_size()),
  };
  launch(check.op(), cuda::copy_pages, params, k_pool);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("append_kv", TORCH_FN(append_kv_cuda));
  m.impl("rope_append_kv", TORCH_FN(rope_append_kv_cuda));
  m.impl("copy_pages", TORCH_FN(copy_pages_cuda));
}

}  // namespace skv::bindings
