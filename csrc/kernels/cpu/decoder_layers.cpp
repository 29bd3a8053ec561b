#include "csrc/kernels/cpu/decoder_layers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "csrc/kernels/cpu/select_isa.h"

namespace skv::cpu {

namespace {

constexpr size_t kAlignment = 64;

// Hands out parts of a block of memory one after the other; with a null block it only counts.
class Carver {
 public:
  explicit Carver(char* block) : block_(block) {}

  template <typename T>
  T* take(int64_t rows, int64_t width) {
    size_t bytes = 0;
    is_valid_ = is_valid_ && !__builtin_mul_overflow(rows, width, &bytes) &&
                !__builtin_mul_overflow(bytes, sizeof(T), &bytes) &&
                !__builtin_add_overflow(bytes, kAlignment - 1, &bytes);
    bytes -= bytes % kAlignment;
    char* const part = block_ == nullptr ? nullptr : block_ + used_;
    is_valid_ = is_valid_ && !__builtin_add_overflow(used_, bytes, &used_);
    return reinterpret_cast<T*>(part);
  }

  // Whether no size was too large to be counted.
  bool is_valid() const { return is_valid_; }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
  bool is_valid_ = true;
};

DecoderMemory carve(Carver& carver, const DecoderModel& model, int64_t num_rows,
                    int64_t num_logit_rows, int64_t top_k) {
  const int64_t attended_width = model.num_heads * model.head_dim;
  const int64_t rows_with_norms = model.has_head_norms() ? num_rows : 0;
  const int64_t num_lists = top_k > 0 ? kTopKParts * std::min(kTopKBlockRows, num_logit_rows) : 0;
  DecoderMemory memory{};
  memory.hidden = carver.take<float>(num_rows, model.hidden_size);
  memory.normalised = carver.take<float>(num_rows, model.hidden_size);
  memory.qkv = carver.take<float>(num_rows, model.qkv_width());
  memory.q = carver.take<float>(rows_with_norms, attended_width);
  memory.k = carver.take<float>(rows_with_norms, model.num_kv_heads * model.head_dim);
  memory.attended = carver.take<float>(num_rows, attended_width);
  memory.after_o = carver.take<float>(num_rows, model.hidden_size);
  memory.gate_up = carver.take<float>(num_rows, 2 * model.inner_size);
  memory.gated = carver.take<float>(num_rows, model.inner_size);
  memory.wanted = carver.take<float>(num_logit_rows, attended_width);
  memory.residual = carver.take<float>(num_logit_rows, model.hidden_size);
  memory.part_values = carver.take<float>(num_lists, top_k);
  memory.part_ids = carver.take<int64_t>(num_lists, top_k);
  memory.part_counts = carver.take<int64_t>(num_lists, 1);
  return memory;
}

// The product alone; what comes before and after it is left to the caller.
QuantizedLinearParams linear_params(const PackedLinear& linear, const float* input,
                                    int64_t num_rows) {
  QuantizedLinearParams params{};
  params.input = input;
  params.weight = linear.weight;
  params.scales = linear.scales;
  params.minimums = linear.minimums;
  params.bias = linear.bias;
  params.format = linear.format;
  params.num_rows = num_rows;
  params.in_features = linear.in_features;
  params.out_features = linear.out_features;
  params.input_row_stride = linear.in_features;
  return params;
}

void run_linear(const QuantizedLinearParams& params, const Runner& runner) {
  runner.run_kernel("stateful_kv::quantized_linear",
                    [&] { kernels().quantized_linear(params, runner.parallel_for); });
}

// One pass over the layers; the members are what stays the same from layer to layer.
class Pass {
 public:
  Pass(const DecoderModel& model, const DecoderBatch& batch, const DecoderPools& pools,
       const DecoderMemory& memory, Runner runner)
      : model_(model), batch_(batch), pools_(pools), memory_(memory), runner_(runner) {}

  void run(const float* x, float* output) {
    const float* hidden = x;
    for (int64_t layer = 0; layer < model_.num_layers; ++layer) {
      const DecoderLayer& weights = model_.layers[layer];
      run_qkv(weights, hidden);
      if (weights.q_norm != nullptr) normalise_heads(weights);
      attend(layer);
      if (layer + 1 < model_.num_layers) {
        finish(weights, memory_.attended, hidden, batch_.num_rows, memory_.hidden);
        hidden = memory_.hidden;
        continue;
      }
      // After the last KV write only the wanted rows matter, and rows are independent.
      gather_rows(memory_.attended, model_.num_heads * model_.head_dim, batch_.logit_rows,
                  batch_.num_logit_rows, memory_.wanted);
      gather_rows(hidden, model_.hidden_size, batch_.logit_rows, batch_.num_logit_rows,
                  memory_.residual);
      finish(weights, memory_.wanted, memory_.residual, batch_.num_logit_rows, output);
    }
  }

 private:
  void run_qkv(const DecoderLayer& weights, const float* hidden) const {
    QuantizedLinearParams params = linear_params(weights.qkv, hidden, batch_.num_rows);
    add_norm(params, weights.attn_norm);
    params.sums = memory_.qkv;
    run_linear(params, runner_);
  }

  // Everything after attention, for some rows.
  void finish(const DecoderLayer& weights, const float* attended, const float* residual,
              int64_t num_rows, float* output) const {
    QuantizedLinearParams o = linear_params(weights.o, attended, num_rows);
    o.residual = residual;
    o.sums = memory_.after_o;
    run_linear(o, runner_);
    QuantizedLinearParams gate_up = linear_params(weights.gate_up, memory_.after_o, num_rows);
    add_norm(gate_up, weights.ffn_norm);
    gate_up.sums = memory_.gate_up;
    gate_up.activated = memory_.gated;
    run_linear(gate_up, runner_);
    QuantizedLinearParams down = linear_params(weights.down, memory_.gated, num_rows);
    down.residual = memory_.after_o;
    down.sums = output;
    run_linear(down, runner_);
  }

  void add_norm(QuantizedLinearParams& params, const float* norm_weight) const {
    params.norm_weight = norm_weight;
    params.float_input = memory_.normalised;
    params.norm_epsilon = model_.norm_epsilon;
  }

  void normalise_heads(const DecoderLayer& weights) const {
    run_head_norm(memory_.qkv, model_.num_heads, weights.q_norm, memory_.q);
    run_head_norm(memory_.qkv + model_.num_heads * model_.head_dim, model_.num_kv_heads,
                  weights.k_norm, memory_.k);
  }

  // `heads` heads of each row, out of the fused row into memory of their own.
  void run_head_norm(const float* input, int64_t heads, const float* weight, float* output) const {
    const RmsNormParams params{
        .input = input,
        .weight = weight,
        .output = output,
        .residual = nullptr,
        .sum = nullptr,
        .activation_dtype = DType::kFloat32,
        .num_rows = batch_.num_rows * heads,
        .num_features = model_.head_dim,
        .inner_rows = heads,
        .inner_stride = model_.head_dim,
        .outer_stride = model_.qkv_width(),
        .epsilon = model_.norm_epsilon,
    };
    runner_.run_kernel("stateful_kv::rms_norm",
                       [&] { kernels().rms_norm(params, runner_.parallel_for); });
  }

  // Rotates, writes K and V, attends.
  void attend(int64_t layer) const {
    const int64_t layer_elements = pools_.layout.num_pages * pools_.layout.page_elements();
    const int64_t layer_bytes = layer_elements * element_bytes(pools_.dtype);
    const int64_t layer_vectors = pools_.layout.num_pages * pools_.layout.page_vectors();
    void* const k_pool = static_cast<char*>(pools_.k) + layer * layer_bytes;
    void* const v_pool = static_cast<char*>(pools_.v) + layer * layer_bytes;
    const bool has_scales = pools_.k_scales != nullptr;
    float* const k_scales = has_scales ? pools_.k_scales + layer * layer_vectors : nullptr;
    float* const v_scales = has_scales ? pools_.v_scales + layer * layer_vectors : nullptr;
    const bool has_norms = model_.has_head_norms();
    const int64_t width = model_.qkv_width();
    const int64_t q_width = model_.num_heads * model_.head_dim;
    const int64_t kv_width = model_.num_kv_heads * model_.head_dim;
    float* const q = has_norms ? memory_.q : memory_.qkv;
    const int64_t q_stride = has_norms ? q_width : width;
    const RopeAppendKvParams rope{
        .query = q,
        .key = has_norms ? memory_.k : memory_.qkv + q_width,
        .value = memory_.qkv + q_width + kv_width,
        .positions = batch_.positions,
        .cos_sin = model_.cos_sin,
        .slots = batch_.slots,
        .k_pool = k_pool,
        .v_pool = v_pool,
        .k_scales = k_scales,
        .v_scales = v_scales,
        .layout = pools_.layout,
        .activation_dtype = DType::kFloat32,
        .kv_dtype = pools_.dtype,
        .num_rows = batch_.num_rows,
        .num_heads = model_.num_heads,
        .query_row_stride = q_stride,
        .query_head_stride = model_.head_dim,
        .key_row_stride = has_norms ? kv_width : width,
        .key_head_stride = model_.head_dim,
        .value_row_stride = width,
        .value_head_stride = model_.head_dim,
    };
    runner_.run_kernel("stateful_kv::rope_append_kv",
                       [&] { kernels().rope_append_kv(rope, runner_.parallel_for); });
    const PagedAttentionParams attention{
        .query = q,
        .k_pool = k_pool,
        .v_pool = v_pool,
        .k_scales = k_scales,
        .v_scales = v_scales,
        .page_table = batch_.page_table,
        .seq_lens = batch_.seq_lens,
        .query_offsets = batch_.query_offsets,
        .output = memory_.attended,
        .layout = pools_.layout,
        .activation_dtype = DType::kFloat32,
        .kv_dtype = pools_.dtype,
        .num_sequences = batch_.num_sequences,
        .num_rows = batch_.num_rows,
        .num_heads = model_.num_heads,
        .max_pages = batch_.max_pages,
        .query_row_stride = q_stride,
        .query_head_stride = model_.head_dim,
        .page_table_row_stride = batch_.page_table_row_stride,
        .scale = model_.scale,
        .sliding_window = model_.sliding_window,
        .soft_cap = 0.0F,
    };
    runner_.run_kernel("stateful_kv::paged_attention",
                       [&] { kernels().paged_attention(attention, runner_.parallel_for); });
  }

  static int64_t element_bytes(DType dtype) {
    switch (dtype) {
      case DType::kFloat32:
        return 4;
      case DType::kFloat16:
      case DType::kBFloat16:
        return 2;
      case DType::kInt8:
        return 1;
    }
    return 0;
  }

  const DecoderModel& model_;
  const DecoderBatch& batch_;
  const DecoderPools& pools_;
  const DecoderMemory& memory_;
  Runner runner_;
};

// The head's product with the last norm before it.
QuantizedLinearParams head_params(const DecoderModel& model, const DecoderHead& head,
                                  const float* hidden, int64_t num_rows,
                                  const DecoderMemory& memory) {
  QuantizedLinearParams params = linear_params(head.linear, hidden, num_rows);
  params.norm_weight = head.norm;
  params.float_input = memory.normalised;
  params.norm_epsilon = model.norm_epsilon;
  return params;
}

}  // namespace

DecoderWorkspace::~DecoderWorkspace() { std::free(data_); }

bool DecoderWorkspace::prepare(const DecoderModel& model, int64_t num_rows, int64_t num_logit_rows,
                               int64_t top_k) {
  Carver counter(nullptr);
  carve(counter, model, num_rows, num_logit_rows, top_k);
  if (!counter.is_valid()) return false;
  if (counter.used() > size_) {
    // The old memory goes first: nothing in it is needed any more.
    std::free(data_);
    size_ = 0;
    data_ = static_cast<char*>(std::aligned_alloc(kAlignment, counter.used()));
    if (data_ == nullptr) return false;
    size_ = counter.used();
  }
  Carver carver(data_);
  memory_ = carve(carver, model, num_rows, num_logit_rows, top_k);
  return true;
}

void gather_rows(const float* from, int64_t width, const int64_t* rows, int64_t num_rows,
                 float* to) {
  for (int64_t i = 0; i < num_rows; ++i) {
    std::memcpy(to + i * width, from + rows[i] * width, static_cast<size_t>(width) * sizeof(float));
  }
}

void decoder_layers(const DecoderModel& model, const DecoderBatch& batch, const DecoderPools& pools,
                    const float* x, float* output, const DecoderMemory& memory, Runner runner) {
  Pass(model, batch, pools, memory, runner).run(x, output);
}

void decoder_logits(const DecoderModel& model, const DecoderHead& head, const float* hidden,
                    int64_t num_rows, float* logits, const DecoderMemory& memory, Runner runner) {
  QuantizedLinearParams params = head_params(model, head, hidden, num_rows, memory);
  params.sums = logits;
  run_linear(params, runner);
}

void decoder_top_k(const DecoderModel& model, const DecoderHead& head, const float* hidden,
                   int64_t num_rows, int64_t k, int64_t* ids, float* values,
                   const DecoderMemory& memory, Runner runner) {
  const LinearTopKParams params{
      .linear = head_params(model, head, hidden, num_rows, memory),
      .k = k,
      .ids = ids,
      .values = values,
      .part_values = memory.part_values,
      .part_ids = memory.part_ids,
      .part_counts = memory.part_counts,
  };
  runner.run_kernel("stateful_kv::linear_top_k",
                    [&] { kernels().linear_top_k(params, runner.parallel_for); });
}

}  // namespace skv::cpu
