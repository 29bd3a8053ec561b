// Parameters of the large kernels, plain data for CPU and CUDA alike. Symbols: S sequences,
// N new tokens (ragged), H query heads, Hk KV heads, D head dim, P pages, B page_size, M max pages.
#pragma once

#include <cstdint>

#include "csrc/kernels/kv_layout.h"

namespace skv {

// kInt8: elements of KV pools only; a vector has one float32 scale, x = element * scale.
enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt8 };

struct PagedAttentionParams {
  const void* query;             // [N, H, D], activation dtype, D contiguous
  const void* k_pool;            // [P, Hk, B, D], NaN allowed outside live slots
  const void* v_pool;            // [P, Hk, B, D], NaN allowed outside live slots
  const float* k_scales;         // [P, Hk, B] for int8, else null; NaN allowed outside live slots
  const float* v_scales;         // [P, Hk, B] for int8, else null
  const int32_t* page_table;     // [S, M], entries past ceil(seq_len/B) are never read
  const int32_t* seq_lens;       // [S], KV length including this step's rows
  const int32_t* query_offsets;  // [S + 1], rows of sequence s are [offsets[s], offsets[s+1])
  void* output;                  // [N, H, D], contiguous, activation dtype
  KvLayout layout;
  DType activation_dtype;
  DType kv_dtype;
  int64_t num_sequences;          // S
  int64_t num_rows;               // N
  int64_t num_heads;              // H, a multiple of Hk
  int64_t max_pages;              // M
  int64_t query_row_stride;       // elements between rows of query
  int64_t query_head_stride;      // elements between heads of query
  int64_t page_table_row_stride;  // elements between rows of page_table
  float scale;
  int64_t sliding_window;  // keys with position > row - window are seen; 0 = all
  float soft_cap;          // c > 0: score = c * tanh(score / c), after scale; 0 = off
};

// Groups of neighbouring sequences that begin with the same tokens on the same pages.
struct SharedPrefixes {
  const int32_t* group_offsets;  // [G + 1], sequences of group j are [offsets[j], offsets[j+1]);
                                 // null: nothing is known of shared tokens
  const int32_t* prefix_lens;    // [G], tokens that all sequences of the group have in common
  int64_t num_groups;            // G
};

enum class WeightFormat : int32_t { kFloat32, kInt8, kInt4 };

// Columns of a weight panel: all formats keep 16 output columns together.
inline constexpr int64_t kPanelColumns = 16;
// Weights that share one scale (and minimum) along K.
inline constexpr int64_t kGroupSize = 32;

struct QuantizedLinearParams {
  const void* input;        // [N, K], activation_dtype, K contiguous
  const void* weight;       // fp32 [Np, K, 16] | int8 [Np, K, 16] | uint8 [Np, K/2, 16]
  const float* scales;      // [Np, K/32, 16], null for fp32
  const float* minimums;    // [Np, K/32, 16], 4-bit only
  const void* bias;         // [out], bias_dtype, or null
  const void* residual;     // [N, out], activation_dtype, contiguous, or null; added last
  const void* norm_weight;  // [K], norm_weight_dtype, or null; then the input is normalised by its
                            // RMS first
  float* float_input;       // [N, K], contiguous, scratch for the input normalised or widened; null
                            // if it is float32 and there is no norm_weight
  float* sums;              // [N, out], contiguous; the output unless there is one of those below
  void* activated;          // [N, out/2], activation_dtype, contiguous, or null; silu(gate) * up of
                            // the sums, where even panels of columns are gates and odd ones what
                            // they multiply
  WeightFormat format;
  int64_t num_rows;          // N
  int64_t in_features;       // K
  int64_t out_features;      // out; Np = ceil(out / 16)
  int64_t input_row_stride;  // elements between rows of input
  float norm_epsilon;
  // [N, out], activation_dtype, contiguous, or null; the sums rounded to it
  void* rounded = nullptr;
  DType activation_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  DType norm_weight_dtype = DType::kFloat32;
};

// Most parts that the columns are cut into for threads, and rows that go through them together.
inline constexpr int64_t kTopKParts = 128;
inline constexpr int64_t kTopKBlockRows = 48;
inline constexpr int64_t kMaxTopK = 64;

struct LinearTopKParams {
  QuantizedLinearParams linear;  // without residual, sums, activated and rounded
  int64_t k;                     // 1 <= k <= kMaxTopK, k <= out
  int64_t* ids;          // [N, k], columns of the largest outputs: largest first, NaN before every
                         // number, of equals the lowest column first
  float* values;         // [N, k], those outputs
  float* part_values;    // [kTopKParts, Rb, k], scratch; Rb = min(N, kTopKBlockRows)
  int64_t* part_ids;     // [kTopKParts, Rb, k], scratch
  int64_t* part_counts;  // [kTopKParts, Rb], scratch
};

}  // namespace skv
