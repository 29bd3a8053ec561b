// Writes new keys and values to their slots.
//
// The unit of work is a KV head: it walks the rows in order, so that of rows with the same slot
// the last one stays whatever the number of threads, and consecutive slots are written as one run.
#include <algorithm>
#include <cstring>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/kv_store.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

SKV_INLINE void append_vector(const AppendKvParams& params, const void* source, int64_t source_at,
                              void* pool, int64_t pool_at, float* scales, int64_t scale_at) {
  if (params.kv_dtype == DType::kInt8) {
    store_quantized(static_cast<const float*>(source) + source_at, params.layout.head_dim,
                    static_cast<int8_t*>(pool) + pool_at, scales + scale_at);
    return;
  }
  if (params.source_dtype == params.kv_dtype) {
    const int64_t size = element_size(params.kv_dtype);
    std::memcpy(static_cast<char*>(pool) + pool_at * size,
                static_cast<const char*>(source) + source_at * size,
                static_cast<size_t>(params.layout.head_dim * size));
    return;
  }
  store_run(static_cast<const float*>(source) + source_at, params.layout.head_dim, pool,
            params.kv_dtype, pool_at);
}

}  // namespace

void append_kv(const AppendKvParams& params, ParallelFor parallel_for) {
  auto append_heads = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t row = 0; row < params.num_rows; ++row) {
        if (params.slots[row] < 0) continue;
        const int64_t pool_at = params.layout.slot_offset(params.slots[row], head);
        const int64_t scale_at = params.layout.scale_offset(params.slots[row], head);
        append_vector(params, params.key,
                      row * params.key_row_stride + head * params.key_head_stride, params.k_pool,
                      pool_at, params.k_scales, scale_at);
        append_vector(params, params.value,
                      row * params.value_row_stride + head * params.value_head_stride,
                      params.v_pool, pool_at, params.v_scales, scale_at);
      }
    }
  };
  const int64_t elements_per_head = std::max<int64_t>(1, params.num_rows * params.layout.head_dim);
  parallel_for(params.layout.num_kv_heads, 1 + kElementsPerThread / elements_per_head,
               append_heads);
}

}  // namespace skv::cpu::SKV_ISA_NS
