// Parameters of the row-wise and token kernels, plain data for CPU and CUDA alike. Symbols:
// N rows, E features of a row, F half the features of a gate-up row, S sequences, T tokens.
#pragma once

#include <cstdint>

#include "csrc/kernels/params.h"

namespace skv {

// Row r of the input starts at (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride:
// the heads of a fused qkv row are normalised where they are.
struct RmsNormParams {
  const void* input;     // [N, E], activation dtype, E contiguous
  const void* weight;    // [E], weight_dtype
  void* output;          // [N, E], activation dtype, contiguous
  const void* residual;  // [N, E], activation dtype, contiguous, or null; added to the input first
  void* sum;             // [N, E], their sum, rounded once, which is what is normalised; or null
  DType activation_dtype;
  int64_t num_rows;      // N
  int64_t num_features;  // E
  int64_t inner_rows;    // >= 1
  int64_t inner_stride;  // elements
  int64_t outer_stride;  // elements
  float epsilon;
  DType weight_dtype = DType::kFloat32;
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

struct SampleParams {
  const void* logits;         // [R, V], float32 or a 16-bit type, V contiguous, V >= 1
  const int64_t* seeds;       // [R], their 64 bits
  const int64_t* positions;   // [R], >= 0
  const float* temperatures;  // [R], >= 0; 0 = the largest logit, lowest index of equals
  const int32_t* top_k;       // [R], 0 = all
  const float* top_p;         // [R], in [0, 1]
  const float* min_p;         // [R], in [0, 1]
  int64_t* ids;               // [R]; in range also where the value is not finite
  float* values;              // [R], the row's largest logit; NaN if there is one in the row
  DType logits_dtype;
  int64_t num_rows;    // R
  int64_t vocab_size;  // V, below 2^31
  int64_t row_stride;  // elements between rows of logits
};

struct NgramLookupParams {
  const void* tokens;      // [T], int32 or int64
  const int32_t* offsets;  // [S + 1], tokens of sequence s are [offsets[s], offsets[s+1])
  int32_t* draft_ids;      // [S, max_draft], padded with -1
  int32_t* num_draft;      // [S]
  bool tokens_are_int64;
  int64_t num_sequences;  // S
  int64_t min_n;          // shortest suffix that counts
  int64_t max_n;          // longest suffix looked for
  int64_t max_draft;      // tokens proposed at most
  // [S], or null: the text of sequence s is only the first lengths[s] of its tokens
  const int32_t* lengths = nullptr;
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

// Rows of one step over S sequences whose state lies in device memory. Symbols: K the longest
// draft, N = S * (K + 1) rows, L the capacity of a history, M columns of the page table.
struct FillRowsParams {
  const int32_t* history;     // [S, L], tokens; of the first lengths[s] the last has no KV yet
  const int32_t* lengths;     // [S]
  const int32_t* num_left;    // [S], tokens a reply may still get; <= 0 = the sequence does not run
  const int32_t* kv_limits;   // [S], tokens whose KV there is room for
  const int32_t* draft_ids;   // [S, K], proposed tokens
  const int32_t* num_draft;   // [S]
  const int32_t* page_table;  // [S, M]
  int64_t* token_ids;         // [N], rows of the sequences one behind the other, then padding of 0
  int32_t* positions;         // [N], padding of 0
  int64_t* slots;             // [N], padding of -1
  int32_t* seq_lens;          // [S], KV length with the new rows; 0 of a sequence without rows
  int32_t* query_offsets;     // [S + 1]
  int64_t* row_sequences;     // [N], sequence of each row, padding of 0
  int64_t num_sequences;      // S
  int64_t capacity;           // L
  int64_t max_draft;          // K
  int64_t max_pages;          // M
  int64_t page_size;
};

struct AdvanceSequencesParams {
  const int64_t* token_ids;      // [N], what each row fed
  const int64_t* target_ids;     // [N], the model's choice after each row
  const float* target_values;    // [N], its largest logit; not finite = there is no choice
  const int32_t* query_offsets;  // [S + 1], rows of sequence s are [offsets[s], offsets[s+1])
  const int32_t* stop_ids;       // [S, E], tokens that end a reply, padded with -1
  int32_t* history;              // [S, L]
  int32_t* lengths;              // [S]
  int32_t* num_left;             // [S]
  int32_t* counts;               // [S, 3], steps, drafted tokens, accepted tokens; they stay at
                                 // 2^31 - 1
  int64_t num_sequences;         // S
  int64_t capacity;              // L
  int64_t num_stop_ids;          // E
};

// What num_left becomes where a row's largest logit is not finite.
inline constexpr int32_t kStoppedByBadLogits = -1;

}  // namespace skv
