// Writes new keys and values to their slots.
//
// The unit of work is a KV head: it walks the rows in order, so that of rows with the same slot
// the last one stays whatever the number of threads, and consecutive slots are written as one run.
#include <algorithm>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/kv_store.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

}  // namespace

void append_kv(const AppendKvParams& params, ParallelFor parallel_for) {
  const Row key{params.key, params.source_dtype};
  const Row value{params.value, params.source_dtype};
  const int64_t head_dim = params.layout.head_dim;
  auto append_heads = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t row = 0; row < params.num_rows; ++row) {
        if (params.slots[row] < 0) continue;
        const int64_t at = params.layout.slot_offset(params.slots[row], head);
        const int64_t scale_at = params.layout.scale_offset(params.slots[row], head);
        store_vector(key.from(row * params.key_row_stride + head * params.key_head_stride),
                     head_dim, {params.k_pool, params.kv_dtype, at, params.k_scales, scale_at});
        store_vector(value.from(row * params.value_row_stride + head * params.value_head_stride),
                     head_dim, {params.v_pool, params.kv_dtype, at, params.v_scales, scale_at});
      }
    }
  };
  const int64_t elements_per_head = std::max<int64_t>(1, params.num_rows * params.layout.head_dim);
  parallel_for(params.layout.num_kv_heads, 1 + kElementsPerThread / elements_per_head,
               append_heads);
}

}  // namespace skv::cpu::SKV_ISA_NS
