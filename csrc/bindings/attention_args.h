// The arguments of paged_attention: checks of shapes and dtypes that hold on every device, and the
// parameters of the kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"

namespace skv::bindings {

struct PagedAttentionArgs {
  const at::Tensor& q;
  const at::Tensor& k_pool;
  const at::Tensor& v_pool;
  const at::Tensor& page_table;
  const at::Tensor& seq_lens;
  const at::Tensor& query_offsets;
  double scale;
  int64_t sliding_window;
  double soft_cap;
  const OptionalTensor& k_scales;
  const OptionalTensor& v_scales;
};

// Everything but the pools (check_pools), the head dimensions that are built, and values in memory.
inline void check_paged_attention(const OpCheck& check, const PagedAttentionArgs& args,
                                  const KvLayout& layout, DtypeList query_dtypes) {
  check("q", args.q)
      .dtype(query_dtypes)
      .shape({{"N"}, {"H"}, {"D", layout.head_dim}})
      .last_dim_contiguous();
  TORCH_CHECK_VALUE(layout.num_kv_heads > 0 && args.q.size(1) % layout.num_kv_heads == 0,
                    check.op(),
                    ": q: expected H to be a multiple of the pool's Hk = ", layout.num_kv_heads,
                    ", got ", describe(args.q));
  check_scales(check, "k_scales", args.k_scales, args.k_pool);
  check_scales(check, "v_scales", args.v_scales, args.v_pool);
  const int64_t num_sequences = check_offsets_shape(check, "query_offsets", args.query_offsets);
  check("seq_lens", args.seq_lens).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("page_table", args.page_table)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"M"}})
      .last_dim_contiguous();
  check.value("scale", std::isfinite(args.scale), "a finite number", args.scale);
  check.value("sliding_window", args.sliding_window >= 0, "a number >= 0", args.sliding_window);
  check.value("soft_cap", args.soft_cap >= 0 && std::isfinite(args.soft_cap),
              "a finite number >= 0", args.soft_cap);
}

inline PagedAttentionParams params_of(const PagedAttentionArgs& args, const KvLayout& layout,
                                      const at::Tensor& output) {
  return {
      .query = args.q.const_data_ptr(),
      .k_pool = args.k_pool.const_data_ptr(),
      .v_pool = args.v_pool.const_data_ptr(),
      .k_scales = const_scales(args.k_scales),
      .v_scales = const_scales(args.v_scales),
      .page_table = args.page_table.const_data_ptr<int32_t>(),
      .seq_lens = args.seq_lens.const_data_ptr<int32_t>(),
      .query_offsets = args.query_offsets.const_data_ptr<int32_t>(),
      .output = output.mutable_data_ptr(),
      .layout = layout,
      .activation_dtype = dtype_of(args.q),
      .kv_dtype = dtype_of(args.k_pool),
      .num_sequences = args.seq_lens.numel(),
      .num_rows = args.q.size(0),
      .num_heads = args.q.size(1),
      .max_pages = args.page_table.size(1),
      .query_row_stride = args.q.stride(0),
      .query_head_stride = args.q.stride(1),
      .page_table_row_stride = args.page_table.stride(0),
      .scale = static_cast<float>(args.scale),
      .sliding_window = args.sliding_window,
      .soft_cap = static_cast<float>(args.soft_cap),
  };
}

}  // namespace skv::bindings
