// decoder_layers: the layers of a Llama-family model in one call. All arguments are checked before
// the first kernel runs; what runs is csrc/kernels/cpu/decoder_layers.h.
#include <torch/library.h>

#include <string>

#include "csrc/ops/kv/checks.h"
#include "csrc/ops/layers/decoder_args.h"

namespace skv::ops {

namespace {

struct DecoderLayersArgs {
  const at::Tensor& x;
  const c10::List<OptionalTensor>& weights;
  const at::Tensor& cos_sin;
  BatchArgs batch;
  int64_t num_heads;
  DecoderScalars scalars;
  PoolArgs pools;
  const at::Tensor& output;
};

// Everything but values in memory, for real tensors and for tracing. The result points into the
// weights.
DecoderWeights check_decoder_layers(const OpCheck& check, const DecoderLayersArgs& args) {
  const at::Tensor& x = args.x;
  const at::Tensor& k_pools = args.pools.k_pools;
  const at::Tensor& output = args.output;
  check("x", x).dtype({at::kFloat}).shape({{"N"}, {"E"}}).contiguous();
  check_layer_pools(check, args.pools);
  const DecoderSizes sizes{fixed_size(x, 1), args.num_heads, fixed_size(k_pools, 2),
                           fixed_size(k_pools, 4)};
  check_heads(check, args.num_heads, sizes.num_kv_heads,
              "a multiple > 0 of the pools' Hk, at most 65536");
  const auto num_weights = static_cast<int64_t>(args.weights.size());
  check.value("weights", num_weights == fixed_size(k_pools, 0) * int64_t{kLayerTensors},
              std::to_string(kLayerTensors) + " tensors for each layer of the pools", num_weights);
  check_batch(check, args.batch, x.sym_size(0));
  check("output", output)
      .dtype({at::kFloat})
      .shape({{"R", args.batch.logit_rows.sym_size(0)}, {"E", x.sym_size(1)}})
      .contiguous();
  check.own_memory("output", output, "x", x);
  check.own_memory("output", output, "cos_sin", args.cos_sin);
  check.own_memory("output", output, "k_pools", k_pools);
  check.own_memory("output", output, "v_pools", args.pools.v_pools);
  if (args.pools.k_scales.has_value()) {
    check.own_memory("output", output, "k_scales", *args.pools.k_scales);
    check.own_memory("output", output, "v_scales", *args.pools.v_scales);
  }
  return {check, args.weights.vec(), args.cos_sin, sizes, args.scalars};
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
  const DecoderLayersArgs args{x,
                               weights,
                               cos_sin,
                               {positions, slots, page_table, seq_lens, query_offsets, logit_rows},
                               num_heads,
                               {norm_eps, scale, sliding_window},
                               {k_pools, v_pools, k_scales, v_scales},
                               output};
  const DecoderWeights checked = check_decoder_layers(check, args);
  const cpu::DecoderPools pools = pools_of(args.pools);
  BatchCopy copy;
  const cpu::DecoderBatch batch =
      copy.take(check, args.batch, x.size(0), pools.layout, cos_sin.size(0));
  cpu::DecoderWorkspace workspace;
  TORCH_CHECK(workspace.prepare(checked.model(), batch.num_rows, batch.num_logit_rows, 0),
              "decoder_layers: no memory for the activations of ", batch.num_rows, " rows");
  const PassRunner runner;
  cpu::decoder_layers(checked.model(), batch, pools, x.const_data_ptr<float>(),
                      output.mutable_data_ptr<float>(), workspace.memory(), {runner, runner});
}

void decoder_layers_meta(const at::Tensor& x, const c10::List<OptionalTensor>& weights,
                         const at::Tensor& positions, const at::Tensor& cos_sin,
                         const at::Tensor& slots, const at::Tensor& page_table,
                         const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                         const at::Tensor& logit_rows, int64_t num_heads, double norm_eps,
                         double scale, int64_t sliding_window, const at::Tensor& k_pools,
                         const at::Tensor& v_pools, const at::Tensor& output,
                         const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  check_decoder_layers({"decoder_layers", x.device()},
                       {x,
                        weights,
                        cos_sin,
                        {positions, slots, page_table, seq_lens, query_offsets, logit_rows},
                        num_heads,
                        {norm_eps, scale, sliding_window},
                        {k_pools, v_pools, k_scales, v_scales},
                        output});
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) { m.impl("decoder_layers", TORCH_FN(decoder_layers_cpu)); }
TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("decoder_layers", TORCH_FN(decoder_layers_meta));
}

}  // namespace skv::ops
