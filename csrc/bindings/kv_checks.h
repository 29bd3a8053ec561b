// Checks shared by the ops that read or write the KV pool, for every device, and the checks of
// slot, position and offset values, for tensors in host memory.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/bindings/checks.h"
#include "csrc/kernels/kv_layout.h"

namespace skv::bindings {

// k_pool and v_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], equal in dtype and shape,
// contiguous.
inline KvLayout check_pools(const OpCheck& check, const at::Tensor& k_pool,
                            const at::Tensor& v_pool) {
  check("k_pool", k_pool).dtype(kKvDtypes).shape({{"P"}, {"Hk"}, {"B"}, {"D"}}).contiguous();
  const KvLayout layout{k_pool.size(0), k_pool.size(1), k_pool.size(2), k_pool.size(3)};
  check("v_pool", v_pool)
      .dtype({k_pool.scalar_type()})
      .shape({{"P", layout.num_pages},
              {"Hk", layout.num_kv_heads},
              {"B", layout.page_size},
              {"D", layout.head_dim}})
      .contiguous();
  check.value("k_pool", layout.page_size > 0 && layout.head_dim > 0, "B > 0 and D > 0", k_pool);
  return layout;
}

// The pools of one layer, or of all layers at once.
struct PoolStack {
  int64_t num_layers;
  KvLayout layout;
};

// k_pool and v_pool: as check_pools, or with a leading dimension: [num_layers, P, Hk, B, D].
inline PoolStack check_pool_stacks(const OpCheck& check, const at::Tensor& k_pool,
                                   const at::Tensor& v_pool) {
  if (k_pool.dim() != 5) return {1, check_pools(check, k_pool, v_pool)};
  check("k_pool", k_pool).dtype(kKvDtypes).contiguous();
  check("v_pool", v_pool)
      .dtype({k_pool.scalar_type()})
      .shape({{"num_layers", k_pool.size(0)},
              {"P", k_pool.size(1)},
              {"Hk", k_pool.size(2)},
              {"B", k_pool.size(3)},
              {"D", k_pool.size(4)}})
      .contiguous();
  return {k_pool.size(0), {k_pool.size(1), k_pool.size(2), k_pool.size(3), k_pool.size(4)}};
}

// The scales of a pool: float32, its shape without D, contiguous, exactly if the pool is int8.
inline void check_scales(const OpCheck& check, const char* name, const OptionalTensor& scales,
                         const at::Tensor& pool) {
  if (pool.scalar_type() != at::kChar) {
    TORCH_CHECK_VALUE(!scales.has_value(), check.op(), ": ", name, ": expected None for pools of ",
                      dtype_name(pool.scalar_type()), ", got ", describe(*scales));
    return;
  }
  TORCH_CHECK_VALUE(scales.has_value(), check.op(), ": ", name,
                    ": expected a float32 tensor for pools of int8, got None");
  const ArgumentCheck argument = check(name, *scales);
  argument.dtype({at::kFloat});
  if (pool.dim() == 5) {
    argument.shape({{"num_layers", pool.size(0)},
                    {"P", pool.size(1)},
                    {"Hk", pool.size(2)},
                    {"B", pool.size(3)}});
  } else {
    argument.shape({{"P", pool.size(0)}, {"Hk", pool.size(1)}, {"B", pool.size(2)}});
  }
  argument.contiguous();
}

// The same for both pools, where the scales will be written.
inline void check_written_scales(const OpCheck& check, const OptionalTensor& k_scales,
                                 const OptionalTensor& v_scales, const at::Tensor& k_pool,
                                 const at::Tensor& v_pool) {
  check_scales(check, "k_scales", k_scales, k_pool);
  check_scales(check, "v_scales", v_scales, v_pool);
  if (!k_scales.has_value()) return;
  check.own_memory("v_scales", *v_scales, "k_scales", *k_scales);
  check.own_memory("k_scales", *k_scales, "k_pool", k_pool);
  check.own_memory("k_scales", *k_scales, "v_pool", v_pool);
  check.own_memory("v_scales", *v_scales, "k_pool", k_pool);
  check.own_memory("v_scales", *v_scales, "v_pool", v_pool);
}

inline const float* const_scales(const OptionalTensor& scales) {
  return scales.has_value() ? scales->const_data_ptr<float>() : nullptr;
}
inline float* mutable_scales(const OptionalTensor& scales) {
  return scales.has_value() ? scales->mutable_data_ptr<float>() : nullptr;
}

// k or v of the new tokens: [N, Hk, D], rows and heads may be strided.
inline void check_new_rows(const OpCheck& check, const char* name, const at::Tensor& rows,
                           DtypeList dtypes, int64_t num_rows, const KvLayout& layout) {
  check(name, rows)
      .dtype(dtypes)
      .shape({{"N", num_rows}, {"Hk", layout.num_kv_heads}, {"D", layout.head_dim}})
      .last_dim_contiguous();
}

// Host memory only. slots: int64[N], each -1 or in [0, P * B).
inline void check_slot_values(const OpCheck& check, const int64_t* values, int64_t num_rows,
                              const KvLayout& layout) {
  for (int64_t i = 0; i < num_rows; ++i) {
    TORCH_CHECK_VALUE(values[i] >= -1 && values[i] < layout.num_slots(), check.op(),
                      ": slots: expected -1 or a slot in [0, P * B = ", layout.num_slots(),
                      "), got ", values[i], " at index ", i);
  }
}

inline void check_slot_values(const OpCheck& check, const at::Tensor& slots,
                              const KvLayout& layout) {
  check_slot_values(check, slots.const_data_ptr<int64_t>(), slots.numel(), layout);
}

// Host memory only. offsets: int32[S + 1] from 0, ascending, to at most `num_rows`: the rows behind
// the last one belong to no sequence.
inline void check_row_offsets(const OpCheck& check, const char* name, const int32_t* values,
                              int64_t last, int64_t num_rows, const char* counted = "rows") {
  TORCH_CHECK_VALUE(values[0] == 0, check.op(), ": ", name, ": expected offsets that start at 0, ",
                    "got ", values[0]);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(values[i] <= values[i + 1], check.op(), ": ", name,
                      ": expected ascending offsets, got ", values[i], " before ", values[i + 1],
                      " at index ", i);
  }
  TORCH_CHECK_VALUE(values[last] <= num_rows, check.op(), ": ", name,
                    ": expected offsets up to the number of ", counted, " = ", num_rows, ", got ",
                    values[last]);
}

inline void check_row_offsets(const OpCheck& check, const char* name, const at::Tensor& offsets,
                              int64_t num_rows, const char* counted = "rows") {
  check_row_offsets(check, name, offsets.const_data_ptr<int32_t>(), offsets.numel() - 1, num_rows,
                    counted);
}

// The same, up to exactly `total`, the number of `counted`.
inline void check_offset_values(const OpCheck& check, const char* name, const at::Tensor& offsets,
                                int64_t total, const char* counted = "rows") {
  check_row_offsets(check, name, offsets, total, counted);
  const int32_t last = offsets.const_data_ptr<int32_t>()[offsets.numel() - 1];
  TORCH_CHECK_VALUE(last == total, check.op(), ": ", name,
                    ": expected offsets that end at the number of ", counted, " = ", total,
                    ", got ", last);
}

// int32[S + 1] with at least one element, contiguous; returns S, or what `symbol` names.
inline int64_t check_offsets_shape(const OpCheck& check, const char* name,
                                   const at::Tensor& offsets, const std::string& symbol = "S") {
  const std::string size = symbol + " + 1";
  check(name, offsets).dtype({at::kInt}).shape({{size.c_str()}}).contiguous();
  check.value(name, offsets.numel() > 0, "shape [" + size + "] with " + symbol + " >= 0", offsets);
  return offsets.numel() - 1;
}

// Host memory only. positions: int32[N], each in [0, num_positions).
inline void check_positions(const OpCheck& check, const int32_t* values, int64_t num_rows,
                            int64_t num_positions) {
  for (int64_t i = 0; i < num_rows; ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < num_positions, check.op(),
                      ": positions: expected positions in [0, rows of cos_sin = ", num_positions,
                      "), got ", values[i], " at index ", i);
  }
}

inline void check_positions(const OpCheck& check, const at::Tensor& positions,
                            int64_t num_positions) {
  check_positions(check, positions.const_data_ptr<int32_t>(), positions.numel(), num_positions);
}

// The head dimensions that attention on the CPU is built for.
inline void check_attention_head_dim(const OpCheck& check, const KvLayout& layout) {
  check.value("k_pool", layout.head_dim % 16 == 0 && layout.head_dim <= 256,
              "a head dimension D that is a multiple of 16 and at most 256", layout.head_dim);
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

}  // namespace skv::bindings
