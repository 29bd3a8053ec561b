// LayerStack: a model with packed weights, checked once and ready to run (docs/adr/0018).
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/ops/api.h"
#include "csrc/ops/layers/decoder_args.h"

namespace skv::ops {

// Immutable but for the memory of its passes, so any number of threads may run passes at once.
class SKV_API LayerStack {
 public:
  // What the model is made of; LayerStack keeps the memory of these tensors alive.
  struct Weights {
    std::vector<OptionalTensor> layers;  // LayerTensor of each layer
    at::Tensor cos_sin;                  // float32[max_pos, D]
    at::Tensor embedding;                // float32[V, E]
    at::Tensor norm;                     // float32[E]
    std::vector<OptionalTensor> head;    // weight, scales, minimums, bias: E -> num_logits
    int64_t num_logits;
  };

  struct PassArgs {
    const at::Tensor& token_ids;
    BatchArgs batch;
    PoolArgs pools;
  };

  LayerStack(const Weights& weights, int64_t num_heads, int64_t num_kv_heads,
             const DecoderScalars& scalars);
  ~LayerStack();
  LayerStack(const LayerStack&) = delete;
  LayerStack& operator=(const LayerStack&) = delete;

  // float32[R, E], before the last norm.
  at::Tensor run(const PassArgs& args);
  // float32[R, V].
  at::Tensor forward(const PassArgs& args);
  // int64[R, k] and float32[R, k].
  std::tuple<at::Tensor, at::Tensor> forward_top_k(const PassArgs& args, int64_t k);

 private:
  // Memory of one pass.
  struct Memory {
    cpu::DecoderWorkspace workspace;
    BatchCopy batch;
    std::vector<int64_t> token_ids;
  };

  // A pass borrows the kept memory. A second pass at the same time finds none and makes its own; so
  // does a child that was forked while another thread was in a pass.
  struct GiveBack {
    std::atomic<Memory*>* kept;
    void operator()(Memory* memory) const { delete kept->exchange(memory); }
  };
  using Borrowed = std::unique_ptr<Memory, GiveBack>;

  // A pass whose arguments are checked; it has all that its kernels read.
  struct Pass {
    Borrowed memory;
    cpu::DecoderPools pools;
    cpu::DecoderBatch batch;
    PassRunner runner;
  };

  void keep(const OptionalTensor& tensor);
  Borrowed borrow();
  void copy_token_ids(const OpCheck& check, const at::Tensor& token_ids,
                      std::vector<int64_t>& copy) const;
  cpu::DecoderPools check_pools(const OpCheck& check, const PoolArgs& args) const;
  // Checks the arguments and finds memory; `top_k` as for DecoderWorkspace::prepare.
  Pass begin(const OpCheck& check, const PassArgs& args, int64_t top_k);
  // Embedding and layers; needs no GIL. `output`: float32[R, E].
  void run_layers(const Pass& pass, float* output) const;

  std::vector<c10::Storage> kept_weights_;
  std::optional<DecoderWeights> layers_;
  cpu::DecoderHead head_{};
  const float* embedding_;
  int64_t vocab_size_;
  int64_t num_positions_;
  std::atomic<Memory*> kept_memory_{nullptr};
};

}  // namespace skv::ops
