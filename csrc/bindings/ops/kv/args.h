// The arguments of append_kv, rope_append_kv and copy_pages: checks of shapes, dtypes and memory
// that hold on every device, and the parameters of the kernels. Slots, positions and page ids are
// values in memory; only the CPU ops look at them.
#pragma once

#include <cstdint>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/kv/checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/kv_params.h"

namespace skv::bindings {

inline AppendKvParams append_kv_params(const OpCheck& check, const at::Tensor& k,
                                       const at::Tensor& v, const at::Tensor& slots,
                                       const at::Tensor& k_pool, const at::Tensor& v_pool,
                                       const OptionalTensor& k_scales,
                                       const OptionalTensor& v_scales) {
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check.own_memory("v_pool", v_pool, "k_pool", k_pool);
  check("slots", slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  check_written_scales(check, k_scales, v_scales, k_pool, v_pool);
  check_new_rows(check, "k", k, kPoolDtypes, slots.numel(), layout);
  check_new_rows(check, "v", v, {k.scalar_type()}, slots.numel(), layout);
  return {
      .key = k.const_data_ptr(),
      .value = v.const_data_ptr(),
      .slots = slots.const_data_ptr<int64_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = v_pool.mutable_data_ptr(),
      .k_scales = mutable_scales(k_scales),
      .v_scales = mutable_scales(v_scales),
      .layout = layout,
      .source_dtype = dtype_of(k),
      .kv_dtype = dtype_of(k_pool),
      .num_rows = slots.numel(),
      .key_row_stride = k.stride(0),
      .key_head_stride = k.stride(1),
      .value_row_stride = v.stride(0),
      .value_head_stride = v.stride(1),
  };
}

struct RopeAppendKvArgs {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& positions;
  const at::Tensor& cos_sin;
  const at::Tensor& slots;
  const at::Tensor& k_pool;
  const at::Tensor& v_pool;
  const OptionalTensor& k_scales;
  const OptionalTensor& v_scales;
};

inline KvLayout check_rope_append_kv(const OpCheck& check, const RopeAppendKvArgs& args,
                                     DtypeList query_dtypes) {
  const KvLayout layout = check_pools(check, args.k_pool, args.v_pool);
  check.value("k_pool", layout.head_dim % 2 == 0, "an even head dimension D", layout.head_dim);
  check.own_memory("v_pool", args.v_pool, "k_pool", args.k_pool);
  check("slots", args.slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  const int64_t num_rows = args.slots.numel();
  check("q", args.q)
      .dtype(query_dtypes)
      .shape({{"N", num_rows}, {"H"}, {"D", layout.head_dim}})
      .last_dim_contiguous()
      .writable();
  check.own_memory("q", args.q, "k_pool", args.k_pool);
  check.own_memory("q", args.q, "v_pool", args.v_pool);
  check_written_scales(check, args.k_scales, args.v_scales, args.k_pool, args.v_pool);
  if (args.k_scales.has_value()) {
    check.own_memory("q", args.q, "k_scales", *args.k_scales);
    check.own_memory("q", args.q, "v_scales", *args.v_scales);
  }
  check_new_rows(check, "k", args.k, {args.q.scalar_type()}, num_rows, layout);
  check_new_rows(check, "v", args.v, {args.q.scalar_type()}, num_rows, layout);
  check("positions", args.positions).dtype({at::kInt}).shape({{"N", num_rows}}).contiguous();
  check("cos_sin", args.cos_sin)
      .dtype({at::kFloat})
      .shape({{"max_pos"}, {"D", layout.head_dim}})
      .contiguous();
  return layout;
}

// Preconditions: check_rope_append_kv, which returned `layout`.
inline RopeAppendKvParams params_of(const RopeAppendKvArgs& args, const KvLayout& layout) {
  return {
      .query = args.q.mutable_data_ptr(),
      .key = args.k.const_data_ptr(),
      .value = args.v.const_data_ptr(),
      .positions = args.positions.const_data_ptr<int32_t>(),
      .cos_sin = args.cos_sin.const_data_ptr<float>(),
      .slots = args.slots.const_data_ptr<int64_t>(),
      .k_pool = args.k_pool.mutable_data_ptr(),
      .v_pool = args.v_pool.mutable_data_ptr(),
      .k_scales = mutable_scales(args.k_scales),
      .v_scales = mutable_scales(args.v_scales),
      .layout = layout,
      .activation_dtype = dtype_of(args.q),
      .kv_dtype = dtype_of(args.k_pool),
      .num_rows = args.slots.numel(),
      .num_heads = args.q.size(1),
      .query_row_stride = args.q.stride(0),
      .query_head_stride = args.q.stride(1),
      .key_row_stride = args.k.stride(0),
      .key_head_stride = args.k.stride(1),
      .value_row_stride = args.v.stride(0),
      .value_head_stride = args.v.stride(1),
  };
}

inline CopyPagesParams copy_pages_params(const OpCheck& check, const at::Tensor& page_copies,
                                         const at::Tensor& k_pool, const at::Tensor& v_pool,
                                         const OptionalTensor& k_scales,
                                         const OptionalTensor& v_scales) {
  const PoolStack pools = check_pool_stacks(check, k_pool, v_pool);
  check.own_memory("v_pool", v_pool, "k_pool", k_pool);
  check_written_scales(check, k_scales, v_scales, k_pool, v_pool);
  check("page_copies", page_copies).dtype({at::kInt}).shape({{"C"}, {"2", 2}}).contiguous();
  return {
      .page_copies = page_copies.const_data_ptr<int32_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = v_pool.mutable_data_ptr(),
      .k_scales = mutable_scales(k_scales),
      .v_scales = mutable_scales(v_scales),
      .num_copies = page_copies.size(0),
      .num_layers = pools.num_layers,
      .num_pages = pools.layout.num_pages,
      .page_bytes = pools.layout.page_elements() * static_cast<int64_t>(k_pool.element_size()),
      .scale_bytes = k_scales.has_value()
                         ? pools.layout.page_vectors() * static_cast<int64_t>(sizeof(float))
                         : 0,
  };
}

}  // namespace skv::bindings
