// The arguments of paged_attention and shared_prefix_attention: checks of shapes and dtypes that
// hold on every device and for tracing, checks of values for tensors in host memory, the output,
// and the parameters of the kernel.
#pragma once

#include <cstdint>

#include "csrc/ops/checks.h"
#include "csrc/ops/kv/checks.h"
#include "csrc/ops/offsets.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

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

// Everything but values in memory, and what one device alone wants.
inline void check_paged_attention(const OpCheck& check, const PagedAttentionArgs& args) {
  check_pools(check, args.k_pool, args.v_pool);
  const c10::SymInt num_kv_heads = args.k_pool.sym_size(1);
  const c10::SymInt head_dim = args.k_pool.sym_size(3);
  check("q", args.q)
      .dtype(kFloatDtypes)
      .shape({{"N"}, {"H"}, {"D", head_dim}})
      .last_dim_contiguous();
  TORCH_CHECK_VALUE(num_kv_heads > 0 && args.q.sym_size(1) % num_kv_heads == 0, check.op(),
                    ": q: expected H to be a multiple of the pool's Hk = ", num_kv_heads, ", got ",
                    describe(args.q));
  check.value("k_pool", head_dim % 16 == 0 && head_dim <= 256,
              "a head dimension D that is a multiple of 16 and at most 256", head_dim);
  check_scales(check, "k_scales", args.k_scales, args.k_pool);
  check_scales(check, "v_scales", args.v_scales, args.v_pool);
  const c10::SymInt num_sequences = check_offsets_shape(check, "query_offsets", args.query_offsets);
  check("seq_lens", args.seq_lens).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("page_table", args.page_table)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"M"}})
      .last_dim_contiguous();
  check.float32("scale", args.scale, /*may_be_negative=*/true);
  check.value("sliding_window", args.sliding_window >= 0, "a number >= 0", args.sliding_window);
  check.float32("soft_cap", args.soft_cap);
}

inline PagedAttentionParams params_of(const PagedAttentionArgs& args, const at::Tensor& output) {
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
      .layout = layout_of(args.k_pool),
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

struct SharedPrefixArgs {
  const at::Tensor& group_offsets;
  const at::Tensor& prefix_lens;
};

inline void check_shared_prefixes(const OpCheck& check, const SharedPrefixArgs& args) {
  const c10::SymInt num_groups =
      check_offsets_shape(check, "group_offsets", args.group_offsets, "G");
  check("prefix_lens", args.prefix_lens).dtype({at::kInt}).shape({{"G", num_groups}}).contiguous();
}

// What holds on every device. prefixes: of shared_prefix_attention, else null.
inline void check_attention(const OpCheck& check, const PagedAttentionArgs& args,
                            const SharedPrefixArgs* prefixes) {
  check_paged_attention(check, args);
  if (prefixes != nullptr) check_shared_prefixes(check, *prefixes);
}

inline at::Tensor empty_attention_output(const PagedAttentionArgs& args) {
  const at::Tensor& q = args.q;
  return empty_tensor({q.sym_size(0), q.sym_size(1), q.sym_size(2)}, q.scalar_type(), q);
}

inline SharedPrefixes prefixes_of(const SharedPrefixArgs& args) {
  return {
      .group_offsets = args.group_offsets.const_data_ptr<int32_t>(),
      .prefix_lens = args.prefix_lens.const_data_ptr<int32_t>(),
      .num_groups = args.prefix_lens.numel(),
  };
}

// Lengths and pages of the sequences of a batch, in host memory.
struct SequenceValues {
  const int32_t* pages;          // [S, M]
  const int32_t* lengths;        // [S]
  const int32_t* query_offsets;  // [S + 1]
  int64_t num_sequences;         // S
  int64_t max_pages;             // M
  int64_t page_row_stride;
};

// Host memory only. The lengths fit the rows of the batch and the page table, and the pages that
// will be read exist.
inline void check_sequences(const OpCheck& check, const SequenceValues& values,
                            const KvLayout& layout) {
  const int32_t* offsets = values.query_offsets;
  const int64_t capacity = values.max_pages * layout.page_size;
  for (int64_t sequence = 0; sequence < values.num_sequences; ++sequence) {
    const int64_t length = values.lengths[sequence];
    const int64_t num_rows = offsets[sequence + 1] - offsets[sequence];
    TORCH_CHECK_VALUE(length >= num_rows, check.op(), ": seq_lens: expected at least the ",
                      num_rows, " new rows of sequence ", sequence, ", got ", length);
    TORCH_CHECK_VALUE(length <= capacity, check.op(),
                      ": seq_lens: expected at most M * B = ", capacity, ", got ", length,
                      " for sequence ", sequence);
    const int64_t num_pages = (length + layout.page_size - 1) / layout.page_size;
    const int32_t* row = values.pages + sequence * values.page_row_stride;
    for (int64_t i = 0; i < num_pages; ++i) {
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < layout.num_pages, check.op(),
                        ": page_table: expected page ids in [0, P = ", layout.num_pages, "), got ",
                        row[i], " at [", sequence, ", ", i, "]");
    }
  }
}

inline void check_sequences(const OpCheck& check, const at::Tensor& page_table,
                            const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                            const KvLayout& layout) {
  check_sequences(check,
                  {page_table.const_data_ptr<int32_t>(), seq_lens.const_data_ptr<int32_t>(),
                   query_offsets.const_data_ptr<int32_t>(), seq_lens.numel(), page_table.size(1),
                   page_table.stride(0)},
                  layout);
}

// Host memory only, after check_sequences. The groups cover all sequences, and those of a group
// begin with the same pages.
inline void check_prefix_values(const OpCheck& check, const SharedPrefixArgs& args,
                                const at::Tensor& page_table, const at::Tensor& seq_lens,
                                const KvLayout& layout) {
  check_offset_values(check, "group_offsets", args.group_offsets, seq_lens.numel(), "sequences");
  const int32_t* offsets = args.group_offsets.const_data_ptr<int32_t>();
  const int32_t* prefixes = args.prefix_lens.const_data_ptr<int32_t>();
  const int32_t* lengths = seq_lens.const_data_ptr<int32_t>();
  const int32_t* pages = page_table.const_data_ptr<int32_t>();
  for (int64_t group = 0; group < args.prefix_lens.numel(); ++group) {
    TORCH_CHECK_VALUE(prefixes[group] >= 0, check.op(),
                      ": prefix_lens: expected lengths >= 0, got ", prefixes[group], " at index ",
                      group);
    const int64_t num_pages = (prefixes[group] + layout.page_size - 1) / layout.page_size;
    const int64_t first = offsets[group];
    for (int64_t sequence = first; sequence < offsets[group + 1]; ++sequence) {
      TORCH_CHECK_VALUE(prefixes[group] <= lengths[sequence], check.op(),
                        ": prefix_lens: expected at most the length of each sequence of the "
                        "group, got ",
                        prefixes[group], " at index ", group, " for sequence ", sequence,
                        " of length ", lengths[sequence]);
      for (int64_t i = 0; i < num_pages; ++i) {
        const int32_t expected = pages[first * page_table.stride(0) + i];
        const int32_t got = pages[sequence * page_table.stride(0) + i];
        TORCH_CHECK_VALUE(got == expected, check.op(),
                          ": page_table: expected the pages of a "
                          "shared prefix to be those of the group's first sequence, ",
                          expected, " here, got ", got, " at [", sequence, ", ", i, "]");
      }
    }
  }
}

// Host memory only: all values of a call.
inline void check_attention_values(const OpCheck& check, const PagedAttentionArgs& args,
                                   const SharedPrefixArgs* prefixes) {
  const KvLayout layout = layout_of(args.k_pool);
  check_row_offsets(check, "query_offsets", args.query_offsets, args.q.size(0));
  check_sequences(check, args.page_table, args.seq_lens, args.query_offsets, layout);
  if (prefixes == nullptr) return;
  check_prefix_values(check, *prefixes, args.page_table, args.seq_lens, layout);
}

}  // namespace skv::ops
