// What decoder_layers and LayerStack are given: checks of the weights of all layers, of their pools
// and of a batch, and the plain structs of csrc/kernels/cpu/decoder_layers.h that they become.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/kernels/cpu/decoder_layers.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

// What the flat list of weights holds of each layer, in this order; a projection is weight, scales,
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

struct DecoderSizes {
  int64_t hidden_size;   // E
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // Hk
  int64_t head_dim;      // D
};

struct DecoderScalars {
  double norm_eps;
  double scale;
  int64_t sliding_window;
};

// The arguments of a pass that are not weights.
struct BatchArgs {
  const at::Tensor& positions;
  const at::Tensor& slots;
  const at::Tensor& page_table;
  const at::Tensor& seq_lens;
  const at::Tensor& query_offsets;
  const at::Tensor& logit_rows;
};

struct PoolArgs {
  const at::Tensor& k_pools;
  const at::Tensor& v_pools;
  const OptionalTensor& k_scales;
  const OptionalTensor& v_scales;
};

// H is a multiple of Hk, and neither is so large that sizes made of it could overflow.
void check_heads(const OpCheck& check, int64_t num_heads, int64_t num_kv_heads,
                 const char* expected);

// A product of one packed part. `name` goes into the messages.
cpu::PackedLinear packed_linear(const OpCheck& check, const std::string& name,
                                const OptionalTensor* tensors, int64_t in_features,
                                int64_t out_features, bool has_silu_mul);

// The weights of a model, checked. Owns the structs and none of the tensors.
class DecoderWeights {
 public:
  DecoderWeights(const OpCheck& check, const std::vector<OptionalTensor>& weights,
                 const at::Tensor& cos_sin, const DecoderSizes& sizes,
                 const DecoderScalars& scalars);
  DecoderWeights(const DecoderWeights&) = delete;
  DecoderWeights& operator=(const DecoderWeights&) = delete;

  // Without memory (while an op is traced) its pointers are null.
  const cpu::DecoderModel& model() const { return model_; }

 private:
  std::vector<cpu::DecoderLayer> layers_;
  cpu::DecoderModel model_;
};

// Pools of all layers, with a head dimension that attention is built for.
void check_layer_pools(const OpCheck& check, const PoolArgs& args);
cpu::DecoderPools pools_of(const PoolArgs& args);

// Everything but values in memory.
void check_batch(const OpCheck& check, const BatchArgs& args, const c10::SymInt& num_rows);

// The integers of a batch, copied: the values that were checked are those that the kernels read,
// whatever other threads write to the tensors meanwhile. The memory is kept from batch to batch.
class BatchCopy {
 public:
  // The result points into this object, until the next call.
  cpu::DecoderBatch take(const OpCheck& check, const BatchArgs& args, int64_t num_rows,
                         const KvLayout& layout, int64_t num_positions);

 private:
  int32_t* add(const at::Tensor& values, int32_t* to) const;
  int64_t* add(const at::Tensor& values, int64_t* to) const;

  std::vector<int32_t> narrow_;
  std::vector<int64_t> wide_;
};

// Runs the kernels of a pass on the process's threads, and shows each to a profiler as the op it
// belongs to.
class PassRunner {
 public:
  PassRunner() : num_threads_(at::get_num_threads()) {}

  void operator()(int64_t n, int64_t grain, RangeBody body) const {
    ThreadPool::instance().run(n, grain, num_threads_, body);
  }
  void operator()(const char* op, FunctionRef<void()> kernel) const;

 private:
  int num_threads_;
};

}  // namespace skv::ops
