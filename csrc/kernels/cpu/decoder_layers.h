// The layers of a Llama-family model, one kernel after the other. The order is the one in which
// python/stateful_kv/models/llama.py composes the single ops, and the kernels are theirs, so the
// bits are equal. A pass takes no memory: its activations lie in a workspace that grows to the
// largest pass and is kept by the caller.
//
// Symbols: N rows (new tokens), R rows whose results are wanted, S sequences, M page-table columns,
// E hidden size, F inner size, H query heads, Hk KV heads, D head dim, V outputs of the head.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/core/function_ref.h"
#include "csrc/core/parallel_for.h"
#include "csrc/kernels/kv_layout.h"
#include "csrc/kernels/params.h"

namespace skv::cpu {

// A linear layer, packed as QuantizedLinearParams describes.
struct PackedLinear {
  const void* weight;
  const float* scales;    // null for float32
  const float* minimums;  // 4-bit only, else null
  const float* bias;      // [out_features], or null
  WeightFormat format;
  int64_t in_features;
  int64_t out_features;
};

struct DecoderLayer {
  const float* attn_norm;  // [E]
  PackedLinear qkv;        // E -> (H + 2 Hk) D
  const float* q_norm;     // [D], or null: then no layer of the model has one
  const float* k_norm;     // [D], null exactly if q_norm is
  PackedLinear o;          // H D -> E
  const float* ffn_norm;   // [E]
  PackedLinear gate_up;    // E -> 2F, panels of gate and up by turns
  PackedLinear down;       // F -> E
};

struct DecoderModel {
  const DecoderLayer* layers;  // [num_layers]
  const float* cos_sin;        // [max_pos, D], D/2 cosines then D/2 sines
  int64_t num_layers;          // >= 1
  int64_t hidden_size;         // E
  int64_t inner_size;          // F
  int64_t num_heads;           // H, a multiple of Hk
  int64_t num_kv_heads;        // Hk
  int64_t head_dim;            // D
  float norm_epsilon;
  float scale;             // of attention scores
  int64_t sliding_window;  // keys that a row sees; 0 = all

  bool has_head_norms() const { return layers[0].q_norm != nullptr; }
  int64_t qkv_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// What comes after the layers.
struct DecoderHead {
  const float* norm;    // [E]
  PackedLinear linear;  // E -> V
};

// New tokens of several sequences; the same rules as for PagedAttentionParams and
// RopeAppendKvParams.
struct DecoderBatch {
  const int32_t* positions;      // [N]
  const int64_t* slots;          // [N], -1 = nothing is written for the row
  const int32_t* page_table;     // [S, M]
  const int32_t* seq_lens;       // [S]
  const int32_t* query_offsets;  // [S + 1], up to at most N
  const int64_t* logit_rows;     // [R], each in [0, N)
  int64_t num_rows;              // N
  int64_t num_logit_rows;        // R <= N
  int64_t num_sequences;         // S
  int64_t max_pages;             // M
  int64_t page_table_row_stride;
};

// The pools of all layers.
struct DecoderPools {
  void* k;          // [num_layers, P, Hk, B, D]
  void* v;          // [num_layers, P, Hk, B, D]
  float* k_scales;  // [num_layers, P, Hk, B] for int8, else null
  float* v_scales;  // [num_layers, P, Hk, B] for int8, else null
  KvLayout layout;  // of one layer
  DType dtype;
};

// Memory of one pass: pointers into a workspace.
struct DecoderMemory {
  float* hidden;       // [N, E], what goes from layer to layer
  float* normalised;   // [N, E]
  float* qkv;          // [N, (H + 2 Hk) D]
  float* q;            // [N, H, D], with norms of the heads only
  float* k;            // [N, Hk, D], with norms of the heads only
  float* attended;     // [N, H, D]
  float* after_o;      // [N, E]
  float* gate_up;      // [N, 2F]
  float* gated;        // [N, F]
  float* wanted;       // [R, H D], the wanted rows of `attended`
  float* residual;     // [R, E], the wanted rows of `hidden`
  float* part_values;  // scratch of LinearTopKParams
  int64_t* part_ids;
  int64_t* part_counts;
};

// Owns the memory of passes, one after the other.
class DecoderWorkspace {
 public:
  DecoderWorkspace() = default;
  ~DecoderWorkspace();
  DecoderWorkspace(const DecoderWorkspace&) = delete;
  DecoderWorkspace& operator=(const DecoderWorkspace&) = delete;

  // Finds room for a pass over `num_rows` rows, `top_k` > 0 for decoder_top_k. Takes memory only if
  // no pass before was as large. False if it cannot be had; the workspace stays usable.
  bool prepare(const DecoderModel& model, int64_t num_rows, int64_t num_logit_rows, int64_t top_k);

  // Of the last successful prepare().
  const DecoderMemory& memory() const { return memory_; }

  size_t num_bytes() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
  DecoderMemory memory_{};
};

// Calls kernel(), once; `op` is the full name of the op that has this kernel. Here the caller can
// show the kernel to a profiler.
using RunKernel = FunctionRef<void(const char* op, FunctionRef<void()> kernel)>;

// How a pass runs its kernels.
struct Runner {
  ParallelFor parallel_for;
  RunKernel run_kernel;
};

// to[i] = from[rows[i]] for rows of `width` floats.
void gather_rows(const float* from, int64_t width, const int64_t* rows, int64_t num_rows,
                 float* to);

// x: [N, E], may be memory.hidden. output: [R, E], before the last norm; may be memory.hidden.
void decoder_layers(const DecoderModel& model, const DecoderBatch& batch, const DecoderPools& pools,
                    const float* x, float* output, const DecoderMemory& memory, Runner runner);

// logits: [R, V] of hidden: [R, E].
void decoder_logits(const DecoderModel& model, const DecoderHead& head, const float* hidden,
                    int64_t num_rows, float* logits, const DecoderMemory& memory, Runner runner);

// ids, values: [R, k], the largest logits of each row as LinearTopKParams orders them.
void decoder_top_k(const DecoderModel& model, const DecoderHead& head, const float* hidden,
                   int64_t num_rows, int64_t k, int64_t* ids, float* values,
                   const DecoderMemory& memory, Runner runner);

}  // namespace skv::cpu
