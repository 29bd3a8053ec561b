#include "csrc/ops/layers/decoder_args.h"

#include <ATen/record_function.h>

#include <cmath>
#include <cstring>

#include "csrc/ops/attention/args.h"
#include "csrc/ops/kv/checks.h"
#include "csrc/ops/linear/args.h"

namespace skv::ops {

namespace {

constexpr int64_t kMaxHeads = 1 << 16;  // keeps sizes made of it far from overflow

// F, which only the weights tell: the depth of `down`.
int64_t inner_features(const OpCheck& check, const OptionalTensor& down) {
  check.value("weights", down.has_value() && down->dim() == 3, "a packed weight for `down`",
              down.has_value() ? describe(*down) : "None");
  return fixed_size(*down, 1) * (down->scalar_type() == at::kByte ? 2 : 1);
}

const float* norm_weight(const OpCheck& check, const std::string& name,
                         const OptionalTensor& weight, const char* dimension, int64_t size) {
  const OpCheck part{name.c_str(), check.device()};
  part.value("weight", weight.has_value(), "a tensor", "None");
  check_vector(part, "weight", weight, dimension, size, {at::kFloat});
  return data_or_null(weight);
}

void check_scalars(const OpCheck& check, const DecoderScalars& scalars) {
  // The kernels compute in float32, where a finite double may be infinite.
  check.float32("norm_eps", scalars.norm_eps);
  check.float32("scale", scalars.scale, true);
  check.value("sliding_window", scalars.sliding_window >= 0, "a number >= 0",
              scalars.sliding_window);
}

void check_logit_rows(const OpCheck& check, const int64_t* rows, int64_t num_logit_rows,
                      int64_t num_rows) {
  for (int64_t i = 0; i < num_logit_rows; ++i) {
    TORCH_CHECK_VALUE(rows[i] >= 0 && rows[i] < num_rows, check.op(),
                      ": logit_rows: expected rows in [0, N = ", num_rows, "), got ", rows[i],
                      " at index ", i);
  }
}

// The tensors of one layer become plain pointers.
class LayerReader {
 public:
  LayerReader(const OpCheck& check, const OptionalTensor* tensors, size_t layer)
      : check_(check),
        tensors_(tensors),
        name_(std::string(check.op()) + ": weights: layer " + std::to_string(layer) + ": ") {}

  cpu::DecoderLayer read(const DecoderSizes& sizes, int64_t inner, bool has_head_norms) const {
    const int64_t hidden = sizes.hidden_size;
    const int64_t q_width = sizes.num_heads * sizes.head_dim;
    const int64_t kv_width = sizes.num_kv_heads * sizes.head_dim;
    cpu::DecoderLayer layer{};
    layer.attn_norm = norm("attn_norm", kAttnNorm, "E", hidden);
    layer.qkv = linear("qkv", kQkv, hidden, q_width + 2 * kv_width, false);
    layer.o = linear("o", kO, q_width, hidden, false);
    layer.ffn_norm = norm("ffn_norm", kFfnNorm, "E", hidden);
    layer.gate_up = linear("gate_up", kGateUp, hidden, 2 * inner, true);
    layer.down = linear("down", kDown, inner, hidden, false);
    check_head_norm("q_norm", kQNorm, has_head_norms);
    check_head_norm("k_norm", kKNorm, has_head_norms);
    if (has_head_norms) {
      layer.q_norm = norm("q_norm", kQNorm, "D", sizes.head_dim);
      layer.k_norm = norm("k_norm", kKNorm, "D", sizes.head_dim);
    }
    return layer;
  }

 private:
  cpu::PackedLinear linear(const char* name, size_t index, int64_t in_features,
                           int64_t out_features, bool has_silu_mul) const {
    return packed_linear(check_, name_ + name, tensors_ + index, in_features, out_features,
                         has_silu_mul);
  }

  const float* norm(const char* name, size_t index, const char* dimension, int64_t size) const {
    return norm_weight(check_, name_ + name, tensors_[index], dimension, size);
  }

  void check_head_norm(const char* name, size_t index, bool is_wanted) const {
    const bool is_there = tensors_[index].has_value();
    TORCH_CHECK_VALUE(is_there == is_wanted, name_,
                      "expected q_norm and k_norm in every layer or in none, got ",
                      is_there ? "a tensor" : "None", " for ", name);
  }

  const OpCheck& check_;
  const OptionalTensor* tensors_;
  std::string name_;
};

}  // namespace

void check_heads(const OpCheck& check, int64_t num_heads, int64_t num_kv_heads,
                 const char* expected) {
  check.value(
      "num_heads",
      num_heads > 0 && num_heads <= kMaxHeads && num_kv_heads > 0 && num_heads % num_kv_heads == 0,
      expected, num_heads);
}

cpu::PackedLinear packed_linear(const OpCheck& check, const std::string& name,
                                const OptionalTensor* tensors, int64_t in_features,
                                int64_t out_features, bool has_silu_mul) {
  const OpCheck part{name.c_str(), check.device()};
  const OptionalTensor& weight = tensors[0];
  part.value("weight", weight.has_value(), "a tensor", "None");
  // Stands for the input, which has the right shape by construction.
  const at::Tensor input =
      at::empty({0, in_features}, at::TensorOptions().dtype(at::kFloat).device(check.device()));
  const OptionalTensor none;
  check_vector(part, "bias", tensors[3], "out_features", out_features, {at::kFloat});
  check_quantized_linear(part, {input, *weight, tensors[1], tensors[2], tensors[3], out_features,
                                none, none, 0.0, has_silu_mul});
  return {
      .weight = weight->is_meta() ? nullptr : weight->const_data_ptr(),
      .scales = data_or_null(tensors[1]),
      .minimums = data_or_null(tensors[2]),
      .bias = data_or_null(tensors[3]),
      .format = format_of(*weight),
      .in_features = in_features,
      .out_features = out_features,
  };
}

DecoderWeights::DecoderWeights(const OpCheck& check, const std::vector<OptionalTensor>& weights,
                               const at::Tensor& cos_sin, const DecoderSizes& sizes,
                               const DecoderScalars& scalars) {
  check_scalars(check, scalars);
  check.value("weights", !weights.empty() && weights.size() % kLayerTensors == 0,
              std::to_string(kLayerTensors) + " tensors for each layer", weights.size());
  check("cos_sin", cos_sin)
      .dtype({at::kFloat})
      .shape({{"max_pos"}, {"D", sizes.head_dim}})
      .contiguous();
  const int64_t inner = inner_features(check, weights[kDown]);
  const bool has_head_norms = weights[kQNorm].has_value();
  layers_.reserve(weights.size() / kLayerTensors);
  for (size_t layer = 0; layer < weights.size() / kLayerTensors; ++layer) {
    const LayerReader reader(check, &weights[layer * kLayerTensors], layer);
    layers_.push_back(reader.read(sizes, inner, has_head_norms));
  }
  model_ = {
      .layers = layers_.data(),
      .cos_sin = cos_sin.is_meta() ? nullptr : cos_sin.const_data_ptr<float>(),
      .num_layers = static_cast<int64_t>(layers_.size()),
      .hidden_size = sizes.hidden_size,
      .inner_size = inner,
      .num_heads = sizes.num_heads,
      .num_kv_heads = sizes.num_kv_heads,
      .head_dim = sizes.head_dim,
      .norm_epsilon = static_cast<float>(scalars.norm_eps),
      .scale = static_cast<float>(scalars.scale),
      .sliding_window = scalars.sliding_window,
  };
}

void check_layer_pools(const OpCheck& check, const PoolArgs& args) {
  const at::Tensor& k_pools = args.k_pools;
  const at::Tensor& v_pools = args.v_pools;
  check("k_pools", k_pools)
      .dtype(kKvDtypes)
      .shape({{"num_layers"}, {"P"}, {"Hk"}, {"B"}, {"D"}})
      .contiguous();
  check("v_pools", v_pools)
      .dtype({k_pools.scalar_type()})
      .shape({{"num_layers", k_pools.sym_size(0)},
              {"P", k_pools.sym_size(1)},
              {"Hk", k_pools.sym_size(2)},
              {"B", k_pools.sym_size(3)},
              {"D", k_pools.sym_size(4)}})
      .contiguous();
  check.own_memory("v_pools", v_pools, "k_pools", k_pools);
  check_written_scales(check, args.k_scales, args.v_scales, k_pools, v_pools);
  const c10::SymInt head_dim = k_pools.sym_size(4);
  check.value("k_pools",
              k_pools.sym_size(3) > 0 && head_dim % 16 == 0 && head_dim > 0 && head_dim <= 256,
              "B > 0 and a head dimension D that is a multiple of 16 and at most 256", k_pools);
}

cpu::DecoderPools pools_of(const PoolArgs& args) {
  return {
      .k = args.k_pools.mutable_data_ptr(),
      .v = args.v_pools.mutable_data_ptr(),
      .k_scales = mutable_scales(args.k_scales),
      .v_scales = mutable_scales(args.v_scales),
      .layout = layout_of(args.k_pools),
      .dtype = dtype_of(args.k_pools),
  };
}

void check_batch(const OpCheck& check, const BatchArgs& args, const c10::SymInt& num_rows) {
  check("slots", args.slots).dtype({at::kLong}).shape({{"N", num_rows}}).contiguous();
  check("positions", args.positions).dtype({at::kInt}).shape({{"N", num_rows}}).contiguous();
  const c10::SymInt num_sequences = check_offsets_shape(check, "query_offsets", args.query_offsets);
  check("seq_lens", args.seq_lens).dtype({at::kInt}).shape({{"S", num_sequences}}).contiguous();
  check("page_table", args.page_table)
      .dtype({at::kInt})
      .shape({{"S", num_sequences}, {"M"}})
      .last_dim_contiguous();
  check("logit_rows", args.logit_rows).dtype({at::kLong}).shape({{"R"}}).contiguous();
  check.value("logit_rows", holds(args.logit_rows.sym_size(0).sym_le(num_rows)), "at most N rows",
              args.logit_rows);
}

cpu::DecoderBatch BatchCopy::take(const OpCheck& check, const BatchArgs& args, int64_t num_rows,
                                  const KvLayout& layout, int64_t num_positions) {
  check_batch(check, args, num_rows);
  const int64_t num_sequences = args.seq_lens.numel();
  const int64_t num_logit_rows = args.logit_rows.numel();
  const int64_t max_pages = args.page_table.size(1);
  wide_.resize(static_cast<size_t>(num_rows + num_logit_rows));
  narrow_.resize(static_cast<size_t>(num_rows + 2 * num_sequences + 1 + num_sequences * max_pages));
  int64_t* const slots = wide_.data();
  int64_t* const logit_rows = add(args.slots, slots);
  add(args.logit_rows, logit_rows);
  int32_t* const positions = narrow_.data();
  int32_t* const lengths = add(args.positions, positions);
  int32_t* const offsets = add(args.seq_lens, lengths);
  int32_t* const pages = add(args.query_offsets, offsets);
  const int32_t* const source = args.page_table.const_data_ptr<int32_t>();
  for (int64_t sequence = 0; max_pages > 0 && sequence < num_sequences; ++sequence) {
    std::memcpy(pages + sequence * max_pages, source + sequence * args.page_table.stride(0),
                static_cast<size_t>(max_pages) * sizeof(int32_t));
  }

  check_slot_values(check, slots, num_rows, layout);
  check_positions(check, positions, num_rows, num_positions);
  check_row_offsets(check, "query_offsets", offsets, num_sequences, num_rows);
  check_sequences(check, {pages, lengths, offsets, num_sequences, max_pages, max_pages}, layout);
  check_logit_rows(check, logit_rows, num_logit_rows, num_rows);
  return {
      .positions = positions,
      .slots = slots,
      .page_table = pages,
      .seq_lens = lengths,
      .query_offsets = offsets,
      .logit_rows = logit_rows,
      .num_rows = num_rows,
      .num_logit_rows = num_logit_rows,
      .num_sequences = num_sequences,
      .max_pages = max_pages,
      .page_table_row_stride = max_pages,
  };
}

// Returns where the next values go.
int32_t* BatchCopy::add(const at::Tensor& values, int32_t* to) const {
  if (values.numel() > 0) std::memcpy(to, values.const_data_ptr<int32_t>(), values.nbytes());
  return to + values.numel();
}

int64_t* BatchCopy::add(const at::Tensor& values, int64_t* to) const {
  if (values.numel() > 0) std::memcpy(to, values.const_data_ptr<int64_t>(), values.nbytes());
  return to + values.numel();
}

void PassRunner::operator()(const char* op, FunctionRef<void()> kernel) const {
  RECORD_FUNCTION(op, c10::ArrayRef<const c10::IValue>{});
  kernel();
}

}  // namespace skv::ops
