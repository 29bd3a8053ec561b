// decoder_layers: the layers of a Llama-family model in one call. It runs the kernels of the single
// ops in the order in which `models/llama.py` composes them, on memory taken once for all layers,
// so the bits are those of the ops called one by one and a step costs one call instead of hundreds.
// All arguments are checked before the first kernel runs.
#include <ATen/record_function.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <vector>

#include "csrc/bindings/ops/attention/args.h"
#include "csrc/bindings/ops/kv/args.h"
#include "csrc/bindings/ops/kv/checks.h"
#include "csrc/bindings/ops/linear/args.h"
#include "csrc/bindings/ops/offsets.h"
#include "csrc/bindings/ops/rows/args.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

// What the list `weights` holds of each layer, in this order; a projection is weight, scales,
// minimums, bias.
enum LayerTensor : size_t {
  kAttnNorm = 0,
  kQkv = 1,
  kQNorm = 5,
  kKNorm = 6,
  kO = 7,
  kFfnNorm = 11,
  kGateUp = 12,
  kDown = 16,
  kLayerTensors = 20,
};

constexpr int64_t kMaxHeads = 1 << 16;  // keeps sizes made of it far from overflow

// Where a profiler sees the kernel as the op it belongs to.
#define SKV_AS_OP(name) RECORD_FUNCTION("stateful_kv::" name, c10::ArrayRef<const c10::IValue>{})

struct Sizes {
  int64_t num_rows;
  int64_t num_logit_rows;
  int64_t hidden;  // E
  int64_t inner;   // F
  int64_t num_layers;
};

// Activations of a step, used by one layer after the other.
struct Memory {
  at::Tensor normalised;   // [N, E]
  at::Tensor qkv;          // [N, (H + 2 Hk) D]
  at::Tensor q, k, v;      // [N, H or Hk, D]: parts of qkv, or normalised copies of q and k
  at::Tensor attended;     // [N, H, D]
  at::Tensor attended_2d;  // [N, H D], the same memory
  at::Tensor logit_rows;   // [R, H D], rows of attended
  at::Tensor hidden_rows;  // [R, E], rows of the hidden state
  at::Tensor after_o;      // [N, E]
  at::Tensor gate_up;      // [N, 2F]
  at::Tensor gated;        // [N, F]
  at::Tensor after_down;   // [N, E]
};

struct LayerParams {
  QuantizedLinearParams qkv;
  RmsNormParams q_norm;
  RmsNormParams k_norm;
  QuantizedLinearParams o;
  QuantizedLinearParams gate_up;
  QuantizedLinearParams down;
};

class DecoderLayers {
 public:
  DecoderLayers(const OpCheck& check, const at::Tensor& x, const c10::List<OptionalTensor>& weights,
                const at::Tensor& logit_rows, const KvLayout& layout, int64_t num_heads,
                double norm_eps, const at::Tensor& output)
      : weights_(weights.vec()), num_heads_(num_heads), norm_eps_(norm_eps), layout_(layout) {
    const size_t num_layers = weights_.size() / kLayerTensors;
    sizes_ = {x.size(0), logit_rows.numel(), x.size(1), 0, static_cast<int64_t>(num_layers)};
    sizes_.inner = inner_features(check);
    has_head_norms_ = weights_[kQNorm].has_value();
    allocate(x);
    layers_.reserve(num_layers);
    for (size_t layer = 0; layer < num_layers; ++layer) {
      layers_.push_back(make_layer(layer, x, output));
    }
  }

  const Memory& memory() const { return memory_; }

  void run(RopeAppendKvParams rope, PagedAttentionParams attention, const at::Tensor& x,
           const int64_t* logit_rows, int64_t pool_layer_bytes) const {
    const float* hidden = x.const_data_ptr<float>();
    for (const LayerParams& layer : layers_) {
      run_linear(layer.qkv);
      if (has_head_norms_) {
        run_norm(layer.q_norm);
        run_norm(layer.k_norm);
      }
      {
        SKV_AS_OP("rope_append_kv");
        cpu::kernels().rope_append_kv(rope, torch_parallel_for);
      }
      {
        SKV_AS_OP("paged_attention");
        cpu::kernels().paged_attention(attention, torch_parallel_for);
      }
      rope.k_pool = static_cast<char*>(rope.k_pool) + pool_layer_bytes;
      rope.v_pool = static_cast<char*>(rope.v_pool) + pool_layer_bytes;
      attention.k_pool = static_cast<const char*>(attention.k_pool) + pool_layer_bytes;
      attention.v_pool = static_cast<const char*>(attention.v_pool) + pool_layer_bytes;
      if (rope.k_scales != nullptr) {
        attention.k_scales = rope.k_scales += layout_.num_pages * layout_.page_vectors();
        attention.v_scales = rope.v_scales += layout_.num_pages * layout_.page_vectors();
      }
      if (&layer == &layers_.back()) {
        // After the last KV write only the wanted rows matter, and rows are independent.
        gather(memory_.attended, logit_rows, memory_.logit_rows);
        gather(hidden, sizes_.hidden, logit_rows, memory_.hidden_rows);
      }
      run_linear(layer.o);
      run_linear(layer.gate_up);
      run_linear(layer.down);
      hidden = memory_.after_down.const_data_ptr<float>();
    }
  }

 private:
  const OptionalTensor& tensor(size_t layer, size_t index) const {
    return weights_[layer * kLayerTensors + index];
  }

  // F, which only the weights tell: the depth of `down`.
  int64_t inner_features(const OpCheck& check) const {
    const OptionalTensor& down = weights_[kDown];
    check.value("weights", down.has_value() && down->dim() == 3, "a packed weight for `down`",
                down.has_value() ? describe(*down) : "None");
    return down->size(1) * (down->scalar_type() == at::kByte ? 2 : 1);
  }

  void allocate(const at::Tensor& x) {
    const int64_t rows = sizes_.num_rows;
    const int64_t kv_heads = layout_.num_kv_heads;
    const int64_t dim = layout_.head_dim;
    const auto floats = [&x](std::initializer_list<int64_t> size) {
      return empty_tensor(size, at::kFloat, x);
    };
    memory_.normalised = floats({rows, sizes_.hidden});
    memory_.qkv = floats({rows, (num_heads_ + 2 * kv_heads) * dim});
    const at::Tensor heads = memory_.qkv.view({rows, num_heads_ + 2 * kv_heads, dim});
    memory_.q = heads.narrow(1, 0, num_heads_);
    memory_.k = heads.narrow(1, num_heads_, kv_heads);
    memory_.v = heads.narrow(1, num_heads_ + kv_heads, kv_heads);
    if (has_head_norms_) {
      memory_.q = floats({rows, num_heads_, dim});
      memory_.k = floats({rows, kv_heads, dim});
    }
    memory_.attended = floats({rows, num_heads_, dim});
    memory_.attended_2d = memory_.attended.view({rows, num_heads_ * dim});
    memory_.logit_rows = floats({sizes_.num_logit_rows, num_heads_ * dim});
    memory_.hidden_rows = floats({sizes_.num_logit_rows, sizes_.hidden});
    memory_.after_o = floats({rows, sizes_.hidden});
    memory_.gate_up = floats({rows, 2 * sizes_.inner});
    memory_.gated = floats({rows, sizes_.inner});
    memory_.after_down = floats({rows, sizes_.hidden});
  }

  LayerParams make_layer(size_t layer, const at::Tensor& x, const at::Tensor& output) const {
    const bool is_last = static_cast<int64_t>(layer) + 1 == sizes_.num_layers;
    const int64_t rows = is_last ? sizes_.num_logit_rows : sizes_.num_rows;
    const auto first_rows = [rows](const at::Tensor& tensor) {
      return tensor.size(0) == rows ? tensor : tensor.narrow(0, 0, rows);
    };
    const at::Tensor& input = layer == 0 ? x : memory_.after_down;
    const at::Tensor& attended = is_last ? memory_.logit_rows : memory_.attended_2d;
    const at::Tensor after_o = first_rows(memory_.after_o);
    const at::Tensor gated = first_rows(memory_.gated);
    const OptionalTensor residual = is_last ? memory_.hidden_rows : input;
    LayerParams params{};
    params.qkv = linear(layer, "qkv", kQkv, input, memory_.qkv.size(1), std::nullopt,
                        tensor(layer, kAttnNorm), false, {memory_.normalised, memory_.qkv, {}});
    params.o = linear(layer, "o", kO, attended, sizes_.hidden, residual, std::nullopt, false,
                      {{}, memory_.after_o, {}});
    params.gate_up =
        linear(layer, "gate_up", kGateUp, after_o, 2 * sizes_.inner, std::nullopt,
               tensor(layer, kFfnNorm), true, {memory_.normalised, memory_.gate_up, memory_.gated});
    params.down = linear(layer, "down", kDown, gated, sizes_.hidden, after_o, std::nullopt, false,
                         {{}, is_last ? output : memory_.after_down, {}});
    check_head_norms(layer);
    if (has_head_norms_) {
      params.q_norm = head_norm(layer, "q_norm", kQNorm, 0, memory_.q);
      params.k_norm = head_norm(layer, "k_norm", kKNorm, num_heads_, memory_.k);
    }
    return params;
  }

  QuantizedLinearParams linear(size_t layer, const char* name, size_t index, const at::Tensor& x,
                               int64_t out_features, const OptionalTensor& residual,
                               const OptionalTensor& norm_weight, bool silu_mul,
                               const QuantizedLinearMemory& memory) const {
    const std::string op = op_name(layer, name);
    const OpCheck check{op.c_str(), x.device()};
    const OptionalTensor& weight = tensor(layer, index);
    check.value("weight", weight.has_value(), "a tensor", "None");
    const QuantizedLinearArgs args{x,
                                   *weight,
                                   tensor(layer, index + 1),
                                   tensor(layer, index + 2),
                                   tensor(layer, index + 3),
                                   out_features,
                                   residual,
                                   norm_weight,
                                   norm_eps_,
                                   silu_mul};
    check_quantized_linear(check, args);
    return params_of(args, memory);
  }

  void check_head_norms(size_t layer) const {
    for (const size_t index : {kQNorm, kKNorm}) {
      const bool is_there = tensor(layer, index).has_value();
      TORCH_CHECK_VALUE(is_there == has_head_norms_, "decoder_layers: weights: layer ", layer,
                        ": expected q_norm and k_norm in every layer or in none, got ",
                        is_there ? "a tensor" : "None", " for ",
                        index == kQNorm ? "q_norm" : "k_norm");
    }
  }

  // Norm of the heads from `first` on, out of the fused row into memory of their own.
  RmsNormParams head_norm(size_t layer, const char* name, size_t index, int64_t first,
                          const at::Tensor& heads) const {
    const std::string op = op_name(layer, name);
    const OpCheck check{op.c_str(), heads.device()};
    const OptionalTensor& weight = tensor(layer, index);
    const at::Tensor source =
        memory_.qkv.view({sizes_.num_rows, num_heads_ + 2 * layout_.num_kv_heads, layout_.head_dim})
            .narrow(1, first, heads.size(1));
    RmsNormParams params =
        rms_norm_params(check, source, *weight, norm_eps_, std::nullopt, {at::kFloat});
    params.output = heads.mutable_data_ptr();
    return params;
  }

  static std::string op_name(size_t layer, const char* part) {
    return "decoder_layers: weights: layer " + std::to_string(layer) + ": " + part;
  }

  static void run_linear(const QuantizedLinearParams& params) {
    SKV_AS_OP("quantized_linear");
    cpu::kernels().quantized_linear(params, torch_parallel_for);
  }

  static void run_norm(const RmsNormParams& params) {
    SKV_AS_OP("rms_norm");
    cpu::kernels().rms_norm(params, torch_parallel_for);
  }

  static void gather(const at::Tensor& from, const int64_t* rows, const at::Tensor& to) {
    gather(from.const_data_ptr<float>(), to.size(1), rows, to);
  }

  static void gather(const float* from, int64_t width, const int64_t* rows, const at::Tensor& to) {
    float* out = to.mutable_data_ptr<float>();
    for (int64_t i = 0; i < to.size(0); ++i) {
      std::memcpy(out + i * width, from + rows[i] * width,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }

  std::vector<OptionalTensor> weights_;
  int64_t num_heads_;
  double norm_eps_;
  KvLayout layout_;
  Sizes sizes_{};
  bool has_head_norms_ = false;
  Memory memory_;
  std::vector<LayerParams> layers_;
};

void check_logit_rows(const OpCheck& check, const at::Tensor& logit_rows, int64_t num_rows) {
  check("logit_rows", logit_rows).dtype({at::kLong}).shape({{"R"}}).contiguous();
  check.value("logit_rows", logit_rows.numel() <= num_rows, "at most N rows", logit_rows);
  const int64_t* rows = logit_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < logit_rows.numel(); ++i) {
    TORCH_CHECK_VALUE(rows[i] >= 0 && rows[i] < num_rows, check.op(),
                      ": logit_rows: expected rows in [0, N = ", num_rows, "), got ", rows[i],
                      " at index ", i);
  }
}

// Pools of all layers, and as many layers of weights.
KvLayout check_layers(const OpCheck& check, const c10::List<OptionalTensor>& weights,
                      const at::Tensor& k_pools, const at::Tensor& v_pools,
                      const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  check("k_pools", k_pools)
      .dtype(kKvDtypes)
      .shape({{"num_layers"}, {"P"}, {"Hk"}, {"B"}, {"D"}})
      .contiguous();
  check("v_pools", v_pools)
      .dtype({k_pools.scalar_type()})
      .shape({{"num_layers", k_pools.size(0)},
              {"P", k_pools.size(1)},
              {"Hk", k_pools.size(2)},
              {"B", k_pools.size(3)},
              {"D", k_pools.size(4)}})
      .contiguous();
  check.own_memory("v_pools", v_pools, "k_pools", k_pools);
  check_written_scales(check, k_scales, v_scales, k_pools, v_pools);
  const KvLayout layout{k_pools.size(1), k_pools.size(2), k_pools.size(3), k_pools.size(4)};
  check.value("k_pools",
              layout.page_size > 0 && layout.head_dim % 16 == 0 && layout.head_dim > 0 &&
                  layout.head_dim <= 256,
              "B > 0 and a head dimension D that is a multiple of 16 and at most 256", k_pools);
  const auto num_tensors = static_cast<int64_t>(weights.size());
  check.value("weights", num_tensors > 0 && num_tensors == k_pools.size(0) * int64_t{kLayerTensors},
              std::to_string(kLayerTensors) + " tensors for each layer of the pools", num_tensors);
  return layout;
}

OptionalTensor first_layer(const OptionalTensor& scales) {
  return scales.has_value() ? OptionalTensor(scales->select(0, 0)) : std::nullopt;
}

void decoder_layers_cpu(const at::Tensor& x, const c10::List<OptionalTensor>& weights,
                        const at::Tensor& positions, const at::Tensor& cos_sin,
                        const at::Tensor& slots, const at::Tensor& page_table,
                        const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                        const at::Tensor& logit_rows, int64_t num_heads, double norm_eps,
                        double scale, int64_t sliding_window, const at::Tensor& k_pools,
                        const at::Tensor& v_pools, const at::Tensor& output,
                        const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"decoder_layers", x.device()};
  check("x", x).dtype({at::kFloat}).shape({{"N"}, {"E"}}).contiguous();
  check("slots", slots).dtype({at::kLong}).shape({{"N", x.size(0)}}).contiguous();
  check.float32("norm_eps", norm_eps);
  check_logit_rows(check, logit_rows, x.size(0));
  check("output", output)
      .dtype({at::kFloat})
      .shape({{"R", logit_rows.numel()}, {"E", x.size(1)}})
      .contiguous();
  check.own_memory("output", output, "x", x);
  const KvLayout layout = check_layers(check, weights, k_pools, v_pools, k_scales, v_scales);
  check.value("num_heads",
              num_heads > 0 && num_heads <= kMaxHeads && layout.num_kv_heads > 0 &&
                  num_heads % layout.num_kv_heads == 0,
              "a multiple > 0 of the pools' Hk, at most 65536", num_heads);
  const DecoderLayers layers(check, x, weights, logit_rows, layout, num_heads, norm_eps, output);

  const at::Tensor k_pool = k_pools.select(0, 0);
  const at::Tensor v_pool = v_pools.select(0, 0);
  const OptionalTensor k_scale = first_layer(k_scales);
  const OptionalTensor v_scale = first_layer(v_scales);
  const Memory& memory = layers.memory();
  const RopeAppendKvArgs rope{memory.q, memory.k, memory.v, positions, cos_sin,
                              slots,    k_pool,   v_pool,   k_scale,   v_scale};
  check_rope_append_kv(check, rope, {at::kFloat});
  check.own_memory("output", output, "cos_sin", cos_sin);
  check.own_memory("output", output, "k_pools", k_pools);
  check.own_memory("output", output, "v_pools", v_pools);
  if (k_scales.has_value()) {
    check.own_memory("output", output, "k_scales", *k_scales);
    check.own_memory("output", output, "v_scales", *v_scales);
  }
  check_slot_values(check, slots, layout);
  check_positions(check, positions, cos_sin.size(0));
  const PagedAttentionArgs attention{memory.q, k_pool,        v_pool, page_table,
                                     seq_lens, query_offsets, scale,  sliding_window,
                                     0.0,      k_scale,       v_scale};
  check_paged_attention(check, attention, layout, {at::kFloat});
  check_row_offsets(check, "query_offsets", query_offsets, x.size(0));
  check_sequences(check, page_table, seq_lens, query_offsets, layout);

  const int64_t pool_layer_bytes = k_pools.stride(0) * static_cast<int64_t>(k_pools.element_size());
  layers.run(params_of(rope, layout), params_of(attention, layout, memory.attended), x,
             logit_rows.const_data_ptr<int64_t>(), pool_layer_bytes);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) { m.impl("decoder_layers", TORCH_FN(decoder_layers_cpu)); }

}  // namespace skv::bindings
