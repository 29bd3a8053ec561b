// Parameters of the row-wise and token kernels, plain data for CPU and CUDA alike. Symbols:
// N rows, E features of a row, F half the features of a gate-up row, S sequences, T tokens.
#pragma once

#include <cstdint>

#include "csrc/kernels/params.h"

namespace skv {

// Row r of the input starts at (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride:
// the heads of a fused qkv row are normalised where they are.
struct RmsNormParams {
  const void* input;    // [N, E], activation dtype, E contiguous
  const float* weight;  // [E]
  void* output;         // [N, E], activation dtype, contiguous
  void* residual;       // [N, E], activation dtype, contiguous, or null: the input is added to it,
                        // rounded once to its dtype, and the sum is what is normalised
  DType activation_dtype;
  int64_t num_rows;      // N
  int64_t num_features;  // E
  int64_t inner_rows;    // >= 1
  int64_t inner_stride;  // elements
  int64_t outer_stride;  // elements
  float epsilon;
};

struct SiluMulParams {
  const void* gate_up;  // [N, 2F], activation dtype, the gate in the first F
  void* output;         // [N, F], activation dtype, contiguous
  DType activation_dtype;
  int64_t num_rows;          // N
  int64_t num_features;      // F
  int64_t input_row_stride;  // elements between rows of gate_up
};

struct ArgmaxParams {
  const void* logits;  // [R, V], logits_dtype, V contiguous, V >= 1
  int64_t* ids;        // [R], lowest index of the largest value
  float* values;       // [R], that value; NaN if there is one in the row
  DType logits_dtype;
  int64_t num_rows;    // R
  int64_t vocab_size;  // V
  int64_t row_stride;  // elements between rows of logits
};

struct NgramLookupParams {
  const void* tokens;      // [T], int32 or int64
  const int32_t* offsets;  // [S + 1], tokens of sequence s are [offsets[s], offsets[s+1])
  int32_t* draft_ids;      // [S, max_draft], padded with -1
  int32_t* num_draft;      // [S]
  bool tokens_are_int64;
  int64_t num_sequences;  // S
  int64_t min_match;      // shortest suffix that counts
  int64_t max_match;      // longest suffix looked for
  int64_t max_draft;      // tokens proposed at most
};

struct VerifyDraftParams {
  const void* draft_ids;         // [sum k_s], int32 or int64
  const void* target_ids;        // [sum (k_s + 1)], dtype of draft_ids; row of s: offsets[s] + s
  const int32_t* draft_offsets;  // [S + 1], draft of sequence s is [offsets[s], offsets[s+1])
  int32_t* num_accepted;         // [S], length of the longest agreeing run
  void* bonus_ids;               // [S], dtype of draft_ids, the target after that run
  bool ids_are_int64;
  int64_t num_sequences;  // S
};

}  // namespace skv
