// Checks shared by the ops that read or write the KV pool, for every device and for tracing, the
// layout of checked pools, and the checks of slot and position values, for tensors in host memory.
#pragma once

#include <cstdint>

#include "csrc/kernels/kv_layout.h"
#include "csrc/ops/checks.h"

namespace skv::ops {

// k_pool and v_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], equal in dtype and shape,
// contiguous.
inline void check_pools(const OpCheck& check, const at::Tensor& k_pool, const at::Tensor& v_pool) {
  check("k_pool", k_pool).dtype(kKvDtypes).shape({{"P"}, {"Hk"}, {"B"}, {"D"}}).contiguous();
  check("v_pool", v_pool)
      .dtype({k_pool.scalar_type()})
      .shape({{"P", k_pool.sym_size(0)},
              {"Hk", k_pool.sym_size(1)},
              {"B", k_pool.sym_size(2)},
              {"D", k_pool.sym_size(3)}})
      .contiguous();
  check.value("k_pool", k_pool.sym_size(2) > 0 && k_pool.sym_size(3) > 0, "B > 0 and D > 0",
              k_pool);
}

// Of a pool [P, Hk, B, D], or of one with a leading dimension.
inline KvLayout layout_of(const at::Tensor& pool) {
  return {pool.size(-4), pool.size(-3), pool.size(-2), pool.size(-1)};
}

// k_pool and v_pool: as check_pools, or with a leading dimension: [num_layers, P, Hk, B, D].
inline void check_pool_stacks(const OpCheck& check, const at::Tensor& k_pool,
                              const at::Tensor& v_pool) {
  if (k_pool.dim() != 5) return check_pools(check, k_pool, v_pool);
  check("k_pool", k_pool).dtype(kKvDtypes).contiguous();
  check("v_pool", v_pool)
      .dtype({k_pool.scalar_type()})
      .shape({{"num_layers", k_pool.sym_size(0)},
              {"P", k_pool.sym_size(1)},
              {"Hk", k_pool.sym_size(2)},
              {"B", k_pool.sym_size(3)},
              {"D", k_pool.sym_size(4)}})
      .contiguous();
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
    argument.shape({{"num_layers", pool.sym_size(0)},
                    {"P", pool.sym_size(1)},
                    {"Hk", pool.sym_size(2)},
                    {"B", pool.sym_size(3)}});
  } else {
    argument.shape({{"P", pool.sym_size(0)}, {"Hk", pool.sym_size(1)}, {"B", pool.sym_size(2)}});
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

// k or v of the new tokens: [N, Hk, D] for N slots, rows and heads may be strided.
inline void check_new_rows(const OpCheck& check, const char* name, const at::Tensor& rows,
                           DtypeList dtypes, const at::Tensor& slots, const at::Tensor& pool) {
  check(name, rows)
      .dtype(dtypes)
      .shape({{"N", slots.sym_size(0)}, {"Hk", pool.sym_size(1)}, {"D", pool.sym_size(3)}})
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

}  // namespace skv::ops
