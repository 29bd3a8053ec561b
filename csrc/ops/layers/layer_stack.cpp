#include "csrc/ops/layers/layer_stack.h"

#include <ATen/record_function.h>

#include <utility>

#include "csrc/ops/linear/args.h"

namespace skv::ops {

namespace {

// A method sees tensors that torch would have made plain on their way to an op.
void check_plain(const OpCheck& check, const char* name, const at::Tensor& tensor) {
  check.value(name,
              tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_neg() &&
                  !tensor.is_conj() && !tensor._is_zerotensor() &&
                  !tensor.key_set().has(c10::DispatchKey::Python),
              "a plain tensor with memory of its own", tensor);
}

void check_plain(const OpCheck& check, const char* name, const OptionalTensor& tensor) {
  if (tensor.has_value()) check_plain(check, name, *tensor);
}

void check_plain(const OpCheck& check, const LayerStack::PassArgs& args) {
  check_plain(check, "token_ids", args.token_ids);
  check_plain(check, "positions", args.batch.positions);
  check_plain(check, "slots", args.batch.slots);
  check_plain(check, "page_table", args.batch.page_table);
  check_plain(check, "seq_lens", args.batch.seq_lens);
  check_plain(check, "query_offsets", args.batch.query_offsets);
  check_plain(check, "logit_rows", args.batch.logit_rows);
  check_plain(check, "k_pools", args.pools.k_pools);
  check_plain(check, "v_pools", args.pools.v_pools);
  check_plain(check, "k_scales", args.pools.k_scales);
  check_plain(check, "v_scales", args.pools.v_scales);
}

at::Tensor new_tensor(std::initializer_list<int64_t> sizes, at::ScalarType dtype) {
  return at::empty(at::IntArrayRef(sizes), at::TensorOptions().dtype(dtype).device(at::kCPU));
}

}  // namespace

LayerStack::LayerStack(const Weights& weights, int64_t num_heads, int64_t num_kv_heads,
                       const DecoderScalars& scalars) {
  const OpCheck check{"LayerStack", at::kCPU};
  for (const OptionalTensor& tensor : weights.layers) check_plain(check, "weights", tensor);
  for (const OptionalTensor& tensor : weights.head) check_plain(check, "head", tensor);
  check_plain(check, "cos_sin", weights.cos_sin);
  check_plain(check, "embedding", weights.embedding);
  check_plain(check, "norm", weights.norm);

  check("embedding", weights.embedding).dtype({at::kFloat}).shape({{"V"}, {"E"}}).contiguous();
  check("cos_sin", weights.cos_sin).dtype({at::kFloat}).shape({{"max_pos"}, {"D"}}).contiguous();
  check_heads(check, num_heads, num_kv_heads, "a multiple > 0 of num_kv_heads, at most 65536");
  const int64_t hidden_size = weights.embedding.size(1);
  const int64_t head_dim = weights.cos_sin.size(1);
  check.value("cos_sin", head_dim > 0 && head_dim % 16 == 0 && head_dim <= 256,
              "a head dimension D that is a multiple of 16 and at most 256", weights.cos_sin);
  layers_.emplace(check, weights.layers, weights.cos_sin,
                  DecoderSizes{hidden_size, num_heads, num_kv_heads, head_dim}, scalars);

  check("norm", weights.norm).dtype({at::kFloat}).shape({{"E", hidden_size}}).contiguous();
  check.value("head", weights.head.size() == 4, "weight, scales, minimums and bias",
              weights.head.size());
  check.value("num_logits", weights.num_logits > 0, "a number > 0", weights.num_logits);
  head_.norm = weights.norm.const_data_ptr<float>();
  head_.linear = packed_linear(check, "LayerStack: head", weights.head.data(), hidden_size,
                               weights.num_logits, false);
  embedding_ = weights.embedding.const_data_ptr<float>();
  num_positions_ = weights.cos_sin.size(0);
  vocab_size_ = weights.embedding.size(0);

  for (const OptionalTensor& tensor : weights.layers) keep(tensor);
  for (const OptionalTensor& tensor : weights.head) keep(tensor);
  keep(weights.cos_sin);
  keep(weights.embedding);
  keep(weights.norm);
}

LayerStack::~LayerStack() { delete kept_memory_.load(); }

// The storage, not the tensor: a tensor can be given another storage in place.
void LayerStack::keep(const OptionalTensor& tensor) {
  if (tensor.has_value()) kept_weights_.push_back(tensor->storage());
}

LayerStack::Borrowed LayerStack::borrow() {
  Memory* const kept = kept_memory_.exchange(nullptr);
  return {kept != nullptr ? kept : new Memory, GiveBack{&kept_memory_}};
}

void LayerStack::copy_token_ids(const OpCheck& check, const at::Tensor& token_ids,
                                std::vector<int64_t>& copy) const {
  check("token_ids", token_ids).dtype(kIdDtypes).shape({{"N"}}).contiguous();
  if (token_ids.scalar_type() == at::kLong) {
    const int64_t* ids = token_ids.const_data_ptr<int64_t>();
    copy.assign(ids, ids + token_ids.numel());
  } else {
    const int32_t* ids = token_ids.const_data_ptr<int32_t>();
    copy.assign(ids, ids + token_ids.numel());
  }
  for (size_t i = 0; i < copy.size(); ++i) {
    TORCH_CHECK_INDEX(copy[i] >= 0 && copy[i] < vocab_size_, check.op(),
                      ": token_ids: expected ids in [0, V = ", vocab_size_, "), got ", copy[i],
                      " at index ", i);
  }
}

cpu::DecoderPools LayerStack::check_pools(const OpCheck& check, const PoolArgs& args) const {
  check_layer_pools(check, args);
  const cpu::DecoderPools pools = pools_of(args);
  const cpu::DecoderModel& model = layers_->model();
  TORCH_CHECK_VALUE(
      args.k_pools.size(0) == model.num_layers && pools.layout.num_kv_heads == model.num_kv_heads &&
          pools.layout.head_dim == model.head_dim,
      check.op(), ": k_pools: expected num_layers = ", model.num_layers,
      ", Hk = ", model.num_kv_heads, ", D = ", model.head_dim, ", got ", describe(args.k_pools));
  return pools;
}

LayerStack::Pass LayerStack::begin(const OpCheck& check, const PassArgs& args, int64_t top_k) {
  check_plain(check, args);
  Pass pass{.memory = borrow(), .pools = check_pools(check, args.pools), .batch = {}, .runner = {}};
  copy_token_ids(check, args.token_ids, pass.memory->token_ids);
  const auto num_rows = static_cast<int64_t>(pass.memory->token_ids.size());
  pass.batch =
      pass.memory->batch.take(check, args.batch, num_rows, pass.pools.layout, num_positions_);
  TORCH_CHECK(
      pass.memory->workspace.prepare(layers_->model(), num_rows, pass.batch.num_logit_rows, top_k),
      check.op(), ": no memory for the activations of ", num_rows, " rows");
  return pass;
}

void LayerStack::run_layers(const Pass& pass, float* output) const {
  // The name under which profiles count what is not a kernel (profile_events.py, CONTAINERS).
  RECORD_FUNCTION("stateful_kv::decoder_layers", c10::ArrayRef<const c10::IValue>{});
  const cpu::DecoderMemory& memory = pass.memory->workspace.memory();
  cpu::gather_rows(embedding_, layers_->model().hidden_size, pass.memory->token_ids.data(),
                   pass.batch.num_rows, memory.hidden);
  cpu::decoder_layers(layers_->model(), pass.batch, pass.pools, memory.hidden, output, memory,
                      {pass.runner, pass.runner});
}

at::Tensor LayerStack::run(const PassArgs& args) {
  const Pass pass = begin({"LayerStack.run", at::kCPU}, args, 0);
  at::Tensor hidden =
      new_tensor({pass.batch.num_logit_rows, layers_->model().hidden_size}, at::kFloat);
  run_layers(pass, hidden.mutable_data_ptr<float>());
  return hidden;
}

at::Tensor LayerStack::forward(const PassArgs& args) {
  const Pass pass = begin({"LayerStack.forward", at::kCPU}, args, 0);
  const int64_t num_rows = pass.batch.num_logit_rows;
  at::Tensor logits = new_tensor({num_rows, head_.linear.out_features}, at::kFloat);
  const cpu::DecoderMemory& memory = pass.memory->workspace.memory();
  run_layers(pass, memory.hidden);
  cpu::decoder_logits(layers_->model(), head_, memory.hidden, num_rows,
                      logits.mutable_data_ptr<float>(), memory, {pass.runner, pass.runner});
  return logits;
}

std::tuple<at::Tensor, at::Tensor> LayerStack::forward_top_k(const PassArgs& args, int64_t k) {
  const OpCheck check{"LayerStack.forward_top_k", at::kCPU};
  check.value("k", k >= 1 && k <= kMaxTopK, "a number from 1 to 64", k);
  check.value("k", k <= head_.linear.out_features, "a number <= V", k);
  const Pass pass = begin(check, args, k);
  const int64_t num_rows = pass.batch.num_logit_rows;
  at::Tensor ids = new_tensor({num_rows, k}, at::kLong);
  at::Tensor values = new_tensor({num_rows, k}, at::kFloat);
  const cpu::DecoderMemory& memory = pass.memory->workspace.memory();
  run_layers(pass, memory.hidden);
  cpu::decoder_top_k(layers_->model(), head_, memory.hidden, num_rows, k,
                     ids.mutable_data_ptr<int64_t>(), values.mutable_data_ptr<float>(), memory,
                     {pass.runner, pass.runner});
  return {std::move(ids), std::move(values)};
}

}  // namespace skv::ops
