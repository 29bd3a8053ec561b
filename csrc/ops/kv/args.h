// The arguments of append_kv, rope_append_kv and copy_pages: checks of shapes, dtypes and memory
// that hold on every device, and the parameters of the kernels. Slots, positions and page ids are
// values in memory; only the CPU ops look at them.
#pragma once

#include <cstdint>

#include "csrc/kernels/kv_params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/kv/checks.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

struct AppendKvArgs {
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& slots;
  const at::Tensor& k_pool;
  const at::Tensor& v_pool;
  const OptionalTensor& k_scales;
  const OptionalTensor& v_scales;
};

inline void check_append_kv(const OpCheck& check, const AppendKvArgs& args) {
  check_pools(check, args.k_pool, args.v_pool);
  check.own_memory("v_pool", args.v_pool, "k_pool", args.k_pool);
  check("slots", args.slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  check_written_scales(check, args.k_scales, args.v_scales, args.k_pool, args.v_pool);
  check_new_rows(check, "k", args.k, kFloatDtypes, args.slots, args.k_pool);
  check_new_rows(check, "v", args.v, {args.k.scalar_type()}, args.slots, args.k_pool);
}

inline AppendKvParams params_of(const AppendKvArgs& args) {
  return {
      .key = args.k.const_data_ptr(),
      .value = args.v.const_data_ptr(),
      .slots = args.slots.const_data_ptr<int64_t>(),
      .k_pool = args.k_pool.mutable_data_ptr(),
      .v_pool = args.v_pool.mutable_data_ptr(),
      .k_scales = mutable_scales(args.k_scales),
      .v_scales = mutable_scales(args.v_scales),
      .layout = layout_of(args.k_pool),
      .source_dtype = dtype_of(args.k),
      .kv_dtype = dtype_of(args.k_pool),
      .num_rows = args.slots.numel(),
      .key_row_stride = args.k.stride(0),
      .key_head_stride = args.k.stride(1),
      .value_row_stride = args.v.stride(0),
      .value_head_stride = args.v.stride(1),
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

inline void check_rope_append_kv(const OpCheck& check, const RopeAppendKvArgs& args) {
  check_pools(check, args.k_pool, args.v_pool);
  const c10::SymInt head_dim = args.k_pool.sym_size(3);
  check.value("k_pool", head_dim % 2 == 0, "an even head dimension D", head_dim);
  check.own_memory("v_pool", args.v_pool, "k_pool", args.k_pool);
  check("slots", args.slots).dtype({at::kLong}).shape({{"N"}}).contiguous();
  const c10::SymInt num_rows = args.slots.sym_size(0);
  check("q", args.q)
      .dtype(kFloatDtypes)
      .shape({{"N", num_rows}, {"H"}, {"D", head_dim}})
      .last_dim_contiguous()
      .writable();
  check.own_memory("q", args.q, "k_pool", args.k_pool);
  check.own_memory("q", args.q, "v_pool", args.v_pool);
  check_written_scales(check, args.k_scales, args.v_scales, args.k_pool, args.v_pool);
  if (args.k_scales.has_value()) {
    check.own_memory("q", args.q, "k_scales", *args.k_scales);
    check.own_memory("q", args.q, "v_scales", *args.v_scales);
  }
  check_new_rows(check, "k", args.k, {args.q.scalar_type()}, args.slots, args.k_pool);
  check_new_rows(check, "v", args.v, {args.q.scalar_type()}, args.slots, args.k_pool);
  check("positions", args.positions).dtype({at::kInt}).shape({{"N", num_rows}}).contiguous();
  check("cos_sin", args.cos_sin)
      .dtype({at::kFloat})
      .shape({{"max_pos"}, {"D", head_dim}})
      .contiguous();
}

inline RopeAppendKvParams params_of(const RopeAppendKvArgs& args) {
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
      .layout = layout_of(args.k_pool),
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

struct CopyPagesArgs {
  const at::Tensor& page_copies;
  const at::Tensor& k_pool;
  const at::Tensor& v_pool;
  const OptionalTensor& k_scales;
  const OptionalTensor& v_scales;
};

inline void check_copy_pages(const OpCheck& check, const CopyPagesArgs& args) {
  check_pool_stacks(check, args.k_pool, args.v_pool);
  check.own_memory("v_pool", args.v_pool, "k_pool", args.k_pool);
  check_written_scales(check, args.k_scales, args.v_scales, args.k_pool, args.v_pool);
  check("page_copies", args.page_copies).dtype({at::kInt}).shape({{"C"}, {"2", 2}}).contiguous();
}

inline CopyPagesParams params_of(const CopyPagesArgs& args) {
  const at::Tensor& k_pool = args.k_pool;
  const KvLayout layout = layout_of(k_pool);
  return {
      .page_copies = args.page_copies.const_data_ptr<int32_t>(),
      .k_pool = k_pool.mutable_data_ptr(),
      .v_pool = args.v_pool.mutable_data_ptr(),
      .k_scales = mutable_scales(args.k_scales),
      .v_scales = mutable_scales(args.v_scales),
      .num_copies = args.page_copies.size(0),
      .num_layers = k_pool.dim() == 5 ? k_pool.size(0) : 1,
      .num_pages = layout.num_pages,
      .page_bytes = layout.page_elements() * static_cast<int64_t>(k_pool.element_size()),
      .scale_bytes = args.k_scales.has_value()
                         ? layout.page_vectors() * static_cast<int64_t>(sizeof(float))
                         : 0,
  };
}

}  // namespace skv::ops
