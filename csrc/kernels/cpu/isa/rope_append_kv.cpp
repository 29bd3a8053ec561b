// Rotates queries in place, and keys on their way into the pool; writes values beside them.
//
// Pairs are (i, i + D/2). The rotation uses plain products and one sum, no fused operation, so its
// bits are the same on every instruction set. The unit of work is a head (query heads first, then
// KV heads), which walks the rows in order for the reason given in append_kv.cpp.
#include <algorithm>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/kv_store.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;
// Pairs rotated at a time on the way to the pool; they stay in the first-level cache.
constexpr int64_t kChunk = 64;

// Rotates `count` pairs. The targets may be the sources.
SKV_INLINE void rotate(const float* low, const float* high, const float* cosine, const float* sine,
                       float* low_target, float* high_target, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    const Vec a = Vec::load(low + i);
    const Vec b = Vec::load(high + i);
    const Vec c = Vec::load(cosine + i);
    const Vec s = Vec::load(sine + i);
    (a * c - b * s).store(low_target + i);
    (b * c + a * s).store(high_target + i);
  }
  for (; i < count; ++i) {
    const float a = low[i];
    const float b = high[i];
    low_target[i] = a * cosine[i] - b * sine[i];
    high_target[i] = b * cosine[i] + a * sine[i];
  }
}

void rotate_query_head(const RopeAppendKvParams& params, int64_t head) {
  const int64_t head_dim = params.layout.head_dim;
  const int64_t half = head_dim / 2;
  const int64_t size = element_size(params.activation_dtype);
  float wide[2][kRunLength];
  for (int64_t row = 0; row < params.num_rows; ++row) {
    const float* cosine = params.cos_sin + params.positions[row] * head_dim;
    const int64_t start = row * params.query_row_stride + head * params.query_head_stride;
    const OutputRow query{static_cast<char*>(params.query) + start * size, params.activation_dtype};
    const Row source{query.data, query.dtype};
    for_runs(half, [&](int64_t at, int64_t count) {
      float* low = query.place(at, wide[0]);
      float* high = query.place(half + at, wide[1]);
      rotate(source.from(at).floats(count, low), source.from(half + at).floats(count, high),
             cosine + at, cosine + half + at, low, high, count);
      query.finish(low, at, count);
      query.finish(high, half + at, count);
    });
  }
}

// Calls take(rotated, count, at) for runs of the rotated key.
template <typename Take>
SKV_INLINE void rotate_key(const Row& key, const float* cosine, int64_t half, Take take) {
  float low[kChunk];
  float high[kChunk];
  for (int64_t i = 0; i < half; i += kChunk) {
    const int64_t count = std::min(kChunk, half - i);
    rotate(key.from(i).floats(count, low), key.from(half + i).floats(count, high), cosine + i,
           cosine + half + i, low, high, count);
    take(low, count, i);
    take(high, count, half + i);
  }
}

// The rotated key to its place. Where it is quantized it is rotated twice: its scale comes first.
void write_key(const Row& key, const float* cosine, int64_t head_dim, const PoolVector& target) {
  const int64_t half = head_dim / 2;
  if (target.dtype != DType::kInt8) {
    rotate_key(key, cosine, half, [&](const float* run, int64_t count, int64_t i) {
      store_run(run, count, target.pool, target.dtype, target.at + i);
    });
    return;
  }
  auto* elements = static_cast<int8_t*>(target.pool) + target.at;
  QuantizedVector vector;
  rotate_key(key, cosine, half,
             [&](const float* run, int64_t count, int64_t) { vector.look_at(run, count); });
  rotate_key(key, cosine, half, [&](const float* run, int64_t count, int64_t i) {
    vector.store(run, count, elements + i);
  });
  target.scales[target.scale_at] = vector.scale();
}

void write_kv_head(const RopeAppendKvParams& params, int64_t head) {
  const int64_t head_dim = params.layout.head_dim;
  const Row keys{params.key, params.activation_dtype};
  const Row values{params.value, params.activation_dtype};
  for (int64_t row = 0; row < params.num_rows; ++row) {
    if (params.slots[row] < 0) continue;
    const int64_t at = params.layout.slot_offset(params.slots[row], head);
    const int64_t scale_at = params.layout.scale_offset(params.slots[row], head);
    write_key(keys.from(row * params.key_row_stride + head * params.key_head_stride),
              params.cos_sin + params.positions[row] * head_dim, head_dim,
              {params.k_pool, params.kv_dtype, at, params.k_scales, scale_at});
    store_vector(values.from(row * params.value_row_stride + head * params.value_head_stride),
                 head_dim, {params.v_pool, params.kv_dtype, at, params.v_scales, scale_at});
  }
}

}  // namespace

void rope_append_kv(const RopeAppendKvParams& params, ParallelFor parallel_for) {
  auto work_on_heads = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      if (head < params.num_heads) {
        rotate_query_head(params, head);
      } else {
        write_kv_head(params, head - params.num_heads);
      }
    }
  };
  const int64_t elements_per_head = std::max<int64_t>(1, params.num_rows * params.layout.head_dim);
  parallel_for(params.num_heads + params.layout.num_kv_heads,
               1 + kElementsPerThread / elements_per_head, work_on_heads);
}

}  // namespace skv::cpu::SKV_ISA_NS
