// The work of one tile of query vectors: chunk results, their fold, the output. See attention.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "csrc/kernels/cpu/isa/fma_tile.h"
#include "csrc/kernels/cpu/isa/kv_store.h"
#include "csrc/kernels/cpu/isa/turn_keys.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

namespace {

constexpr int64_t kChunk = 256;      // positions; fixed, part of the numerics
constexpr int64_t kMaxQueries = 48;  // query vectors of a tile: scores stay in the L2 cache
constexpr int64_t kMaxHeadDim = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Query vectors [first, first + count) of (sequence, KV head), numbered row * group + head.
struct Tile {
  int64_t sequence;
  int64_t kv_head;
  int64_t first;
  int64_t count;
};

// The keys a query vector sees: positions [begin, end).
struct Visible {
  int64_t begin;
  int64_t end;
};

// Result of one chunk or of a fold: maximum, sum of weights, weighted sum of values.
struct State {
  float* max;     // [count]
  float* sum;     // [count]
  float* values;  // [count, D]

  static int64_t num_floats(int64_t count, int64_t head_dim) { return count * (2 + head_dim); }
  static State in(float* memory, int64_t count) {
    return {memory, memory + count, memory + 2 * count};
  }
};

// Of an int8 chunk: the scale of each key and of each value.
struct ChunkScales {
  alignas(64) float keys[kChunk];
  alignas(64) float values[kChunk];
};

template <typename Load>
constexpr bool kIsQuantized = std::is_same_v<Load, LoadInt8>;

constexpr int64_t kMaxStateFloats = kMaxQueries * (2 + kMaxHeadDim);

class TileWork {
 public:
  TileWork(const PagedAttentionParams& p, const Tile& tile)
      : p_(p),
        tile_(tile),
        group_(p.num_heads / p.layout.num_kv_heads),
        head_dim_(p.layout.head_dim),
        first_row_(p.query_offsets[tile.sequence]) {
    const int64_t num_rows = p.query_offsets[tile.sequence + 1] - first_row_;
    const int64_t first_position = p.seq_lens[tile.sequence] - num_rows;
    begin_ = std::numeric_limits<int64_t>::max();
    end_ = 0;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t position = first_position + (tile.first + i) / group_;
      const int64_t begin =
          p.sliding_window > 0 ? std::max<int64_t>(0, position + 1 - p.sliding_window) : 0;
      visible_[i] = {begin, position + 1};
      begin_ = std::min(begin_, begin);
      end_ = std::max(end_, position + 1);
      query_vector(i).copy_to(query_ + i * head_dim_, head_dim_);
    }
  }

  int64_t first_chunk() const { return begin_ / kChunk; }
  int64_t end_chunk() const { return (end_ + kChunk - 1) / kChunk; }

  // The walk that fetches the keys and values of chunks [first, end) while they are worked on.
  ReadAhead read_ahead(int64_t first, int64_t end) const {
    return {p_,
            tile_.sequence,
            tile_.kv_head,
            element_size(p_.kv_dtype),
            kChunk,
            std::max(begin_, first * kChunk),
            std::min(end_, end * kChunk),
            kKeyBlock};
  }

  // Chunk result of every query vector; max is -infinity where no key of the chunk is visible.
  void run_chunk(int64_t chunk, const State& state, ReadAhead& ahead) const {
    switch (p_.kv_dtype) {
      case DType::kFloat32:
        return run_chunk_as<LoadFloat32>(chunk, state, ahead);
      case DType::kFloat16:
        return run_chunk_as<LoadFloat16>(chunk, state, ahead);
      case DType::kBFloat16:
        return run_chunk_as<LoadBFloat16>(chunk, state, ahead);
      case DType::kInt8:
        return run_chunk_as<LoadInt8>(chunk, state, ahead);
    }
  }

  // state <- state joined with the next chunk to the right.
  void fold(const State& state, const State& next) const {
    for (int64_t i = 0; i < tile_.count; ++i) {
      if (visible_in(next, i)) fold_one(state, next, i);
    }
  }

  void write_output(const State& state) const {
    for (int64_t i = 0; i < tile_.count; ++i) {
      const Vec sum = Vec::set1(state.sum[i]);
      const int64_t at = ((first_row_ + row_of(i)) * p_.num_heads + head_of(i)) * head_dim_;
      const OutputRow output{p_.output, p_.activation_dtype};
      float wide[kMaxHeadDim];
      float* out = output.place(at, wide);
      for (int64_t d = 0; d < head_dim_; d += Vec::kWidth) {
        (Vec::load(state.values + i * head_dim_ + d) / sum).store(out + d);
      }
      output.finish(out, at, head_dim_);
    }
  }

  static void clear(const State& state, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      state.max[i] = kMinusInfinity;
      state.sum[i] = 0.0F;
    }
  }

 private:
  int64_t row_of(int64_t i) const { return (tile_.first + i) / group_; }
  int64_t head_of(int64_t i) const { return tile_.kv_head * group_ + (tile_.first + i) % group_; }
  Row query_vector(int64_t i) const {
    return Row{p_.query, p_.activation_dtype}.from((first_row_ + row_of(i)) * p_.query_row_stride +
                                                   head_of(i) * p_.query_head_stride);
  }
  // An untouched state has sum 0; a chunk result has sum >= 1 (its largest weight is 1), or NaN.
  static bool visible_in(const State& state, int64_t i) { return state.sum[i] != 0.0F; }

  void fold_one(const State& state, const State& next, int64_t i) const {
    float* to = state.values + i * head_dim_;
    const float* from = next.values + i * head_dim_;
    if (!visible_in(state, i)) {
      state.max[i] = next.max[i];
      state.sum[i] = next.sum[i];
      std::memcpy(to, from, static_cast<size_t>(head_dim_) * sizeof(float));
      return;
    }
    const float max_both = std::max(state.max[i], next.max[i]);
    const Vec keep = exp(Vec::set1(state.max[i] - max_both));
    const Vec add = exp(Vec::set1(next.max[i] - max_both));
    float sum[Vec::kWidth];
    fma(Vec::set1(state.sum[i]), keep, Vec::set1(next.sum[i]) * add).store(sum);
    state.max[i] = max_both;
    state.sum[i] = sum[0];
    for (int64_t d = 0; d < head_dim_; d += Vec::kWidth) {
      fma(Vec::load(to + d), keep, Vec::load(from + d) * add).store(to + d);
    }
  }

  template <typename Load>
  void run_chunk_as(int64_t chunk, const State& state, ReadAhead& ahead) const {
    const int64_t start = chunk * kChunk;
    // Keys that some query vector of the tile sees; no other slot is read.
    const int64_t begin = std::max(begin_, start);
    const int64_t end = std::min(end_, start + kChunk);
    alignas(64) float scores[kMaxQueries * kChunk];
    score_keys<Load>(start, begin, end, scores, ahead);
    ChunkScales scales;
    if constexpr (kIsQuantized<Load>) {
      find_scales(p_.k_scales, start, begin, end, scales.keys);
      find_scales(p_.v_scales, start, begin, end, scales.values);
    }
    for (int64_t i = 0; i < tile_.count; ++i) {
      softmax_weights<kIsQuantized<Load>>(
          scores + i * kChunk, scales, std::max(visible_[i].begin, start) - start,
          std::min(visible_[i].end, start + kChunk) - start, state.max[i], state.sum[i]);
    }
    sum_values<Load>(start, begin, end, scores, state.values, ahead);
  }

  template <typename Load>
  const typename Load::Element* vector_at(const void* pool, int64_t position) const {
    const int64_t page_size = p_.layout.page_size;
    const int32_t* pages = p_.page_table + tile_.sequence * p_.page_table_row_stride;
    return static_cast<const typename Load::Element*>(pool) +
           p_.layout.vector_offset(pages[position / page_size], tile_.kv_head,
                                   position % page_size);
  }

  // scores[i, key - start] = query i . key, each a chain over d. Keys in lanes: a block of K is
  // turned around once and used by all query vectors.
  template <typename Load>
  void score_keys(int64_t start, int64_t begin, int64_t end, float* scores,
                  ReadAhead& ahead) const {
    using Element = typename Load::Element;
    alignas(64) Element panel[kMaxHeadDim * kKeyBlock];  // [D, kKeyBlock]
    const Element* keys[kKeyBlock];
    for (int64_t block = (begin - start) / kKeyBlock * kKeyBlock; start + block < end;
         block += kKeyBlock) {
      find_keys<Load>(start + block, begin, end, keys);
      for (int64_t i = 0; i < kKeyBlock; i += kTurnedKeys) {
        turn_keys(keys + i, head_dim_, panel + i, PacedReadAhead<2>(ahead));
      }
      const FmaTile tile{.x = query_,
                         .x_row_stride = head_dim_,
                         .panel_stride = kKeyBlock,
                         .out = scores + block,
                         .out_row_stride = kChunk,
                         .length = head_dim_,
                         .resume = false};
      if (tile_.count <= kFmaTileRows) {
        run_fma<Load>(tile, panel, tile_.count, kKeyBlock, PacedReadAhead<2>(ahead));
      } else {
        score_widened<Load>(tile, panel, ahead);
      }
    }
  }

  // The same for many query vectors: the panel is converted once, a strip of columns at a time.
  template <typename Load>
  void score_widened(FmaTile tile, const typename Load::Element* panel, ReadAhead& ahead) const {
    constexpr int64_t kWidened = sizeof(float) / sizeof(typename Load::Element);
    constexpr int64_t kStrip = fma_tile_vecs(kFmaTileRows) * Vec::kWidth;
    alignas(64) float strip[kMaxHeadDim * kStrip];
    tile.panel_stride = kStrip;
    for (int64_t column = 0; column < kKeyBlock; column += kStrip) {
      for (int64_t d = 0; d < head_dim_; ++d) {
#pragma GCC unroll 4
        for (int64_t c = 0; c < kStrip; c += Vec::kWidth) {
          Load::load(panel + d * kKeyBlock + column + c).store(strip + d * kStrip + c);
        }
      }
      run_fma<LoadFloat32>(tile, strip, tile_.count, kStrip, PacedReadAhead<2 * kWidened>(ahead));
      tile.out += kStrip;
    }
  }

  // Where the keys of a block are; zeros stand for those outside [begin, end).
  template <typename Load>
  void find_keys(int64_t first, int64_t begin, int64_t end,
                 const typename Load::Element** keys) const {
    alignas(64) static constexpr typename Load::Element kZeros[kMaxHeadDim] = {};
    const int64_t page_size = p_.layout.page_size;
    for (int64_t i = 0; i < kKeyBlock;) {
      const int64_t position = first + i;
      if (position < begin || position >= end) {
        keys[i++] = kZeros;
        continue;
      }
      const int64_t run =
          std::min(page_size - position % page_size, std::min(end - position, kKeyBlock - i));
      const typename Load::Element* key = vector_at<Load>(p_.k_pool, position);
      for (int64_t j = 0; j < run; ++j) keys[i++] = key + j * head_dim_;
    }
  }

  // Scales of the chunk's vectors; 0 where no query vector of the tile looks.
  void find_scales(const float* scales, int64_t start, int64_t begin, int64_t end,
                   float* found) const {
    std::fill_n(found, kChunk, 0.0F);
    const int64_t page_size = p_.layout.page_size;
    const int32_t* pages = p_.page_table + tile_.sequence * p_.page_table_row_stride;
    for (int64_t position = begin; position < end;) {
      const int64_t run = std::min(page_size - position % page_size, end - position);
      const int64_t slot = pages[position / page_size] * page_size + position % page_size;
      std::memcpy(found + (position - start), scales + p_.layout.scale_offset(slot, tile_.kv_head),
                  static_cast<size_t>(run) * sizeof(float));
      position += run;
    }
  }

  // scores -> weights exp(score - max) in place, exactly 0 outside [begin, end) of the chunk. The
  // scale of a quantized key is a factor of its score, that of a value is left in its weight.
  template <bool kHasScales>
  void softmax_weights(float* scores, const ChunkScales& scales, int64_t begin, int64_t end,
                       float& max_score, float& sum) const {
    max_score = kMinusInfinity;
    sum = 0.0F;
    if (begin >= end) return;
    const int64_t first = begin / Vec::kWidth * Vec::kWidth;
    const int64_t last = (end + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
    const Vec scale = Vec::set1(p_.scale);
    for (int64_t i = first; i < last; i += Vec::kWidth) {
      Vec score = Vec::load(scores + i);
      if constexpr (kHasScales) score = score * Vec::load(scales.keys + i);
      score = score * scale;
      if (p_.soft_cap > 0.0F) {
        const Vec cap = Vec::set1(p_.soft_cap);
        score = cap * tanh(score / cap);
      }
      score.store(scores + i);
    }
    for (int64_t i = first; i < begin; ++i) scores[i] = kMinusInfinity;
    for (int64_t i = end; i < last; ++i) scores[i] = kMinusInfinity;
    Vec largest = Vec::set1(kMinusInfinity);
    for (int64_t i = first; i < last; i += Vec::kWidth) {
      largest = max(Vec::load(scores + i), largest);
    }
    max_score = reduce_max(largest);
    const Vec shift = Vec::set1(max_score);
    Vec total = Vec::zero();
    for (int64_t i = first; i < last; i += Vec::kWidth) {
      const Vec weight = exp(Vec::load(scores + i) - shift);
      total = total + weight;
      if constexpr (kHasScales) {
        (weight * Vec::load(scales.values + i)).store(scores + i);
      } else {
        weight.store(scores + i);
      }
    }
    sum = reduce_add(total);
  }

  // values[i] = sum of weight * V, ascending positions. Keys that all query vectors see run as one
  // tile; before and after them each vector takes only its own keys, so that a masked V is never
  // multiplied (0 * infinity would not be 0).
  template <typename Load>
  void sum_values(int64_t start, int64_t begin, int64_t end, const float* weights, float* values,
                  ReadAhead& ahead) const {
    int64_t common_begin = begin;
    int64_t common_end = end;
    for (int64_t i = 0; i < tile_.count; ++i) {
      common_begin = std::max(common_begin, visible_[i].begin);
      common_end = std::min(common_end, visible_[i].end);
    }
    std::memset(values, 0, static_cast<size_t>(tile_.count * head_dim_) * sizeof(float));
    if (common_begin >= common_end) {
      for (int64_t i = 0; i < tile_.count; ++i) {
        add_values<Load>(start, std::max(begin, visible_[i].begin), std::min(end, visible_[i].end),
                         i, 1, weights, values, NoReadAhead{});
      }
      return;
    }
    for (int64_t i = 0; i < tile_.count; ++i) {
      add_values<Load>(start, std::max(begin, visible_[i].begin), common_begin, i, 1, weights,
                       values, NoReadAhead{});
    }
    add_values<Load>(start, common_begin, common_end, 0, tile_.count, weights, values,
                     PacedReadAhead<1>(ahead));
    for (int64_t i = 0; i < tile_.count; ++i) {
      add_values<Load>(start, common_end, std::min(end, visible_[i].end), i, 1, weights, values,
                       NoReadAhead{});
    }
  }

  template <typename Load, typename Ahead>
  void add_values(int64_t start, int64_t begin, int64_t end, int64_t first, int64_t count,
                  const float* weights, float* values, Ahead ahead) const {
    const int64_t page_size = p_.layout.page_size;
    for (int64_t position = begin; position < end;) {
      const int64_t run = std::min(page_size - position % page_size, end - position);
      run_fma<Load>({.x = weights + first * kChunk + (position - start),
                     .x_row_stride = kChunk,
                     .panel_stride = head_dim_,
                     .out = values + first * head_dim_,
                     .out_row_stride = head_dim_,
                     .length = run,
                     .resume = true},
                    vector_at<Load>(p_.v_pool, position), count, head_dim_, ahead);
      position += run;
    }
  }

  const PagedAttentionParams& p_;
  const Tile tile_;
  const int64_t group_;
  const int64_t head_dim_;
  const int64_t first_row_;
  int64_t begin_;  // smallest and one past the largest key position seen in the tile
  int64_t end_;
  Visible visible_[kMaxQueries];
  alignas(64) float query_[kMaxQueries * kMaxHeadDim];  // [count, D]
};

}  // namespace

}  // namespace skv::cpu::SKV_ISA_NS
